"""What was found to follow relations: tables of neurons, of facts and of overlaps, and their figures.

A neuron is selected for a relation where its q is small (or its rank high); it survives another template where it is
significant there with the same sign. Source: Liu et al., 2025 (arXiv 2502.17355).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.relations.facts import Prompt
from workbench.methods.relations.lesions import Lesions, in_order
from workbench.methods.relations.responses import Layout
from workbench.methods.relations.selectivity import ranks
from workbench.result import Result
from workbench.site import Site
from workbench.stats import wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LISTED = 100  # best neurons per relation that the table holds, beside those selected


@dataclass(frozen=True, eq=False, kw_only=True)
class RelationNeuronsResult(Result):
    """Which neurons follow which relation. T templates (the first was selected on), L layers, N units, R relations.

    ap, sign, p, q   (T, L, N, R) score, which end of the neuron's values gave it, and how likely by chance
    selected         (L, N, R)
    other_mean       (L, N, R) mean response to the other relations' prompts, what `by="mean"` holds a neuron at
    chance           (T, R) exact mean of a one-sided AP by chance       null   (R, n) quantiles of the score's null
    facts            relation, template, asked, prefix, exact (shares answered) and scored (prompts that were ranked)
    evaluation       (relation, subject, template, text, answer, ...) of the facts kept out of all of the above
    A unit is a column of its layer: `parts` side by side, of `widths`.
    """

    ap: np.ndarray
    sign: np.ndarray
    p: np.ndarray
    q: np.ndarray
    selected: np.ndarray
    other_mean: np.ndarray
    chance: np.ndarray
    null: np.ndarray
    facts: pd.DataFrame
    evaluation: tuple[tuple[str, ...], ...]
    relations: tuple[str, ...]
    templates: tuple[str, ...]
    layers: tuple[int, ...]
    parts: tuple[str, ...]
    widths: tuple[int, ...]
    mode: str
    two_sided: bool
    fdr: float
    seed: int
    notes: tuple[str, ...] = ()

    columns: ClassVar[tuple[str, ...]] = (
        "relation", "layer", "neuron", "part", "ap", "sign", "p", "q", "rank", "selected", "template", "seed", "mode",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per relation, neuron and template: the neurons selected, and the best 100 of each relation.

        `rank` is 1 for the best neuron of the template that selected, in every template's rows.
        """
        place = ranks(self.ap[0])
        tables = []
        for r, relation in enumerate(self.relations):
            layer, unit = np.nonzero(self.selected[..., r] | (place[..., r] < LISTED))
            order = np.argsort(place[layer, unit, r])
            layer, unit = layer[order], unit[order]
            part, neuron = self.layout.part_of(unit)
            names = {"layer": np.array(self.layers)[layer], "neuron": neuron, "part": np.array(self.parts)[part]}
            shared = {"rank": place[layer, unit, r] + 1, "selected": self.selected[layer, unit, r]}
            for t, template in enumerate(self.templates):
                values = {name: getattr(self, name)[t, layer, unit, r] for name in ("ap", "sign", "p", "q")}
                constant = {"relation": relation, "template": template, "seed": self.seed, "mode": self.mode}
                tables.append(pd.DataFrame(names | values | shared | constant))
        return pd.concat(tables, ignore_index=True).loc[:, list(self.columns)]

    @property
    def layout(self) -> Layout:
        return Layout(self.layers, self.parts, self.widths)

    def units(self, relation: str, k: int) -> dict[Site, tuple[int, ...]]:
        """The best k neurons of a relation, as `Clamp` takes them: `Clamp(result.units("father", 20))`."""
        return self.layout.units_by_site(in_order(self._best(self._relation(relation), k)))

    def lesions(self, templates: tuple[str, ...] | None = None, most: int = 50_000) -> Lesions:
        """For `Deactivation`: each relation's neurons, best first (at most `most`), and the evaluation prompts.

        templates   which of the evaluation's templates to ask; None: those of this result after the first, which
                    selected, or the first where there is no other
        """
        wanted = templates or self.templates[1:] or self.templates
        prompts = tuple(Prompt(*row[:4], answers=tuple(row[4:])) for row in self.evaluation)
        have = {prompt.template for prompt in prompts}
        if not set(wanted) <= have:
            raise ValueError(f"lesions: got templates {wanted}, expected some of {', '.join(sorted(have))}.")
        asked = tuple(p for p in prompts if p.template in wanted and p.relation in self.relations)
        most = min(most, self.ap[0, ..., 0].size)
        units = np.stack([self._best(r, most) for r in range(len(self.relations))])
        held = np.ascontiguousarray(np.moveaxis(self.other_mean, -1, 0))
        return Lesions(self.relations, units, held, self.layout, asked)

    def survival(self) -> pd.DataFrame:
        """Per relation and further template: the share of selected neurons that follow it there, with the same sign."""
        rows = []
        for t, template in enumerate(self.templates[1:], start=1):
            again = (self.q[t] <= self.fdr) & (self.sign[t] == self.sign[0])
            for r, relation in enumerate(self.relations):
                chosen = self.selected[..., r]
                count, n = int((again[..., r] & chosen).sum()), int(chosen.sum())
                low, high = wilson_interval(count, n) if n else (np.nan, np.nan)
                rows.append((relation, template, n, count / n if n else np.nan, float(low), float(high)))
        return pd.DataFrame(rows, columns=["relation", "template", "n_selected", "survive", "low", "high"])

    def overlap(self) -> pd.DataFrame:
        """Neurons that are selected for both of two relations; on the diagonal, for one."""
        flat = self.selected.reshape(-1, len(self.relations)).astype(np.int64)
        shared = flat.T @ flat
        rows = [(a, b, int(shared[i, j])) for i, a in enumerate(self.relations) for j, b in enumerate(self.relations)]
        return pd.DataFrame(rows, columns=["relation_a", "relation_b", "shared"])

    def views(self) -> dict[str, list[Any]]:
        views = ["layers", "ap", "overlap"] + (["templates"] if len(self.templates) > 1 else [])
        return {"view": views, "relation": list(self.relations)}

    def plot(self, view: str = "layers", relation: str | None = None) -> Figure:
        """layers: where the selected neurons are · ap: scores of one relation beside their null · overlap: neurons
        that two relations share · templates: which share of the selected neurons also follows another wording."""
        drawings = {
            "layers": self._plot_layers,
            "ap": self._plot_ap,
            "overlap": self._plot_overlap,
            "templates": self._plot_templates,
        }
        if view not in drawings or (view == "templates" and len(self.templates) == 1):
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")
        return drawings[view](self._relation(relation or self.relations[0]))

    def _plot_layers(self, r: int) -> Figure:
        count = self.selected.sum(axis=1)  # (layer, relation)
        rows = [
            (str(layer), relation, int(count[i, j]))
            for j, relation in enumerate(self.relations)
            for i, layer in enumerate(self.layers)
        ]
        table = pd.DataFrame(rows, columns=["layer", "relation", "neurons"])
        share = self.selected.any(axis=2).mean()
        per_relation = count.sum(axis=0)
        title = f"{self._subject}: {share:.0%} of {self.n_neurons} neurons follow some relation ({self._rule}); "
        title += f"{per_relation.min()} to {per_relation.max()} per relation"
        if per_relation.sum():
            title += f", most in layer {self.layers[int(count.sum(axis=1).argmax())]}"
        names: dict[str, Any] = {"x_title": "layer", "y_title": "", "value_title": "neurons<br>selected"}
        return _whole_numbers(plots.heatmap(table, "layer", "relation", "neurons", title=title, **names))

    def _plot_ap(self, r: int) -> Figure:
        relation, ap = self.relations[r], self.ap[0, ..., r].ravel()
        tables = [pd.DataFrame({"ap": ap, "of": "neurons"}), pd.DataFrame({"ap": self.null[r], "of": "chance"})]
        bar = np.quantile(self.null[r], 0.95)
        title = f"{self._subject}, {relation}: {(ap > bar).mean():.0%} of {self.n_neurons} neurons score above "
        title += f"{bar:.2f}, which 5 % would by chance; the best has {ap.max():.2f}"
        names: dict[str, Any] = {"x_title": f"average precision for {relation} prompts", "y_title": "share of neurons"}
        if self.two_sided:
            names["x_title"] += ", better of both ends"
        return plots.histogram(pd.concat(tables), "ap", "of", bins=40, span=(0.0, 1.0), title=title, **names)

    def _plot_overlap(self, r: int) -> Figure:
        table = self.overlap()
        pairs = table.loc[table["relation_a"] != table["relation_b"]]
        shared = pairs["shared"].to_numpy()
        title = f"{self._subject}: no two relations share a selected neuron"
        if shared.any():
            a, b = (pairs[name].to_numpy()[shared.argmax()] for name in ("relation_a", "relation_b"))
            title = f"{self._subject}: {a} and {b} share the most neurons, {shared.max()}; "
            title += f"a pair shares {shared.mean():.0f} on average"
        names: dict[str, Any] = {"x_title": "", "y_title": "", "value_title": "neurons<br>shared"}
        return _whole_numbers(plots.heatmap(table, "relation_b", "relation_a", "shared", title=title, **names))

    def _plot_templates(self, r: int) -> Figure:
        table, parts = self.survival(), []
        for template in self.templates[1:]:
            rows = table.loc[table["template"] == template]
            survive, n = rows["survive"].to_numpy(), rows["n_selected"].to_numpy()
            parts.append(f"{np.nansum(survive * n) / n.sum():.0%} ({template})" if n.any() else "none was selected")
        title = f"Neurons selected on {self.templates[0]!r} that follow their relation in other words: "
        names: dict[str, Any] = {"x_title": "", "y_title": "share of the selected neurons"}
        figure = plots.bars(
            table, "relation", "survive", "low", "high", "template", title=title + ", ".join(parts), **names
        )
        return figure.update_yaxes(tickformat=".0%", range=[0, 1.02])

    @property
    def n_neurons(self) -> int:
        return self.ap.shape[1] * self.ap.shape[2]

    @property
    def _subject(self) -> str:
        return str(self.provenance.subject["name"]) if self.provenance else "simulated"

    @property
    def _rule(self) -> str:
        return f"q ≤ {self.fdr:g}" if self.mode == "corrected" else "top k"

    def _relation(self, relation: str) -> int:
        if relation not in self.relations:
            raise ValueError(
                f"RelationNeurons: got relation {relation!r}, expected one of {', '.join(self.relations)}."
            )
        return self.relations.index(relation)

    def _best(self, r: int, k: int) -> np.ndarray:
        """(k, 2: layer index, column) best first."""
        n_units = self.ap.shape[2]
        if not 1 <= k <= self.n_neurons:
            raise ValueError(f"RelationNeurons: got k={k}, expected 1 to {self.n_neurons} neurons.")
        order = np.argsort(-self.ap[0, ..., r].ravel(), kind="stable")[:k]
        return np.stack([order // n_units, order % n_units], axis=1)


def _whole_numbers(figure: Figure) -> Figure:
    return figure.update_traces(texttemplate="%{z:.0f}")
