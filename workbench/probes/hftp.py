"""Which neurons follow syntax? Those whose activity repeats at the rate of sentences or phrases in a steady stream.

X_j = sum_{s,p} R[s,p] exp(-2 pi i j p / U), R the mean response to unit p of sentence s over many sentence orders.
Source: An et al., 2025, "Hierarchical Frequency Tagging Probe" (arXiv 2510.13255); its test and ours, see `mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tqdm.auto import tqdm

from workbench import tagging
from workbench.corpora.streams import UnitCorpus
from workbench.corpora.streams import corpus as stream_corpus
from workbench.probe import Expectation, Planted, Probe
from workbench.site import sites
from workbench.stats import benjamini_hochberg, z_score
from workbench.streaming import CONTROLS, Stream, World, as_corpus, make_streams, repeated_units
from workbench.tagged import HFTPResult
from workbench.tokens import tokenize

if TYPE_CHECKING:
    from workbench.subject import Subject

# Reads streams one after another: for each, the responses (n_places, n_neurons) of every layer.
Reader = Callable[[Sequence[Stream], bool], Iterator[tuple[Stream, list[np.ndarray]]]]
Layer = dict[str, np.ndarray]

TOP = 8  # neurons per layer and level whose spectrum is kept
BYTES_AT_ONCE = 256 << 20  # of captured activations


@dataclass(frozen=True)
class HFTP(Probe):
    """Finds MLP neurons that repeat at the sentence or phrase rate. Data: a UnitCorpus or rows of equal length.

    mode             "corrected": valid test, FDR over all neurons of all layers; "paper": as published
    null_model       "slot": closed form; "slot_permutation": the same by permuting slots inside sentences;
                     "time": the paper's, far too lenient for order-averaged responses. None: slot, time in mode "paper"
    control          what the effect is measured against, see `make_streams`; "category" needs slot classes.
                     None: category where the corpus has slot classes, else scramble; scramble in mode "paper"
    n_shuffles       sentence orders per condition
    levels           ((name, rate in Hz), ...) to test; None: those of the corpus
    detrend          "linear" takes a straight line out of each text; None leaves drift in
    drop_first       sentences at the start of each text that are read but not counted
    rotate_start     start each text at another slot of its first, uncounted sentence, against effects of position
    n_permutations   for the permutation nulls; 0 in mode "paper" is the closed form of its threshold. The smallest
                     p is 1 / (n_permutations + 1): with many neurons, FDR needs many permutations or the closed form
    special          add the tokenizer's special tokens, which are never units; None: not in mode "paper"
    sentences_per_text  None: the whole corpus in one text where the context allows, else as many as fit
    layers, layers_at_once  which layers; how many share one forward (memory: 8 bytes x their neurons x units)
    """

    mode: Literal["corrected", "paper"] = "corrected"
    null_model: Literal["slot", "slot_permutation", "time"] | None = None
    control: Literal["scramble", "fixed_scramble", "category", "shuffle"] | None = None
    n_shuffles: int = 100
    seed: int = 0
    fdr: float = 0.05
    unit_rate_hz: float = 4.0
    levels: tuple[tuple[str, float], ...] | None = None
    detrend: Literal["linear"] | None = "linear"
    drop_first: int = 1
    rotate_start: bool = True
    n_permutations: int = 1000
    n_bootstrap: int = 1000
    special: bool | None = None
    sentences_per_text: int | None = None
    layers: tuple[int, ...] | None = None
    layers_at_once: int | None = None
    spectra: Literal["top", "all", "none"] = "top"

    def measure(self, subject: Subject, data: Any) -> HFTPResult:
        corpus = as_corpus(data)
        test = _Test.of(self, corpus)
        layers = tuple(range(subject.n_layers)) if self.layers is None else self.layers
        special = self.mode == "corrected" if self.special is None else self.special
        per_text = _sentences_that_fit(test, subject, corpus, special)
        at_once = self.layers_at_once or len(layers)
        found: list[Layer] = []
        for start in range(0, len(layers), at_once):
            reader = partial(_read_subject, subject, corpus, layers[start : start + at_once], special)
            found += test.analyse(reader, per_text)
        return test.result(found, layers, corpus, per_text)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Sinusoids in 60 of 1000 neurons, lexical responses in all; the corrected mode must find those 60 only."""
        return _planted("planted", cls(seed=seed), World.of(seed, amplitude=0.5, lexical_sd=0.5))

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Purely lexical responses: p-values must be uniform and nothing may survive the correction."""
        return _planted("null", cls(seed=seed), World.of(seed, amplitude=0.0, lexical_sd=1.0))

    @classmethod
    def example(cls, subject: Subject) -> tuple[HFTP, UnitCorpus]:
        return cls(n_shuffles=4, n_bootstrap=100), stream_corpus("four", 12)


@dataclass(frozen=True)
class _Test:
    """A probe's settings, completed by what the corpus says and checked against it."""

    probe: HFTP
    null: str
    control: str
    levels: tuple[str, ...]
    rates_hz: tuple[tuple[float, ...], ...]  # several per level only for the phrases of mode "paper"
    n_sentences: int
    n_units: int

    @classmethod
    def of(cls, probe: HFTP, corpus: UnitCorpus) -> _Test:
        n_units, paper = len(corpus.sentences[0]), probe.mode == "paper"
        named = probe.levels or tuple((name, j * probe.unit_rate_hz / n_units) for name, j in corpus.levels)
        rates = tuple(_rates(probe, name, rate_hz, n_units) for name, rate_hz in named)
        null = probe.null_model or ("time" if paper else "slot")
        control = probe.control or ("category" if corpus.slot_classes and not paper else "scramble")
        _check(probe, corpus, null, control)
        return cls(probe, null, control, tuple(name for name, _ in named), rates, len(corpus.sentences), n_units)

    @property
    def paper(self) -> bool:
        return self.probe.mode == "paper"

    @property
    def harmonics(self) -> list[int]:
        """Harmonic of the sentence rate per level; only mode "corrected" insists that there is one."""
        return [round(rates[0] * self.n_units / self.probe.unit_rate_hz) for rates in self.rates_hz]

    def bins(self, n_times: int) -> list[list[int]]:
        """The nearest Fourier bins of each level in a text of `n_times` units."""
        return [[round(rate * n_times / self.probe.unit_rate_hz) for rate in rates] for rates in self.rates_hz]

    def streams(self, per_text: int, *, control: bool) -> list[Stream]:
        probe = self.probe
        return make_streams(
            self.n_sentences,
            self.n_units,
            control=self.control if control else None,
            n_shuffles=probe.n_shuffles,
            seed=probe.seed,
            sentences_per_text=per_text,
            reorder=not (self.paper and control),  # the paper keeps the order of sentences in its control
            drop_first=0 if self.paper else probe.drop_first,
            rotate_start=probe.rotate_start and not self.paper,
        )

    def analyse(self, reader: Reader, per_text: int) -> list[Layer]:
        """Read both conditions and reduce each layer to the arrays of the result."""
        tallies: list[list[tagging.Tally]] = []
        for control in (False, True):
            tallies.append([])
            for stream, layers in reader(self.streams(per_text, control=control), control):
                tallies[-1] = tallies[-1] or [self._tally(values.shape[1]) for values in layers]
                for tally, values in zip(tallies[-1], layers, strict=True):
                    tally.add(stream.cell, stream.first, values)
        return [self._layer(*pair) for pair in zip(*tallies, strict=True)]

    def _tally(self, n_neurons: int) -> tagging.Tally:
        def bins(n_times: int) -> list[int]:
            return [k for group in self.bins(n_times) for k in group]

        detrend = self.probe.detrend == "linear" and not self.paper
        timed = bins if self.null == "time" else None
        return tagging.Tally(self.n_sentences, self.n_units, n_neurons, detrend=detrend, bins=timed)

    def _layer(self, experimental: tagging.Tally, control: tagging.Tally) -> Layer:
        seen = experimental.seen() & control.seen()
        own, other = experimental.means(seen), control.means(seen)  # (n_sentences, n_units, n_neurons)
        found = self._paper(experimental, control) if self.paper else self._corrected(experimental, control, own, other)
        for prefix, responses in (("", own), ("control_", other)):
            found[f"{prefix}slot_mean"] = responses.mean(axis=0)  # (n_units, n_neurons)
            found[f"{prefix}slot_sem"] = responses.std(axis=0, ddof=1) / np.sqrt(len(responses))
        n_times = self.n_units * len(own)
        found["rates_hz"] = np.arange(n_times // 2 + 1) * self.probe.unit_rate_hz / n_times
        # Spectra are of the responses in the order of the corpus, not of the order-averaged text: there all rates but
        # the harmonics fade with the number of orders, and every peak looks clean.
        found["chosen"] = chosen = self._chosen(found["effect"])
        for prefix, responses in (("", own), ("control_", other)):
            series = responses[:, :, chosen].reshape(n_times, len(chosen))
            found[f"{prefix}spectrum"] = tagging.amplitude_spectrum(series).T  # (n_chosen, n_rates)
        return found

    def _corrected(
        self, experimental: tagging.Tally, control: tagging.Tally, own: np.ndarray, other: np.ndarray
    ) -> Layer:
        probe, harmonics = self.probe, self.harmonics
        found = {
            "amplitude": tagging.amplitude(own, harmonics),
            "control_amplitude": tagging.amplitude(other, harmonics),
        }
        found["effect"] = found["amplitude"] - found["control_amplitude"]
        found["low"], found["high"] = tagging.effect_interval(own, other, harmonics, probe.n_bootstrap, probe.seed)
        return found | {"p": self._p(own, experimental), "control_p": self._p(other, control)}

    def _p(self, responses: np.ndarray, tally: tagging.Tally) -> np.ndarray:
        """p-values (n_neurons, n_levels) under the chosen null."""
        if self.null == "slot":
            return tagging.slot_null(responses, self.harmonics)
        rng = np.random.default_rng([self.probe.seed, 2])  # the same permutations for every layer and condition
        if self.null == "slot_permutation":
            series = responses.reshape(-1, responses.shape[2])
            moves = tagging.slot_permutations(len(responses), self.n_units, self.probe.n_permutations, rng)
        else:
            series = tally.order_average()
            moves = tagging.time_permutations(len(series), self.probe.n_permutations, rng)
        bins = [j * len(series) // self.n_units for j in self.harmonics]
        return tagging.permutation_null(series, bins, moves)[2]

    def _paper(self, experimental: tagging.Tally, control: tagging.Tally) -> Layer:
        """Steps 6 and 7 of the paper: a threshold in time, then the difference of magnitudes where it was passed."""
        series = experimental.order_average()  # (n_times, n_neurons)
        bins = self.bins(len(series))
        flat = [k for group in bins for k in group]
        if self.probe.n_permutations:
            rng = np.random.default_rng([self.probe.seed, 2])
            moves = tagging.time_permutations(len(series), self.probe.n_permutations, rng)
            observed, threshold, p = tagging.permutation_null(series, flat, moves)
        else:
            observed, threshold, p = tagging.time_threshold(series, flat)
        ends = np.cumsum([len(group) for group in bins])[:-1]
        parts = (
            np.split(a, ends, axis=1) for a in (experimental.magnitude(), control.magnitude(), observed > threshold, p)
        )
        levels = [
            (*tagging.paper_effect(power, control_power, passed, group, len(series)), p_group.min(axis=1))
            for group, power, control_power, passed, p_group in zip(bins, *parts, strict=True)
        ]
        names = ("amplitude", "control_amplitude", "effect", "p")
        found = {name: np.stack(column, axis=1) for name, column in zip(names, zip(*levels, strict=True), strict=True)}
        # The paper gives no interval: its groups share all sentences, and one over groups would be far too narrow.
        missing = np.full_like(found["p"], np.nan)
        return found | {"low": missing, "high": missing, "control_p": missing}

    def _chosen(self, effect: np.ndarray) -> np.ndarray:
        if self.probe.spectra == "top":
            return np.unique(np.argsort(-effect, axis=0, kind="stable")[:TOP])
        return np.arange(len(effect) if self.probe.spectra == "all" else 0)

    def result(self, found: list[Layer], layers: Sequence[int], corpus: UnitCorpus, per_text: int) -> HFTPResult:
        """All layers together: false discovery rate, z-scores, and what is significant."""
        arrays: dict[str, Any] = {
            name: _stacked([layer[name] for layer in found], axis) for name, axis in STACKED.items()
        }
        n_levels = len(self.levels)
        for name in ("p", "control_p"):
            columns = [benjamini_hochberg(arrays[name][..., k]) for k in range(n_levels)]
            arrays[name.replace("p", "q")] = np.stack(columns, axis=-1)
        arrays["z"] = np.stack([z_score(arrays["effect"][..., k]) for k in range(n_levels)], axis=-1)
        significant = arrays["z"] > 2 if self.paper else arrays["q"] <= self.probe.fdr
        which = [(layer, neuron) for layer, one in zip(layers, found, strict=True) for neuron in one["chosen"]]
        spectra: dict[str, Any] = {
            name: np.concatenate([layer[name] for layer in found]) for name in ("spectrum", "control_spectrum")
        }
        return HFTPResult(
            **arrays,
            **spectra,
            significant=significant,
            control_significant=arrays["control_q"] <= self.probe.fdr,
            spectrum_of=np.array(which, dtype=np.int64).reshape(-1, 2),
            spectrum_rate_hz=found[0]["rates_hz"],
            layers=tuple(layers),
            levels=self.levels,
            rates_hz=self.rates_hz,
            unit_rate_hz=self.probe.unit_rate_hz,
            corpus=corpus.name,
            slot_names=corpus.slot_classes or tuple(f"slot {p + 1}" for p in range(self.n_units)),
            mode=self.probe.mode,
            null=self.null,
            control=self.control,
            fdr=self.probe.fdr,
            seed=self.probe.seed,
            sentences_per_text=per_text,
            notes=repeated_units(corpus.sentences),
        )


STACKED = {  # arrays of the result, with the axis of neurons in a layer's array
    "slot_mean": 1, "slot_sem": 1, "control_slot_mean": 1, "control_slot_sem": 1,
    "amplitude": 0, "control_amplitude": 0, "effect": 0, "low": 0, "high": 0, "p": 0, "control_p": 0,
}  # fmt: skip


def _stacked(layers: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Layers as one array; a layer with fewer neurons, such as a pruned one, is filled up with NaN."""
    width = max(values.shape[axis] for values in layers)
    gaps = [[(0, width - values.shape[axis] if k == axis else 0) for k in range(values.ndim)] for values in layers]
    return np.stack([np.pad(values, gap, constant_values=np.nan) for values, gap in zip(layers, gaps, strict=True)])


def _rates(probe: HFTP, name: str, rate_hz: float, n_units: int) -> tuple[float, ...]:
    """The rates that stand for one level."""
    if probe.mode == "corrected":
        tagging.harmonic_of(rate_hz, probe.unit_rate_hz, n_units)
    elif name == "phrase" and n_units != 4:  # the paper, natural text: phrases of 2 to U - 1 units, any rate counts
        return tuple(probe.unit_rate_hz / length for length in range(2, n_units))
    return (rate_hz,)


def _check(probe: HFTP, corpus: UnitCorpus, null: str, control: str) -> None:
    paper = probe.mode == "paper"
    if probe.mode not in ("corrected", "paper"):
        raise ValueError(f"HFTP: got mode {probe.mode!r}, expected 'corrected' or 'paper'.")
    if control not in CONTROLS:
        raise ValueError(f"HFTP: got control {control!r}, expected one of {', '.join(CONTROLS)}.")
    if control == "category" and corpus.slot_classes is None:
        raise ValueError(
            "HFTP: control='category' needs slot classes: pass a UnitCorpus with them, or control='scramble'."
        )
    if null not in ("slot", "slot_permutation", "time") or (paper and null != "time"):
        raise ValueError(
            f"HFTP: got null_model {null!r} in mode {probe.mode!r}, expected slot, slot_permutation or time; "
            "mode 'paper' knows only time."
        )
    if probe.n_shuffles < 1 or (paper and probe.n_shuffles % tagging.GROUP):
        raise ValueError(
            f"HFTP: got n_shuffles={probe.n_shuffles}; mode 'paper' averages groups of {tagging.GROUP}. Choose 100."
        )
    if probe.n_permutations < 1 and null != "slot" and not paper:
        raise ValueError(
            f"HFTP: got n_permutations={probe.n_permutations}, null_model={null!r} needs some. Choose 1000."
        )
    if not paper and not int(probe.rotate_start) <= probe.drop_first < len(corpus.sentences):
        raise ValueError(
            f"HFTP: got drop_first={probe.drop_first} for {len(corpus.sentences)} sentences with rotate_start="
            f"{probe.rotate_start}. Keep some sentences; rotate_start needs drop_first of at least 1."
        )


def _sentences_that_fit(test: _Test, subject: Subject, corpus: UnitCorpus, special: bool) -> int:
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


def _read_subject(
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


def solved(world: World, probe: HFTP) -> HFTPResult:
    """What `probe` finds in a simulated world."""
    rows = np.arange(len(world.lexical)).astype(str).reshape(-1, len(world.pattern))
    simulated = UnitCorpus("simulated", tuple(map(tuple, rows.tolist())))
    test = _Test.of(probe, simulated)
    return test.result(test.analyse(world.read, test.n_sentences), (0,), simulated, test.n_sentences)


def _planted(name: str, probe: HFTP, world: World) -> Planted:
    """A world with its truth: which neurons follow the sentence, the phrase, both, or nothing."""
    has = np.greater(np.abs(np.fft.rfft(world.pattern, axis=0)[1:3]).T, 1e-6)  # (n_neurons, 2): sentence, phrase
    silent = ~has.any(axis=1)

    def share(level: int, among: np.ndarray) -> Callable[[Any], float]:
        return lambda found: float(found.significant[0][among, level].mean())

    def rate(level: int) -> Callable[[Any], float]:
        return lambda found: float((found.p[0][silent, level] <= 0.05).mean())

    tests = []
    for k, level in enumerate(("sentence", "phrase")):
        if has[:, k].any():
            tests.append(Expectation(f"recall at the {level} rate", share(k, has[:, k]), 0.95, 1.0))
            tests.append(Expectation(f"wrong level: {level}", share(k, has[:, 1 - k] & ~has[:, k]), 0.0, 0.05))
        else:
            tests.append(Expectation(f"p <= .05 at the {level} rate", rate(k), 0.03, 0.07))
        tests.append(Expectation(f"false detections at the {level} rate", share(k, np.asarray(silent)), 0.0, 0.03))
    arrays = {"pattern": world.pattern, "lexical": world.lexical, "follows": has}
    return Planted(name, arrays, lambda: solved(world, probe), tuple(tests))
