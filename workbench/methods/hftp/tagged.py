"""What frequency tagging found: tables of neurons, of shares per layer and of overlaps, and their figures.

A neuron's set is the level at which it is significant; "shared" where it is so at two or more levels.
Source: An et al., 2025 (HFTP, arXiv 2510.13255); intervals of shares after Wilson, 1927.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.result import Result
from workbench.stats import dice, wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NONE, SHARED = "none", "shared"


@dataclass(frozen=True, eq=False, kw_only=True)
class HFTPResult(Result):
    """Which neurons follow which level. L layers, N neurons, U units per sentence, K kept spectra.

    slot_mean, slot_sem (L, U, N)   mean response per slot and its standard error over sentences; control_... likewise
    amplitude, control_amplitude, effect, low, high (L, N, level)   in activation units, effect with 95 % interval
    p, q, z, significant (L, N, level)   q over all neurons of all layers; control_p, control_q: same test, control text
    spectrum, control_spectrum (K, rate)  of the neurons in spectrum_of (K, 2: layer, neuron), at spectrum_rate_hz
    Places without a neuron, in layers narrower than the widest, are NaN.
    """

    slot_mean: np.ndarray
    slot_sem: np.ndarray
    control_slot_mean: np.ndarray
    control_slot_sem: np.ndarray
    amplitude: np.ndarray
    control_amplitude: np.ndarray
    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    q: np.ndarray
    z: np.ndarray
    significant: np.ndarray
    control_p: np.ndarray
    control_q: np.ndarray
    control_significant: np.ndarray
    spectrum: np.ndarray
    control_spectrum: np.ndarray
    spectrum_of: np.ndarray
    spectrum_rate_hz: np.ndarray
    layers: tuple[int, ...]
    levels: tuple[str, ...]
    rates_hz: tuple[tuple[float, ...], ...]
    unit_rate_hz: float
    corpus: str
    slot_names: tuple[str, ...]
    mode: str
    null: str
    control: str
    fdr: float
    seed: int
    sentences_per_text: int
    notes: tuple[str, ...] = ()

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "neuron", "level", "rate_hz", "harmonic", "amplitude", "control_amplitude", "effect", "low", "high",
        "p", "q", "z", "significant", "set", "mode", "seed",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per neuron and level. Where a level has several rates, rate_hz is the highest."""
        layer, neuron, level = np.nonzero(~np.isnan(self.p))
        rate_hz = np.array([rates[0] for rates in self.rates_hz])
        arrays = ("amplitude", "control_amplitude", "effect", "low", "high", "p", "q", "z", "significant")
        return pd.DataFrame(
            {
                "layer": np.array(self.layers)[layer],
                "neuron": neuron,
                "level": np.array(self.levels)[level],
                "rate_hz": rate_hz[level],
                "harmonic": (rate_hz * self.n_units / self.unit_rate_hz)[level],
                **{name: getattr(self, name)[layer, neuron, level] for name in arrays},
                "set": self.sets()[layer, neuron],
                "mode": self.mode,
                "seed": self.seed,
            },
            columns=list(self.columns),
        )

    @property
    def n_units(self) -> int:
        return self.slot_mean.shape[1]

    @property
    def exists(self) -> np.ndarray:
        """(L, N) where there is a neuron."""
        return ~np.isnan(self.p[..., 0])

    def sets(self, *, control: bool = False) -> np.ndarray:
        """(L, N) the name of each neuron's set: a level, "shared" or "none"."""
        significant = self.control_significant if control else self.significant
        names = np.array([NONE, *self.levels, SHARED])
        count = significant.sum(axis=2)
        return names[np.where(count > 1, len(names) - 1, np.where(count == 1, significant.argmax(axis=2) + 1, 0))]

    def summary(self) -> pd.DataFrame:
        """Count and proportion of each set per layer with 95 % interval, in the experimental and the control text."""
        tables = []
        for condition, control in (("experimental", False), ("control", True)):
            if control and np.isnan(self.control_p).all():  # mode "paper" does not test its control
                continue
            sets = np.where(self.exists, self.sets(control=control), "")
            for name in (*self.levels, SHARED):
                count, total = (sets == name).sum(axis=1), self.exists.sum(axis=1)
                low, high = wilson_interval(count, total)
                columns = {"count": count, "proportion": count / total, "low": low, "high": high}
                tables.append(pd.DataFrame({"layer": self.layers, "set": name, **columns, "condition": condition}))
        return pd.concat(tables, ignore_index=True)

    def _any(self, curve: str, *, control: bool = False) -> pd.DataFrame:
        """Share per layer of neurons that are in any set."""
        count = (self.exists & (self.sets(control=control) != NONE)).sum(axis=1)
        total = self.exists.sum(axis=1)
        low, high = wilson_interval(count, total)
        columns = {"layer": self.layers, "curve": curve, "proportion": count / total, "low": low, "high": high}
        return pd.DataFrame(columns)

    def pass_rates(self, alpha: float = 0.05) -> pd.DataFrame:
        """Share of neurons with p <= alpha, uncorrected, per condition and level: near alpha where nothing is tagged.

        The interval takes neurons for independent. In a trained model they move together: over corpora the share
        scatters around alpha much more widely than it says (.02 to .12 for shuffled text on a partly trained organism).
        """
        rows = []
        for condition, p in (("experimental", self.p), ("control", self.control_p)):
            for k, level in enumerate(self.levels):
                values = p[..., k][~np.isnan(p[..., k])]
                if values.size:
                    count = int((values <= alpha).sum())
                    low, high = wilson_interval(count, values.size)
                    rows.append((condition, level, count / values.size, float(low), float(high)))
        return pd.DataFrame(rows, columns=["condition", "level", "rate", "low", "high"])

    def share(self, level: str, *, control: bool = False) -> float:
        """Share of all neurons that are significant at one level."""
        significant = self.control_significant if control else self.significant
        return float(significant[..., self._level(level)][self.exists].mean())

    def share_beyond_control(self, level: str) -> float:
        """Share of all neurons that are significant and whose amplitude surely exceeds the control's: low above 0."""
        k = self._level(level)
        return float((self.significant[..., k] & (self.low[..., k] > 0))[self.exists].mean())

    def overlap(self, other: HFTPResult) -> pd.DataFrame:
        """Neurons that are in the same set in both results, per layer: two corpora, two toggles, two seeds."""
        if self.p.shape[:2] != other.p.shape[:2] or self.layers != other.layers:
            raise ValueError(
                f"overlap: got layers {other.layers} of {other.p.shape[1]} neurons, expected {self.layers} of "
                f"{self.p.shape[1]}. "
                "Only results of the same model's same layers share neurons."
            )
        pairs = self.sets(), other.sets()
        rows = []
        for name in (*dict.fromkeys(self.levels + other.levels), SHARED):
            for k, layer in enumerate(self.layers):
                a, b = (sets[k] == name for sets in pairs)
                rows.append((layer, name, self.corpus, other.corpus, int((a & b).sum()), dice(a, b)))
        return pd.DataFrame(rows, columns=["layer", "set", "corpus_a", "corpus_b", "shared", "dice"])

    def views(self) -> dict[str, list[Any]]:
        return {
            "view": list(self._drawings()),
            "level": list(self.levels),
            "neuron": [f"{layer}.{neuron}" for layer, neuron in self._strongest()],
        }

    def plot(
        self,
        view: str = "layers",
        level: str | None = None,
        neuron: str | tuple[int, int] | None = None,
        other: HFTPResult | None = None,
        other_name: str = "other",
    ) -> Figure:
        """layers: share of each set per layer · spectrum, slots: of one neuron, "layer.neuron" or a pair
        p: histogram of p-values (flat under the null) · overlap: of levels, or of the sets of two results.

        `other` adds a second result, such as that of the untrained twin, to layers, p and overlap.
        """
        drawings = self._drawings()
        if view not in drawings:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(drawings)}.")
        at = self._neuron(neuron)
        return drawings[view](level or self.levels[0], at, other, other_name)

    def _drawings(self) -> dict[str, Callable[..., Figure]]:
        return {
            "layers": self._plot_layers,
            "spectrum": self._plot_spectrum,
            "slots": self._plot_slots,
            "p": self._plot_p,
            "overlap": self._plot_overlap,
        }

    def _plot_layers(self, level: str, at: tuple[int, int], other: HFTPResult | None, other_name: str) -> Figure:
        table = self.summary()
        table = table[table["condition"] == "experimental"].assign(curve=lambda rows: rows["set"])
        # A control is one curve, whatever the set: its place at zero is what makes the others a finding.
        controls = (
            [self._any(f"any, {self.control} control", control=True)] if not np.isnan(self.control_p).all() else []
        )
        controls += [other._any(f"any, {other_name}")] if other is not None else []
        table = pd.concat([table, *controls], ignore_index=True)
        first, *rest = self.levels
        parts = [f"{self.share(first):.1%} of {int(self.exists.sum())} neurons follow the {first} rate"]
        title = f"{self._subject}: {_listed(parts + [f'{self.share(name):.1%} the {name} rate' for name in rest])}"
        if not np.isnan(self.control_p).all():
            title += f"; {self.control} control: {_listed([f'{self.share(n, control=True):.1%}' for n in self.levels])}"
            title += (
                f"; by more than the control: {_listed([f'{self.share_beyond_control(n):.1%}' for n in self.levels])}"
            )
        if other is not None:
            title += f"; {other_name}: {_listed([f'{other.share(n):.1%}' for n in other.levels])}"
        names: dict[str, Any] = {"x_title": "layer", "y_title": "share of the layer's neurons"}
        figure = plots.lines(table, "layer", "proportion", "curve", "low", "high", title=title, **names)
        return figure.update_yaxes(tickformat=".0%", rangemode="tozero").update_xaxes(
            dtick=max(1, len(self.layers) // 12)
        )

    def _plot_spectrum(self, level: str, at: tuple[int, int], other: HFTPResult | None, other_name: str) -> Figure:
        kept = np.flatnonzero((self.spectrum_of == at).all(axis=1))
        if not len(kept):
            some = ", ".join(f"{a}.{b}" for a, b in self._strongest()[:5]) if len(self.spectrum_of) else "none"
            raise ValueError(
                f"plot: the spectrum of neuron {at[0]}.{at[1]} was not kept (kept: {some}, ...). "
                "Choose one of these or run HFTP with spectra='all'."
            )
        pair = (("experimental", self.spectrum), (f"control: {self.control}", self.control_spectrum))
        tables = [
            pd.DataFrame({"rate_hz": self.spectrum_rate_hz, "amplitude": values[kept[0]], "condition": name})
            for name, values in pair
        ]
        own, control = (values[self._at(at)][self._level(level)] for values in (self.amplitude, self.control_amplitude))
        rate_hz = self.rates_hz[self._level(level)][0]
        title = (
            f"Neuron {at[0]}.{at[1]} at the {level} rate, {rate_hz:g} Hz: amplitude {own:.3g}, {control:.3g} in the "
            f"{self.control} control"
        )
        marks = {name: rates[0] for name, rates in zip(self.levels, self.rates_hz, strict=True)}
        titles: dict[str, Any] = {"x_title": "rate (Hz)", "y_title": "amplitude (activation units)"}
        return plots.spectrum(pd.concat(tables), marks=marks, title=title, **titles)

    def _plot_slots(self, level: str, at: tuple[int, int], other: HFTPResult | None, other_name: str) -> Figure:
        layer, neuron = self._at(at)
        tables = []
        for condition, mean, sem in (
            ("experimental", self.slot_mean, self.slot_sem),
            (f"control: {self.control}", self.control_slot_mean, self.control_slot_sem),
        ):
            centre, half = mean[layer, :, neuron], 1.96 * sem[layer, :, neuron]
            names = [
                f"{p + 1} {name}" if not name.startswith("slot") else name for p, name in enumerate(self.slot_names)
            ]
            columns = {"slot": names, "mean": centre, "low": centre - half, "high": centre + half}
            tables.append(pd.DataFrame({**columns, "condition": condition}))
        profile = tables[0]["mean"].to_numpy()
        most, least = (tables[0]["slot"][k] for k in (profile.argmax(), profile.argmin()))
        title = (
            f"Neuron {at[0]}.{at[1]} ({self.sets()[layer, neuron]}) responds most to {most} ({profile.max():.3g}) "
            f"and least to {least} ({profile.min():.3g})"
        )
        titles: dict[str, Any] = {
            "x_title": "slot in the sentence",
            "y_title": "mean response (activation units)",
        }
        return plots.bars(pd.concat(tables), "slot", "mean", "low", "high", "condition", title=title, **titles)

    def _plot_p(self, level: str, at: tuple[int, int], other: HFTPResult | None, other_name: str) -> Figure:
        k = self._level(level)
        groups = {"experimental": self.p, f"control: {self.control}": self.control_p}
        if other is not None:
            groups[other_name] = other.p
        tables, parts = [], []
        for name, p in groups.items():
            values = p[..., k][~np.isnan(p[..., k])]
            if values.size:
                tables.append(pd.DataFrame({"p": values, "condition": name}))
                parts.append(f"{(values <= 0.05).mean():.1%} ({name})")
        title = f"p ≤ .05 at the {level} rate: {_listed(parts)} of neurons; without structure it would be 5 %, and flat"
        titles: dict[str, Any] = {"x_title": f"p-value, {self.null} null", "y_title": "share of neurons"}
        table = pd.concat(tables)
        return plots.histogram(table, "p", "condition", bins=20, span=(0.0, 1.0), level=0.05, title=title, **titles)

    def _plot_overlap(self, level: str, at: tuple[int, int], other: HFTPResult | None, other_name: str) -> Figure:
        if other is not None:
            table = self.overlap(other)
            whole = [dice(self.sets() == name, other.sets() == name) for name in dict.fromkeys(table["set"])]
            parts = [f"{name} {_number(value)}" for name, value in zip(dict.fromkeys(table["set"]), whole, strict=True)]
            title = f"Overlap of {self.corpus} and {other_name} (Dice over all layers): {_listed(parts)}"
        else:
            pairs = [(a, b) for a in range(len(self.levels)) for b in range(a)]
            rows = [
                (
                    layer,
                    f"{self.levels[b]} and {self.levels[a]}",
                    dice(self.significant[i, :, a], self.significant[i, :, b]),
                )
                for a, b in pairs
                for i, layer in enumerate(self.layers)
            ]
            table = pd.DataFrame(rows, columns=["layer", "set", "dice"])
            whole = [(a, b, dice(self.significant[..., a], self.significant[..., b])) for a, b in pairs]
            parts = [f"{self.levels[b]} and {self.levels[a]} {_number(value)}" for a, b, value in whole]
            title = f"Overlap of the neurons at two rates (Dice over all layers): {_listed(parts) or 'only one level'}"
        titles: dict[str, Any] = {"x_title": "layer", "y_title": "", "value_title": "Dice", "span": (0.0, 1.0)}
        return plots.heatmap(table, "layer", "set", "dice", title=title, **titles)

    @property
    def _subject(self) -> str:
        return str(self.provenance.subject["name"]) if self.provenance else self.corpus

    def _level(self, level: str) -> int:
        if level not in self.levels:
            raise ValueError(f"HFTP: got level {level!r}, expected one of {', '.join(self.levels)}.")
        return self.levels.index(level)

    def _strongest(self, count: int = 24) -> list[tuple[int, int]]:
        """(layer, neuron) with the largest effect over levels, among those whose spectrum was kept."""
        effect = np.where(self.significant, self.effect, self.effect - np.nanmax(np.abs(self.effect)) - 1).max(axis=2)
        candidates = self.spectrum_of
        if not len(candidates):
            candidates = np.argwhere(self.exists)
            candidates[:, 0] = np.array(self.layers)[candidates[:, 0]]
        value = np.array([effect[self._at((layer, neuron))] for layer, neuron in candidates])
        return [(int(a), int(b)) for a, b in candidates[np.argsort(-value, kind="stable")[:count]]]

    def _neuron(self, neuron: str | tuple[int, int] | None) -> tuple[int, int]:
        if neuron is None:
            return self._strongest(1)[0]
        try:
            layer, index = (int(part) for part in (neuron.split(".") if isinstance(neuron, str) else neuron))
            if not self.exists[self._at((layer, index))]:
                raise IndexError
        except (ValueError, IndexError):
            raise ValueError(
                f"plot: got neuron {neuron!r}, expected LAYER.NEURON such as {self.layers[0]}.7 with layers "
                f"{self.layers[0]} to {self.layers[-1]} and neurons 0 to {self.p.shape[1] - 1}."
            ) from None
        return layer, index

    def _at(self, neuron: tuple[int, int]) -> tuple[int, int]:
        if neuron[0] not in self.layers or neuron[1] < 0:
            raise IndexError(f"layer {neuron[0]} was not read")
        return self.layers.index(neuron[0]), int(neuron[1])


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def _number(value: float) -> str:
    return "none" if np.isnan(value) else f"{value:.2f}"
