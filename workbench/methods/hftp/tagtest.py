"""The test of frequency tagging: an HFTP's settings, completed by its corpus, turn responses into a result.

Two conditions are read text by text into running means; each layer is reduced to p-values and effects at once, and
all layers together to q-values. Source: An et al., 2025 (HFTP, arXiv 2510.13255), sections as named in the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.corpora.streams import UnitCorpus
from workbench.methods.hftp import tagging
from workbench.methods.hftp.streaming import Stream, make_streams, repeated_units
from workbench.methods.hftp.tagged import HFTPResult
from workbench.stats import benjamini_hochberg, z_score

if TYPE_CHECKING:
    from workbench.probes.hftp import HFTP

# Reads streams one after another: for each, the responses (n_places, n_neurons) of every layer.
Reader = Callable[[Sequence[Stream], bool], Iterator[tuple[Stream, list[np.ndarray]]]]
Layer = dict[str, np.ndarray]

TOP = 8  # neurons per layer and level whose spectrum is kept


@dataclass(frozen=True)
class FrequencyTest:
    """A probe's settings, completed by what the corpus says and checked against it."""

    probe: HFTP
    null: str
    control: str
    levels: tuple[str, ...]
    rates_hz: tuple[tuple[float, ...], ...]  # several per level only for the phrases of mode "paper"
    n_sentences: int
    n_units: int

    @classmethod
    def of(cls, probe: HFTP, corpus: UnitCorpus) -> FrequencyTest:
        n_units, paper = len(corpus.sentences[0]), probe.mode == "paper"
        null = probe.null_model or ("time" if paper else "slot")
        control = probe.control or ("category" if corpus.slot_classes and not paper else "scramble")
        _check(probe, corpus, null, control)
        named = probe.levels or tuple((name, j * probe.unit_rate_hz / n_units) for name, j in corpus.levels)
        rates = tuple(_rates(probe, name, rate_hz, n_units) for name, rate_hz in named)
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
        if seen.sum() < 2:
            raise ValueError(
                f"HFTP: {seen.sum()} of {len(seen)} sentences were counted at every slot, expected at least 2. Use "
                "more sentences, n_shuffles or sentences_per_text, or a smaller drop_first."
            )
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
    if probe.unit_rate_hz <= 0:
        raise ValueError(f"HFTP: got unit_rate_hz={probe.unit_rate_hz:g}, expected units per second, more than 0.")
    if control == "category" and corpus.slot_classes is None:
        raise ValueError(
            "HFTP: control='category' needs slot classes: pass a UnitCorpus with them, or control='scramble'."
        )
    if paper and null != "time":
        raise ValueError(f"HFTP: got null_model {null!r} in mode 'paper', which knows only time.")
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
