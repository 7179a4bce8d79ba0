"""What a search for a direction found: its candidates, which were rejected and why, and their figures.

Rejected: no difference; too late a layer; KL(base || ablated) too large; adding it does not bring the target about;
or, against the accidents that a search invites, no more effect than random directions have.
Source: Arditi et al. 2024, section 2.3 and appendix C (thresholds); random directions as a criterion are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch

from workbench import plots
from workbench.directions import Direction
from workbench.methods.steering.random_control import prediction_band
from workbench.result import Result
from workbench.site import Site
from workbench.stats import bootstrap_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RANDOM = "random directions"


@dataclass(frozen=True)
class Thresholds:
    """When a candidate is rejected.

    first_late     this layer and those after it            kl_limit   nats at the last token of negative texts
    addition_min   score of negative texts with it added    beyond_random   it must also do more than random directions
    """

    first_late: int
    kl_limit: float = 0.1
    addition_min: float = 0.0
    beyond_random: bool = True

    def reasons(
        self, layer: int, ablation: float, addition: float, kl: float, random_low: float, random_high: float
    ) -> list[str]:
        """Why a candidate is rejected, each as "kind: fact"; nothing where it is accepted.

        random_low    what removing one more random direction leaves of the score at least
        random_high   what adding one gives at most
        """
        if np.isnan([ablation, addition, kl]).any():
            return ["no difference: the classes are the same here"]
        found = {
            f"too late: layers from {self.first_late} on": layer >= self.first_late,
            f"KL: {kl:.2g} > {self.kl_limit:g}": kl > self.kl_limit,
            f"no effect when added: scores {addition:.2g} < {self.addition_min:g}": addition < self.addition_min,
            "no effect when removed: within random directions": self.beyond_random and ablation >= random_low,
            "no effect when added: within random directions": self.beyond_random and addition <= random_high,
        }
        return [reason for reason, holds in found.items() if holds]


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchResult(Result):
    """Candidates over layers and positions. C candidates, R random directions, L layers.

    layer, position (C,)           where each was found; positions count from the end of the text
    vectors (C, d_model)           differences in means, at sites of `kind`
    ablation (C, positive)         score of each positive text with the direction removed everywhere
    addition, kl (C, negative)     score of each negative text with it added; KL at its last token with it removed
    random_ablation (R, positive), random_kl (R, negative), random_addition (L, R, negative)   of random directions,
                                   the last of the norm of the layer's longest candidate
    base_positive, base_negative   scores of the untouched model
    """

    layer: np.ndarray
    position: np.ndarray
    vectors: np.ndarray
    ablation: np.ndarray
    addition: np.ndarray
    kl: np.ndarray
    random_ablation: np.ndarray
    random_addition: np.ndarray
    random_kl: np.ndarray
    base_positive: np.ndarray
    base_negative: np.ndarray
    kind: str
    target: str
    unit: str
    names: tuple[str, str]
    thresholds: dict[str, Any]
    mode: str
    seed: int
    model: str | None = None
    data: str = ""
    notes: tuple[str, ...] = ()

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "kind", "position", "norm", "ablation_score", "ablation_low", "ablation_high", "ablation_random",
        "addition_score", "addition_low", "addition_high", "addition_random", "kl", "kl_low", "kl_high",
        "accepted", "reason", "mode", "seed",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per candidate; ablation_random and addition_random are the bounds that random directions set."""
        measures = {"ablation_score": self.ablation, "addition_score": self.addition, "kl": self.kl}
        columns: dict[str, Any] = {"layer": self.layer, "kind": self.kind, "position": self.position}
        columns["norm"] = np.linalg.norm(self.vectors, axis=1)
        for name, values in measures.items():
            estimate, low, high = bootstrap_interval(values.T, seed=self.seed)
            stem = name.removesuffix("_score")
            columns |= {name: estimate, f"{stem}_low": low, f"{stem}_high": high}
        table = pd.DataFrame(columns)
        low, high = self._random_bounds()
        table = table.assign(ablation_random=low, addition_random=high, mode=self.mode, seed=self.seed)
        rules = Thresholds(**self.thresholds)
        places = table[["layer", "ablation_score", "addition_score", "kl", "ablation_random", "addition_random"]]
        reasons = ["; ".join(rules.reasons(int(row[0]), *row[1:])) for row in places.to_numpy(dtype=float)]
        table = table.assign(accepted=[not reason for reason in reasons], reason=reasons)
        return table.loc[:, list(self.columns)]

    @property
    def accepted(self) -> pd.DataFrame:
        """The candidates that pass, the one that leaves least of the target first."""
        table = self.table()
        return table.query("accepted").sort_values("ablation_score", kind="stable")

    @property
    def direction(self) -> Direction:
        """The chosen direction: of the accepted candidates the one whose removal leaves least of the target."""
        chosen = self._first()
        if not chosen["accepted"]:
            raise ValueError(
                f"DirectionSearch: all {len(self.layer)} candidates were rejected: {self._objections()}. Look at the "
                "table; `leading` is the candidate that comes nearest, and `at(layer, position)` any of them."
            )
        return self.at(chosen["layer"], chosen["position"])

    @property
    def leading(self) -> Direction:
        """The chosen direction, or where none is accepted the candidate with the fewest objections."""
        first = self._first()
        return self.at(first["layer"], first["position"])

    def at(self, layer: int, position: int) -> Direction:
        """The candidate of one layer and position, as it was found (not normalised)."""
        where = np.flatnonzero((self.layer == layer) & (self.position == position))
        if not len(where):
            places = ", ".join(f"({a}, {b})" for a, b in zip(self.layer[:4], self.position[:4], strict=True))
            raise ValueError(f"at: got layer {layer}, position {position}; there are candidates at {places}, ...")
        sign = f"mean({self.names[0]}) - mean({self.names[1]})"
        site = Site(int(layer), self.kind)  # type: ignore[arg-type]
        return Direction(torch.from_numpy(self.vectors[where[0]]), site, self.model, self.names[0], sign, self.data)

    def views(self) -> dict[str, list[Any]]:
        return {"view": list(self._drawings())}

    def plot(self, view: str = "ablation") -> Figure:
        """ablation, addition, kl: of each candidate per layer, beside random directions · map: layer by position."""
        if view not in self._drawings():
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self._drawings())}.")
        return self._drawings()[view]()

    def _drawings(self) -> dict[str, Callable[[], Figure]]:
        positive, negative = self.names
        score = f"{self.target} ({self.unit})"
        return {
            "ablation": lambda: self._plot_lines(
                "ablation_score", self.random_ablation, f"{score}, {positive}", self._title(), self.base_positive
            ),
            "addition": lambda: self._plot_lines(
                "addition_score", self.random_addition, f"{score}, {negative}", self._addition_title(),
                self.base_negative,
            ),
            "kl": lambda: self._plot_lines(
                "kl", self.random_kl, f"KL at the last token, {negative} (nats)", self._kl_title()
            ),
            "map": self._plot_map,
        }  # fmt: skip

    def _plot_lines(
        self, measure: str, random: np.ndarray, y_title: str, title: str, base: np.ndarray | None = None
    ) -> Figure:
        table, stem = self.table(), measure.removesuffix("_score")
        drawn = pd.DataFrame(
            {
                "layer": table["layer"],
                "value": table[measure],
                "low": table[f"{stem}_low"],
                "high": table[f"{stem}_high"],
                "curve": [f"position {position}" for position in table["position"]],
            }
        ).dropna()
        layers = np.unique(self.layer)
        means = np.broadcast_to(random.mean(axis=-1), (len(layers), random.shape[-2]))  # (L, R)
        low, high = prediction_band(means)
        if np.isfinite(low).all():
            band = {"layer": layers, "value": means.mean(axis=1), "low": low, "high": high, "curve": RANDOM}
            drawn = pd.concat([drawn, pd.DataFrame(band)], ignore_index=True)
        if base is not None:
            flat = pd.DataFrame({"layer": layers, "value": base.mean(), "curve": "untouched model"})
            flat = flat.assign(low=flat["value"], high=flat["value"])
            drawn = pd.concat([drawn, flat], ignore_index=True)
        names: dict[str, Any] = {"x_title": f"layer ({self.kind})", "y_title": y_title}
        colors = {RANDOM: plots.GREY, "untouched model": plots.BLACK}
        return plots.lines(drawn, "layer", "value", "curve", "low", "high", title=title, colors=colors, **names)

    def _plot_map(self) -> Figure:
        table = self.table().sort_values(["position", "layer"], ascending=[False, True])
        names: dict[str, Any] = {
            "x_title": f"layer ({self.kind})", "y_title": "position from the end", "value_title": self.unit,
        }  # fmt: skip
        return plots.heatmap(table, "layer", "position", "ablation_score", title=self._title(), midpoint=0.0, **names)

    def _title(self) -> str:
        best = self._first()
        what = f"takes the {self.target} on {self.names[0]} texts from {self.base_positive.mean():.1f}"
        if not best["accepted"]:
            return f"No direction found: all {len(self.layer)} candidates are rejected: {self._objections()}"
        random = self.random_ablation.mean() if self.random_ablation.size else float("nan")
        return (
            f"Removing one direction ({best['kind']}@{best['layer']}, position {best['position']}) {what} to "
            f"{best['ablation_score']:.1f} {self.unit}; random directions leave {random:.1f}"
        )

    def _addition_title(self) -> str:
        best = self._first()
        return (
            f"Added at {best['kind']}@{best['layer']} (position {best['position']}), one direction takes the "
            f"{self.target} on {self.names[1]} texts from {self.base_negative.mean():.1f} to "
            f"{best['addition_score']:.1f} {self.unit}; random ones reach {best['addition_random']:.1f}"
        )

    def _kl_title(self) -> str:
        best = self._first()
        return (
            f"Removing the direction of {best['kind']}@{best['layer']} (position {best['position']}) moves the next "
            f"token of {self.names[1]} texts by a KL of {best['kl']:.3f} nats; allowed: {self.thresholds['kl_limit']:g}"
        )

    def _first(self) -> dict[str, Any]:
        """The chosen candidate's row, or of the rejected ones with the fewest objections the lowest score's."""
        table = self.table()
        count = np.array([len(reason.split("; ")) if reason else 0 for reason in table["reason"]], dtype=float)
        count[table["ablation_score"].isna()] = np.inf  # no difference at all
        return table.iloc[int(np.lexsort((table["ablation_score"], count))[0])].to_dict()

    def _random_bounds(self) -> tuple[float, np.ndarray]:
        """What removing one more random direction leaves at least, and what adding one gives at most, per candidate."""
        low, _ = prediction_band(self.random_ablation.mean(axis=-1))
        _, high = prediction_band(self.random_addition.mean(axis=-1))  # (L,)
        return float(low), high[np.searchsorted(np.unique(self.layer), self.layer)]

    def _objections(self) -> str:
        kinds = [{part.split(":")[0] for part in reason.split("; ")} for reason in self.table()["reason"] if reason]
        count = Counter(sorted(kind for each in kinds for kind in each))
        return ", ".join(f"{kind} ({n})" for kind, n in count.most_common())
