"""In which order units are read: streams of equally long sentences, and control streams without their structure.

Each place of a text holds one unit and counts for one cell (sentence, slot); a cell is sentence * n_units + slot.
Source: An et al., 2025 (HFTP, arXiv 2510.13255) for sentence orders and scrambles; the other controls are ours.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.corpora.streams import UnitCorpus

CONTROLS = ("scramble", "fixed_scramble", "category", "shuffle")


@dataclass(frozen=True, eq=False)
class Stream:
    """One text as indices.

    word       (n_places,) the cell that the unit at each place is taken from
    cell       (n_places,) the cell that the response at this place counts for
    first      places before this one are read but not counted
    shuffle    the number of the sentence order that this text belongs to
    """

    word: np.ndarray
    cell: np.ndarray
    first: int
    shuffle: int


def make_streams(
    n_sentences: int,
    n_units: int,
    *,
    control: str | None = None,
    n_shuffles: int = 100,
    seed: int = 0,
    sentences_per_text: int | None = None,
    reorder: bool = True,
    drop_first: int = 1,
    rotate_start: bool = True,
) -> list[Stream]:
    """The texts of one condition: all sentences in `n_shuffles` orders; `control` None keeps the sentences whole.

    scramble         slots permuted inside each sentence, afresh in every order; no neighbours stay neighbours
    fixed_scramble   the same permutations in every order
    category         each slot takes the unit of this slot in another sentence: classes stay, composition goes
    shuffle          every unit may go anywhere in the corpus: nothing periodic is left
    """
    if control is not None and control not in CONTROLS:
        raise ValueError(f"HFTP: got control {control!r}, expected one of {', '.join(CONTROLS)}.")
    orders, places = (np.random.default_rng([seed, part]) for part in (0, 1))  # conditions share the orders
    fixed = _scrambles(n_sentences, n_units, places) if control == "fixed_scramble" else None
    cells = np.arange(n_sentences * n_units).reshape(n_sentences, n_units)
    n_texts = -(-n_sentences // (sentences_per_text or n_sentences))
    made = []
    for shuffle in range(n_shuffles):
        order = orders.permutation(n_sentences) if reorder else np.arange(n_sentences)
        word, cell = _arranged(cells, control, places, fixed)
        # Starting each text at another slot turns the slots against the position in the text. Otherwise a response
        # to the position alone (GPT-2 adds a learned vector per position) has its own value at every slot, the same
        # in all sentences: in untrained GPT-2 models 20 % of the neurons then pass at p < .05, 4.6 % with the turn.
        cut = shuffle % n_units if rotate_start else 0
        for part in np.array_split(order, n_texts):
            first = min(drop_first, len(part)) * n_units - cut
            made.append(Stream(word[part].ravel()[cut:], cell[part].ravel()[cut:], first, shuffle))
    return made


def scramble(n_units: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that isn't the identity and in which no i is followed by i + 1."""
    for _ in range(200):
        order = rng.permutation(n_units)
        if not np.any(np.diff(order) == 1):
            return order
    valid = [p for p in itertools.permutations(range(n_units)) if all(b - a != 1 for a, b in itertools.pairwise(p))]
    return np.array(valid[rng.integers(len(valid))])


def as_corpus(data: Any) -> UnitCorpus:
    """`data` as a UnitCorpus: it is one, or rows of units, or strings of words whose punctuation is left out.

    Raises ValueError for no rows, one row, rows of one unit, or a row whose number of units differs.
    """
    if isinstance(data, UnitCorpus):
        corpus = data
    elif isinstance(data, str):
        raise ValueError(
            f"HFTP: got one string, expected a list of sentences. Split it into rows of equal length: {data[:30]!r}."
        )
    else:
        rows = tuple(tuple(re.sub(r"[^\w\s]", "", row).split()) if isinstance(row, str) else tuple(row) for row in data)
        n_units = len(rows[0]) if rows else 0
        pairs = (("phrase", n_units // 2),) if n_units % 2 == 0 and n_units > 2 else ()  # units in pairs
        corpus = UnitCorpus("sentences", rows, levels=(("sentence", 1), *pairs))
    _check(corpus.sentences, corpus.slot_classes)
    return corpus


def repeated_units(sentences: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """A note for each slot in which some unit comes in several sentences.

    Such sentences are no independent evidence. Of 4000 simulated, purely lexical neurons and 50 sentences whose units
    come r times each in their slots, .05 pass the slot null at .05 for r = 1, .23 for r = 2 and .56 for r = 5 at the
    sentence rate (theory: .05 ** (1 / r)), and .05, .16 and .39 at the Nyquist rate.
    """
    notes = []
    for slot, units in enumerate(zip(*sentences, strict=True)):
        unit, count = Counter(units).most_common(1)[0]
        if count > 1:
            notes.append(
                f"slot {slot + 1} repeats units ({unit!r} comes {count} times in {len(units)} sentences): "
                "sentences that share units are not independent, and p-values of lexical neurons are too small; "
                "look at the control."
            )
    return tuple(notes)


@dataclass(frozen=True, eq=False)
class World:
    """Simulated neurons: a pattern over slots where the text has structure, a response to each word, and noise.

    pattern (n_units, n_neurons); lexical (n_sentences * n_units, n_neurons) belongs to the word, wherever it stands.
    drift rises linearly from 0 over each text; outlier is added to its first unit.
    """

    pattern: np.ndarray
    lexical: np.ndarray
    noise_sd: float = 1.0
    drift: float = 0.0
    outlier: float = 0.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        seed: int = 0,
        *,
        amplitude: float,
        lexical_sd: float,
        n_sentences: int = 50,
        n_neurons: int = 1000,
        counts: tuple[int, int, int] = (20, 20, 20),
        **more: float,
    ) -> World:
        """Four-unit sentences; `counts` neurons follow the sentence, the phrase, and both."""
        slot = np.arange(4)[:, None]
        shapes = np.cos(np.pi / 2 * slot), np.cos(np.pi * slot), np.cos(np.pi / 2 * slot) + np.cos(np.pi * slot)
        pattern = np.zeros((4, n_neurons))
        ends = np.cumsum(counts)
        for shape, count, end in zip(shapes, counts, ends, strict=True):
            pattern[:, end - count : end] = amplitude * shape
        lexical = np.random.default_rng([seed, 3]).normal(0.0, lexical_sd, (n_sentences * 4, n_neurons))
        return cls(pattern.astype(np.float32), lexical.astype(np.float32), seed=seed, **more)

    def read(self, streams: Sequence[Stream], control: bool) -> Iterator[tuple[Stream, list[np.ndarray]]]:
        rng = np.random.default_rng([self.seed, 4 + control])
        n_units, n_neurons = self.pattern.shape
        for stream in streams:
            values = self.noise_sd * rng.standard_normal((len(stream.word), n_neurons), dtype=np.float32)
            values += self.lexical[stream.word]
            if not control:
                values += self.pattern[stream.word % n_units]
            values += np.linspace(0.0, self.drift, len(values), dtype=np.float32)[:, None]
            values[0] += self.outlier
            yield stream, [values]


def _check(sentences: Sequence[Sequence[str]], slot_classes: Sequence[str] | None) -> None:
    if len(sentences) < 2:
        raise ValueError(f"HFTP: got {len(sentences)} sentences, expected at least 2, better 50. Add sentences.")
    usual = Counter(map(len, sentences)).most_common(1)[0][0]
    for row, sentence in enumerate(sentences):
        if len(sentence) != usual:
            raise ValueError(
                f"HFTP: row {row} ({' '.join(sentence)!r}) has {len(sentence)} units, the others have {usual}. "
                "A rate needs sentences of equal length: remove the row (a header?) or rewrite it."
            )
    if usual < 2:
        raise ValueError(
            f"HFTP: each sentence is one unit ({sentences[0][0]!r}), expected at least 2. For text without spaces pass "
            "UnitCorpus(name, tuple(map(tuple, rows)), joiner='')."
        )
    if slot_classes is not None and len(slot_classes) != usual:
        raise ValueError(
            f"HFTP: got {len(slot_classes)} slot classes for sentences of {usual} units, expected one per unit."
        )


def _arranged(
    cells: np.ndarray, control: str | None, rng: np.random.Generator, fixed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(word, cell), both (n_sentences, n_units), of each sentence of the corpus under one condition."""
    if control is None:
        return cells, cells
    if control == "shuffle":
        return rng.permutation(cells.ravel()).reshape(cells.shape), cells
    if control == "category":
        # A response counts for the cell its word comes from: both conditions then hold the same words in the same
        # cells, so that what a word does by itself cancels in their difference.
        word = rng.permuted(cells, axis=0)
        return word, word
    slots = _scrambles(cells.shape[0], cells.shape[1], rng) if fixed is None else fixed
    return np.take_along_axis(cells, slots, axis=1), cells


def _scrambles(n_sentences: int, n_units: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([scramble(n_units, rng) for _ in range(n_sentences)])
