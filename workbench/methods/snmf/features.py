"""What a factorisation found: features as values that steer, their tables and their figures.

share_of_energy_k = |f_k|^2 |g_k|^2 / |A|^2; stability_k = mean over the other starts of the cosine with the partner of
f_k there. A fit of low loss is no evidence that a feature is real: its stability and its controls are.
Source: Shafran, Geiger and Geva, 2025 (arXiv 2506.10920); stability and controls are this project's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch

from workbench import plots
from workbench.directions import Direction
from workbench.methods.snmf import causal
from workbench.methods.snmf.concepts import FACTORS, SHUFFLED
from workbench.result import Result
from workbench.site import Site

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

UNSTABLE = 0.5  # a feature with a lower stability is another one in most starts
CEILING = "most that any push could reach"


@dataclass(frozen=True, eq=False)
class Feature:
    """One pattern over the neurons of a layer: `vector` (m,) as found, `label` the concept it tells best, or ""."""

    index: int
    vector: np.ndarray
    layer: int
    model: str | None
    label: str = ""

    def direction(self) -> Direction:
        """Norm 1 at the layer's neurons, bound to the model: for Steer, with a strength in units of activations."""
        name = f"feature {self.index}" + (f" ({self.label})" if self.label else "")
        vector = torch.from_numpy(self.vector.copy())
        return Direction(vector, Site(self.layer, "neurons"), self.model, name).unit()


@dataclass(frozen=True, eq=False, kw_only=True)
class SNMFResult(Result):
    """m neurons, n tokens, K features, R starts. Only the tokens that were factorised are in the arrays.

    features      (m, K) signed, sparse columns; the scale is in them          weights   (n, K) >= 0, columns of norm 1
    loss          (R, iteration) |A - G F^T|^2 / |A|^2, NaN after the end        seconds   (R,) of each start
    best          the start with the smallest loss: the one whose features these are
    stability     (K,) NaN with one start       share_of_energy  (K,)
    token_ids, positions, text   (n,) of the tokens, text as index into the data
    labels        (K,) the concept that each feature tells best, chosen where it was made; "" without labels
    tokens, vocabulary           tables of the feature cards
    detection     AUC per method and concept    own_auc    AUC per feature for its label, on texts it never saw
    overlap       cosine of every feature with the difference in means of every concept
    steering      one row per method, concept, sign and target KL                tree       parents of features
    model         fingerprint of the subject, None for simulated activations
    """

    features: np.ndarray
    weights: np.ndarray
    loss: np.ndarray
    seconds: np.ndarray
    best: int
    stability: np.ndarray
    share_of_energy: np.ndarray
    token_ids: np.ndarray
    positions: np.ndarray
    text: np.ndarray
    labels: tuple[str, ...]
    tokens: pd.DataFrame
    vocabulary: pd.DataFrame
    detection: pd.DataFrame
    own_auc: pd.DataFrame
    overlap: pd.DataFrame
    steering: pd.DataFrame
    tree: pd.DataFrame
    layer: int = 0
    model: str | None = None
    mode: str = "corrected"
    update: str = "hals"
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        *("layer", "feature", "n_neurons", "share_of_energy", "stability"),
        *("label", "auc", "low", "high", "restart", "seed", "mode"),
    )
    clocks: ClassVar[tuple[str, ...]] = ("seconds",)

    @property
    def n_features(self) -> int:
        return self.features.shape[1]

    @property
    def explained(self) -> float:
        """Share of |A|^2 that the factors explain."""
        return 1 - float(np.nanmin(self.loss[self.best]))

    def feature(self, which: int | str) -> Feature:
        """A feature by its number, or the one chosen for a concept."""
        index = self._index(which)
        return Feature(index, self.features[:, index], self.layer, self.model, self.labels[index])

    def table(self) -> pd.DataFrame:
        """One row per feature; auc with its 95 % interval is for `label`, on texts that the feature never saw."""
        none = {name: np.full(self.n_features, np.nan) for name in ("auc", "low", "high")}
        auc = {name: self.own_auc[name].to_numpy() for name in none} if len(self.own_auc) else none
        columns = {
            "layer": self.layer,
            "feature": np.arange(self.n_features),
            "n_neurons": (self.features != 0).sum(axis=0),
            "share_of_energy": self.share_of_energy,
            "stability": self.stability,
            "label": list(self.labels),
            **auc,
            "restart": self.best,
            "seed": self.seed,
            "mode": self.mode,
        }
        return pd.DataFrame(columns).loc[:, list(self.columns)]

    def chosen(self, concept: str) -> int:
        """The feature that was chosen for a concept, on texts that its AUC is not measured on."""
        rows: Any = self.detection[(self.detection["method"] == FACTORS) & (self.detection["concept"] == concept)]
        if rows.empty:
            known = ", ".join(dict.fromkeys(self.detection["concept"])) or "none: the texts had no labels"
            raise ValueError(f"SNMF: got concept {concept!r}, expected one of {known}.")
        return int(rows["direction"].iloc[0])

    def causal_summary(self) -> pd.DataFrame:
        """Mean mass on the concept's words per method, sign and target KL, with its interval over concepts."""
        return causal.summary(self.steering, self.seed)

    def views(self) -> dict[str, list[Any]]:
        order = np.argsort(-np.nan_to_num(self.share_of_energy), kind="stable")
        return {"view": list(self._drawings()), "feature": [int(k) for k in order]}

    def plot(
        self, view: str | None = None, feature: int | str | None = None, other: SNMFResult | None = None
    ) -> Figure:
        """concepts: AUC per concept against baselines · effect: concept mass against KL · features: energy, stability
        card: tokens that use `feature`, in context · words: what it writes · loss: curves of all starts · tree

        feature   a number or a concept; None: the first of `views`
        other     a second result whose loss curves are added, such as that of the multiplicative update
        """
        drawings = self._drawings()
        view = view or next(iter(drawings))
        if view not in drawings:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(drawings)}.")
        index = self.views()["feature"][0] if feature is None else self._index(feature)
        return drawings[view](index, other)

    def _drawings(self) -> dict[str, Callable[[int, SNMFResult | None], Figure]]:
        """The views that this result can draw, the finding first."""
        every = {
            "concepts": (self._plot_concepts, self.detection),
            "effect": (self._plot_effect, self.steering),
            "features": (self._plot_features, self.features),
            "card": (self._plot_card, self.tokens),
            "words": (self._plot_words, self.vocabulary),
            "loss": (self._plot_loss, self.loss),
            "tree": (self._plot_tree, self.tree),
        }
        return {name: draw for name, (draw, needed) in every.items() if len(needed)}

    def _plot_concepts(self, index: int, other: SNMFResult | None) -> Figure:
        mean = {name: float(np.mean(rows["auc"])) for name, rows in self.detection.groupby("method", sort=False)}
        rest = ", ".join(f"{name} {mean[name]:.2f}" for name in mean if name not in (FACTORS, SHUFFLED))
        title = (
            f"{self._subject}: one SNMF feature per concept tells unseen texts apart with a mean AUC "
            f"of {mean[FACTORS]:.2f}; {rest}; shuffled labels {mean[SHUFFLED]:.2f}"
        )
        names: dict[str, Any] = {"x_title": "concept", "y_title": "AUC on unseen texts (chance .5)"}
        figure = plots.scatter(self.detection, "concept", "auc", "method", "low", "high", title=title, **names)
        return figure.update_layout(scattermode="group").update_yaxes(range=[0.0, 1.05])

    def _plot_effect(self, index: int, other: SNMFResult | None) -> Figure:
        table: Any = self.causal_summary()
        if table.empty:
            raise ValueError("plot: no push reached its target KL, so there is nothing to compare at equal KL.")
        sign = int(table["sign"].max())
        drawn = table[table["sign"] == sign]
        last = drawn[drawn["target_kl"] == drawn["target_kl"].max()].set_index("method")
        parts = ", ".join(f"{name} {row['mass']:.2f}" for name, row in last.iterrows())
        ceiling = drawn.groupby("target_kl", as_index=False)[["kl", "bound"]].mean().rename(columns={"bound": "mass"})
        extra = ceiling.assign(method=CEILING)
        title = (
            f"{self._subject}: pushed by {last['kl'].mean():.2g} nats, the concept's words go from "
            f"{last['base'].mean():.2f} to: {parts}; no push of that size can exceed {last['bound'].mean():.2f}"
        )
        columns = ["method", "kl", "mass", "low", "high"]
        extra = extra.assign(low=extra["mass"], high=extra["mass"])
        moved = pd.concat([drawn[columns], extra[columns]], ignore_index=True)
        base = float(drawn["base"].mean())
        start = moved.drop_duplicates("method").assign(kl=0.0, mass=base, low=base, high=base)
        rows = pd.concat([start, moved], ignore_index=True)
        names: dict[str, Any] = {
            "x_title": "KL from the plain model (nats)",
            "y_title": "probability of the concept's words",
        }
        figure = plots.lines(rows, "kl", "mass", "method", "low", "high", title=title, **names)
        return figure.update_yaxes(rangemode="tozero")

    def _plot_features(self, index: int, other: SNMFResult | None) -> Figure:
        table = self.table().assign(kind="feature")
        known = ~np.isnan(self.stability)
        stable = f"{int((self.stability[known] >= UNSTABLE).sum())} of {self.n_features} come back in most starts"
        title = f"{self._subject}: {self.n_features} features explain {self.explained:.0%} of the activations; "
        title += f"{stable} (mean stability {self.stability[known].mean():.2f})" if known.any() else "one start only"
        drawn = table if known.any() else table.assign(stability=0.0)
        names: dict[str, Any] = {"x_title": "share of energy", "y_title": "stability (cosine between starts)"}
        figure = plots.scatter(drawn, "share_of_energy", "stability", title=title, text="feature", **names)
        return figure.update_yaxes(range=[min(0.0, float(np.min(drawn["stability"]))), 1.1])

    def _plot_card(self, index: int, other: SNMFResult | None) -> Figure:
        some: Any = self.tokens[self.tokens["feature"] == index]
        rows = [
            (f"{row['weight']:.3f}", ((row["before"], None), (row["token"], plots.VERMILLION), (row["after"], None)))
            for row in some.to_dict("records")
        ]
        words = ", ".join(dict.fromkeys(token.strip() for token in some["token"])) or "no token"
        return plots.passages(rows, title=f"{self._named(index)}; it fires most on {words}{self._writes(index)}")

    def _plot_words(self, index: int, other: SNMFResult | None) -> Figure:
        some = self.vocabulary[self.vocabulary["feature"] == index]
        side = np.where(some["sign"] == 1, "written", "taken back")
        drawn = some.assign(side=side, signed=some["score"] * some["sign"])
        title = f"{self._named(index)}{self._writes(index) or ' has no words'}"
        names: dict[str, Any] = {
            "x_title": "token (logits before the final norm's scale)",
            "y_title": "logits per unit of feature",
        }
        return plots.bars(drawn, "token", "signed", color="side", title=title, **names)

    def _plot_loss(self, index: int, other: SNMFResult | None) -> Figure:
        tables = []
        for result in filter(None, (self, other)):
            for start, curve in enumerate(result.loss):
                curve = curve[~np.isnan(curve)]
                rows = {"iteration": np.arange(1, len(curve) + 1), "loss": curve}
                tables.append(pd.DataFrame(rows).assign(curve=f"{result.update}, start {start}"))
        spread = ", ".join(f"{np.nanmin(curve):.3f}" for curve in self.loss)
        title = f"{self._subject}: loss of each start with the {self.update} update: {spread}"
        if other is not None:
            title += f"; with {other.update}: " + ", ".join(f"{np.nanmin(curve):.3f}" for curve in other.loss)
        shades = {self.update: plots.BLUE, (other or self).update: plots.VERMILLION if other else plots.BLUE}
        colors = {table["curve"].iloc[0]: shades[table["curve"].iloc[0].split(",")[0]] for table in tables}
        names: dict[str, Any] = {"x_title": "iteration", "y_title": "unexplained share of |A|²"}
        table = pd.concat(tables)
        return plots.lines(
            table, "iteration", "loss", "curve", title=title, colors=colors, markers=False, log_y=True, **names
        )

    def _plot_tree(self, index: int, other: SNMFResult | None) -> Figure:
        nodes: Any
        nodes, top = _placed(self.tree)
        top_levels = list(range(1, len(top) + 1))
        text = [str(k) if level else "" for level, k in zip(nodes["level"], nodes["feature"], strict=True)]
        shares = self.tree.drop_duplicates("level").set_index("level")["explained"]
        steps = ", ".join(f"{count} explain {share:.0%}" for count, share in zip(top, shares, strict=True))
        title = f"{self._subject}: {self.n_features} features explain {self.explained:.0%} of the activations; {steps}"
        drawn = nodes.assign(
            name=text, kind=["feature" if level == 0 else f"level {level}" for level in nodes["level"]]
        )
        figure = plots.scatter(drawn, "x", "level", "kind", text="name", title=title, x_title="", y_title="level")
        place = {(level, k): x for level, k, x in nodes.to_numpy().tolist()}
        edges: Any = self.tree[self.tree["parent"] >= 0]
        for level, child, parent in edges[["level", "feature", "parent"]].to_numpy().tolist():
            ends = {"x0": place[level - 1, child], "x1": place[level, parent]}
            line = {"color": plots.GREY, "width": 1}
            figure.add_shape(type="line", y0=level - 1, y1=level, line=line, layer="below", **ends)
        for _, k, x in nodes[nodes["level"] == 0].to_numpy().tolist():
            name = f"{k:.0f} {self.labels[int(k)]}".strip()
            style = {"yanchor": "top", "yshift": -8, "textangle": -90, "showarrow": False}
            figure.add_annotation(x=x, y=0, text=name, font={"size": 10}, **style)
        return figure.update_xaxes(visible=False).update_yaxes(
            tickvals=[0, *top_levels], range=[-1.0, nodes["level"].max() + 0.4]
        )

    def _named(self, index: int) -> str:
        label = f" ({self.labels[index]})" if self.labels[index] else ""
        return f"{self._subject}: feature {index}{label}, stability {self.stability[index]:.2f}"

    def _writes(self, index: int) -> str:
        """Its words of both signs, or "" for simulated activations."""
        some = self.vocabulary[(self.vocabulary["feature"] == index) & (self.vocabulary["rank"] < 5)]
        parts = [", ".join(token.strip() for token in some[some["sign"] == sign]["token"]) for sign in (1, -1)]
        return f"; it writes {parts[0]} and takes back {parts[1]}" if len(some) else ""

    def _index(self, which: int | str) -> int:
        if isinstance(which, str):
            return self.chosen(which)
        if not 0 <= which < self.n_features:
            raise ValueError(f"SNMF: got feature {which}, expected 0 to {self.n_features - 1}, or a concept.")
        return int(which)

    @property
    def _subject(self) -> str:
        return f"{self.provenance.subject['name']}, layer {self.layer}" if self.provenance else "simulated neurons"


def _placed(tree: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
    """Nodes (level, feature, x) so that children stand side by side under their parent, and the number of parents.

    Children without a parent stand at the right end.
    """
    levels = sorted({int(level) for level in tree["level"]})
    parent_of = {
        level: dict(zip(rows["feature"].tolist(), rows["parent"].tolist(), strict=True))
        for level, rows in tree.groupby("level")
    }
    counts = [int(np.max(tree[tree["level"] == level]["n_parents"])) for level in levels]
    nodes, order = [], list(range(counts[-1]))
    for level in reversed(levels):
        ranks = {parent: rank for rank, parent in enumerate(order)} | {-1: len(order)}
        nodes += [(level, parent) for parent in order]
        order = sorted(parent_of[level], key=lambda child: (ranks[parent_of[level][child]], child))
    x = {(0, child): float(place) for place, child in enumerate(order)}
    for level in levels:
        for parent in (k for at, k in nodes if at == level):
            below = [x[level - 1, child] for child, of in parent_of[level].items() if of == parent]
            x[level, parent] = float(np.mean(below)) if below else float(len(order))  # a parent of nobody: far right
    return pd.DataFrame([(*node, place) for node, place in x.items()], columns=["level", "feature", "x"]), counts
