"""What switching units off did: accuracies with intervals, drops, cumulativity, interference, and their figures.

Each prompt is asked under every condition; a curve's interval is Wilson's over distinct prompts, never over conditions.
Source: Liu et al., 2025 (arXiv 2502.17355), sections 4 and 5; intervals after Wilson, 1927.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.result import Result
from workbench.stats import wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ALL, MICRO = "all", "all, micro"
OWN, OTHERS = "own relation", "other relations"
RANDOM, RANDOM_OTHERS = "own, random neurons off", "others, random neurons off"


@dataclass(frozen=True, eq=False, kw_only=True)
class DeactivationResult(Result):
    """What was answered with units off. Q prompts, C conditions, R relations.

    base (Q,), correct (C, Q)   answered with everything on, and under each condition
    relation, template (Q,)     index of each prompt's relation and template
    off, k, draw (C,)           relation whose units were off, how many, and -1 or the number of a random set
    total, affected (R, pair of neighbouring sizes)   counts behind `cumulativity`
    """

    base: np.ndarray
    correct: np.ndarray
    relation: np.ndarray
    template: np.ndarray
    off: np.ndarray
    k: np.ndarray
    draw: np.ndarray
    total: np.ndarray
    affected: np.ndarray
    relations: tuple[str, ...]
    templates: tuple[str, ...]
    sizes: tuple[int, ...]
    by: str
    rule: str
    seed: int

    columns: ClassVar[tuple[str, ...]] = (
        "evaluated", "switched_off", "k", "control", "template", "accuracy", "low", "high", "drop", "n", "seed",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per relation asked, template and condition; switched_off "none" and k 0: everything on.

        control   "none" for the ranked units, else "random 0", "random 1", ...
        drop      (accuracy with everything on - accuracy) / accuracy with everything on; NaN where that is 0
        """
        rows = []
        for i, evaluated in enumerate(self.relations):
            for t, template in enumerate(self.templates):
                here = (self.relation == i) & (self.template == t)
                if not here.any():
                    continue
                base = self.base[here].mean()
                rows.append((evaluated, "none", 0, "none", template, base, self.base[here].sum(), here.sum(), base))
                for c, right in enumerate(self.correct[:, here]):
                    control = "none" if self.draw[c] < 0 else f"random {self.draw[c]}"
                    where = (evaluated, self.relations[self.off[c]], int(self.k[c]), control, template)
                    rows.append((*where, right.mean(), right.sum(), here.sum(), base))
        names = ["evaluated", "switched_off", "k", "control", "template", "accuracy", "right", "n", "base"]
        table = pd.DataFrame(rows, columns=names).astype({"n": int})
        low, high = wilson_interval(table["right"].to_numpy(), table["n"].to_numpy())
        drop = (1 - table["accuracy"] / table["base"].where(table["base"] > 0)) + 0.0
        return table.assign(low=low, high=high, drop=drop, seed=self.seed).loc[:, list(self.columns)]

    def drops(self, k: int | None = None, template: str | None = None) -> pd.DataFrame:
        """The rows of `table` for one size and template, ranked units only: a drop for each pair of relations."""
        table = self.table()
        chosen = (table["k"] == self._size(k)) & (table["control"] == "none")
        return table.loc[chosen & (table["template"] == self._template(template))].reset_index(drop=True)

    def interference(self, k: int | None = None, template: str | None = None) -> pd.DataFrame:
        """Pairs in which switching one relation's units off HELPS another: negative drops, the largest gain first."""
        table = self.drops(k, template)
        helped = (table["drop"] < 0) & (table["evaluated"] != table["switched_off"])
        return table.loc[helped].sort_values(by="drop", ignore_index=True)

    def cumulativity(self) -> pd.DataFrame:
        """1 - affected / total between neighbouring sizes, per relation, and over all prompts ("all, micro").

        Near 1: what the larger set breaks, the added units alone don't, so units add up. Near 0: the added ones did it.
        The mean of the column over relations is the paper's macro average; NaN where nothing was lost.
        """
        rows = []
        for n, (smaller, larger) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            counts = [*zip(self.relations, self.total[:, n], self.affected[:, n], strict=True)]
            counts.append((MICRO, self.total[:, n].sum(), self.affected[:, n].sum()))
            for name, total, affected in counts:
                value = 1 - affected / total if total else np.nan
                rows.append((name, smaller, larger, int(total), int(affected), value))
        return pd.DataFrame(rows, columns=["relation", "smaller", "larger", "total", "affected", "value"])

    def curves(self, relation: str = ALL, template: str | None = None) -> pd.DataFrame:
        """Accuracy against k: of the relation whose units are off, of the others, and of both with random units off.

        Each prompt counts once, with its mean over conditions; the interval is Wilson's over prompts.
        """
        rows = []
        asked = self.template == self.templates.index(self._template(template))
        for k in (0, *self.sizes):
            for curve in (OWN, OTHERS, RANDOM, RANDOM_OTHERS):
                values = self._per_prompt(relation, curve, k)[asked]
                values = values[~np.isnan(values)]
                if len(values):
                    low, high = wilson_interval(min(values.sum(), len(values)), len(values))
                    rows.append((curve, k, values.mean(), float(low), float(high), len(values)))
        return pd.DataFrame(rows, columns=["curve", "k", "accuracy", "low", "high", "n"])

    def views(self) -> dict[str, list[Any]]:
        return {
            "view": ["drops", "sizes"] + (["cumulativity"] if len(self.sizes) > 1 else []),
            "k": sorted(self.sizes, key=lambda k: k != self._size(None)),
            "relation": [ALL, *self.relations],
            "template": list(self.templates),
        }

    def plot(
        self, view: str = "drops", k: int | None = None, relation: str = ALL, template: str | None = None
    ) -> Figure:
        """drops: relation by relation, rows asked, columns switched off · sizes: accuracy against the number of units,
        own, others and random · cumulativity: do the units of neighbouring sizes add up?

        k   None: the size at which own and other relations differ most
        """
        if view not in self.views()["view"]:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")
        if view == "drops":
            return self._plot_drops(self._size(k), self._template(template))
        return self._plot_sizes(relation, self._template(template)) if view == "sizes" else self._plot_cumulativity()

    def _plot_drops(self, k: int, template: str) -> Figure:
        title = f"With a relation's top {k} neurons off, {self._contrast(ALL, k, template)}"
        names: dict[str, Any] = {"x_title": "relation switched off", "y_title": f"relation asked ({template})"}
        scale: dict[str, Any] = {"midpoint": 0.0, "span": (-1.0, 1.0), "value_title": "share of<br>accuracy<br>lost"}
        return plots.heatmap(
            self.drops(k, template), "switched_off", "evaluated", "drop", title=title, **names, **scale
        )

    def _plot_sizes(self, relation: str, template: str) -> Figure:
        table, k = self.curves(relation, template), self._size(None)
        of = "a relation's" if relation == ALL else f"{relation}'s"
        title = f"With {of} top {k} neurons off, {self._contrast(relation, k, template)}"
        sizes = (0, *self.sizes)  # evenly spaced: a logarithmic axis has no place for 0
        table = table.loc[table["curve"] != RANDOM_OTHERS]
        table = table.assign(place=[sizes.index(k) for k in table["k"]])
        names: dict[str, Any] = {"x_title": "neurons switched off", "y_title": f"accuracy ({template})"}
        figure = plots.lines(table, "place", "accuracy", "curve", "low", "high", title=title, **names)
        figure.update_xaxes(tickvals=list(range(len(sizes))), ticktext=[str(k) for k in sizes])
        return figure.update_yaxes(tickformat=".0%", range=[-0.02, 1.03])

    def _plot_cumulativity(self) -> Figure:
        table = self.cumulativity()
        table = table.loc[table["total"] > 0]
        steps = [f"{a} to {b}" for a, b in zip(table["smaller"], table["larger"], strict=True)]
        low, high = wilson_interval((table["total"] - table["affected"]).to_numpy(), table["total"].to_numpy())
        table = table.assign(step=steps, low=low, high=high)
        pooled = table.loc[table["relation"] == MICRO]
        parts = [f"{value:.0%} ({step})" for value, step in zip(pooled["value"], pooled["step"], strict=True)]
        title = f"{self._subject}: of the prompts that a larger set breaks, the added neurons alone leave unharmed "
        title += ", ".join(parts) if parts else "none: no prompt was lost at any size"
        names: dict[str, Any] = {"x_title": "", "y_title": "cumulativity (share of lost prompts)"}
        figure = plots.bars(table, "relation", "value", "low", "high", "step", title=title, **names)
        figure.update_xaxes(categoryorder="array", categoryarray=[*self.relations, MICRO])
        return figure.update_yaxes(tickformat=".0%", range=[0, 1.02])

    def _contrast(self, relation: str, k: int, template: str) -> str:
        """The finding at one size, in words: own, others, random."""
        table = self.curves(relation, template)
        accuracy = dict(zip(zip(table["curve"], table["k"], strict=True), table["accuracy"], strict=True))
        if accuracy[OWN, 0] == 0:
            return f"nothing that could be seen changes: {self._subject} answers none of these prompts"
        text = f"{self._subject}'s accuracy on it goes from {accuracy[OWN, 0]:.0%} to {accuracy[OWN, k]:.0%}"
        text += f", on the others from {accuracy[OTHERS, 0]:.0%} to {accuracy[OTHERS, k]:.0%}"
        return text + (f"; with as many random ones off, to {accuracy[RANDOM, k]:.0%}" if self._has_random else "")

    def _per_prompt(self, relation: str, curve: str, k: int) -> np.ndarray:
        """(Q,) mean over the curve's conditions of size k of whether a prompt was answered; NaN where none asks it."""
        offs = range(len(self.relations)) if relation == ALL else [self._index(relation)]
        right, count = np.zeros(len(self.base)), np.zeros(len(self.base))
        own_curve, at_random = curve in (OWN, RANDOM), curve in (RANDOM, RANDOM_OTHERS)
        for r in offs:
            counts = (self.relation == r) == own_curve
            chosen = (self.off == r) & (self.k == k) & ((self.draw >= 0) == at_random)
            values = self.correct[chosen] if k else self.base[None]
            right += counts * values.sum(axis=0)
            count += counts * len(values)
        return np.divide(right, count, out=np.full_like(right, np.nan), where=count > 0)

    @property
    def _has_random(self) -> bool:
        return bool((self.draw >= 0).any())

    @property
    def _subject(self) -> str:
        return str(self.provenance.subject["name"]) if self.provenance else "the network"

    def _size(self, k: int | None) -> int:
        """The size asked for, or the one at which own and others differ most."""
        if k is None:
            gap = [
                np.nanmean(self._per_prompt(ALL, OTHERS, s)) - np.nanmean(self._per_prompt(ALL, OWN, s))
                for s in self.sizes
            ]
            return self.sizes[int(np.argmax(gap))]
        if k not in self.sizes:
            raise ValueError(f"Deactivation: got k={k}, expected one of {', '.join(map(str, self.sizes))}.")
        return k

    def _template(self, template: str | None) -> str:
        if template is not None and template not in self.templates:
            raise ValueError(f"Deactivation: got template {template!r}, expected one of {', '.join(self.templates)}.")
        return template or self.templates[0]

    def _index(self, relation: str) -> int:
        if relation not in self.relations:
            raise ValueError(
                f"Deactivation: got relation {relation!r}, expected all or one of {', '.join(self.relations)}."
            )
        return self.relations.index(relation)
