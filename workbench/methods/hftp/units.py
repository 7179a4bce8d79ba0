"""What a model's neurons do at each unit of a stream: units to text, tokens back to units, a few texts at a time.

A unit's response is the mean over the tokens that share a character with it: words of a sub-word tokenizer and
characters of a word tokenizer alike. Source: An et al., 2025 (HFTP, arXiv 2510.13255).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from workbench.corpora.streams import UnitCorpus
from workbench.methods.hftp.streaming import Stream
from workbench.methods.hftp.tagtest import FrequencyTest
from workbench.site import sites
from workbench.tokens import tokenize

if TYPE_CHECKING:
    from workbench.subject import Subject

BYTES_AT_ONCE = 256 << 20  # of captured activations


def read_units(
    subject: Subject, corpus: UnitCorpus, layers: Sequence[int], special: bool, streams: Sequence[Stream], control: bool
) -> Iterator[tuple[Stream, list[np.ndarray]]]:
    """Responses of a model's neurons, a few texts at a time: memory is bounded, whatever the number of streams."""
    at = sites(layers, "neurons")
    bytes_per_text = 4 * len(at) * (subject.anatomy.d_mlp or 1) * 2 * max(len(stream.word) for stream in streams)
    at_once = max(1, BYTES_AT_ONCE // bytes_per_text)
    desc = "HFTP, control" if control else "HFTP"
    for start in tqdm(range(0, len(streams), at_once), desc=desc, unit="batch", delay=2):
        some = streams[start : start + at_once]
        texts, spans = zip(*(_spelled(corpus, stream) for stream in some), strict=True)
        captured = subject.capture(texts, at, special=special, progress=False)
        offsets, text = captured.offsets.numpy(), captured.text.numpy()
        for k, stream in enumerate(some):
            rows = np.flatnonzero(text == k)
            unit, token = _overlaps(texts[k], spans[k], offsets[rows])
            values = (captured[site][rows].float().numpy() for site in at)  # (n_tokens, n_neurons) each
            yield stream, [_unit_means(layer, unit, token, len(spans[k])) for layer in values]


def sentences_that_fit(test: FrequencyTest, subject: Subject, corpus: UnitCorpus, special: bool) -> int:
    """How many sentences one text takes: all, or as many as the context allows."""
    limit, per_text = subject.context, test.probe.sentences_per_text or test.n_sentences
    while True:
        texts = [
            _spelled(corpus, stream)[0]
            for control in (False, True)
            for stream in test.streams(per_text, control=control)
        ]
        longest = max(tokenize(subject.tokenizer, texts, special=special).lengths)
        if per_text < test.n_sentences and test.null == "time":
            raise ValueError(
                f"HFTP: the time null needs the whole corpus in one text, but {per_text} of {test.n_sentences} "
                f"sentences fit into the context of {limit} tokens. Use fewer sentences, or mode='corrected' with "
                "null_model='slot'."
            )
        if limit is None or longest <= limit:
            return per_text
        fewer = min(per_text - 1, per_text * limit // longest)
        if test.probe.sentences_per_text or fewer <= test.probe.drop_first:
            raise ValueError(
                f"HFTP: texts of {per_text} sentences have up to {longest} tokens, the context is {limit}, and about "
                f"{fewer} sentences fit. Ask for fewer with sentences_per_text, or use shorter sentences."
            )
        per_text = fewer


def _spelled(corpus: UnitCorpus, stream: Stream) -> tuple[str, np.ndarray]:
    """A stream as text, with the character span of each unit: (n_places, 2)."""
    n_units = len(corpus.sentences[0])
    units = [corpus.sentences[cell // n_units][cell % n_units] for cell in stream.word]
    lengths = np.array([len(unit) for unit in units])
    ends = np.cumsum(lengths + len(corpus.joiner)) - len(corpus.joiner)
    return corpus.joiner.join(units), np.stack([ends - lengths, ends], axis=1)


def _overlaps(text: str, spans: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (unit, token) that share a character. A special token has the empty span and shares none."""
    begin = np.maximum(spans[:, None, 0], offsets[None, :, 0])
    end = np.minimum(spans[:, None, 1], offsets[None, :, 1])
    unit, token = np.nonzero(begin < end)
    missing = np.setdiff1d(np.arange(len(spans)), unit)
    if len(missing):
        low, high = spans[missing[0]]
        raise ValueError(
            f"HFTP: no token covers the unit {text[low:high]!r}, expected one or more. "
            "Does the tokenizer tell character offsets? A fast one does."
        )
    return unit, token


def _unit_means(values: np.ndarray, unit: np.ndarray, token: np.ndarray, n_units: int) -> np.ndarray:
    """Mean over the tokens of each unit: (n_units, n_neurons)."""
    if len(unit) == n_units:  # one token each
        return values[token]
    starts = np.searchsorted(unit, np.arange(n_units))  # pairs are sorted by unit
    return np.add.reduceat(values[token], starts, axis=0) / np.bincount(unit)[:, None]
