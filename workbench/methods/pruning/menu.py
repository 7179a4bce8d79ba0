"""One alternative per layer under budgets: a menu of narrower and absent parts, each with its damage and its costs.

minimise sum_l q(l, a_l)   subject to   sum_l c_k(l, a_l) <= budget_k for each cost k,  one a_l per layer
solved exactly as an integer program. Source: Puzzle, Bercovich et al., 2024 (arXiv 2411.19146), section 3, without
its training; damages of single swaps are added, which is a model of the whole and is measured beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp

from workbench import plots
from workbench.pruned.plan import LayerPlan, Plan, Shape
from workbench.result import Result
from workbench.stats import bootstrap_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FULL, DROPPED = "whole", "no block"
COSTS = ("weight_bytes", "kv_bytes_per_token", "prefill_ms", "decode_ms")
WAYS = ("knapsack", "uniform", "random")


@dataclass(frozen=True)
class Choice:
    """What was chosen for every layer.

    picks      index of the alternative of each layer
    predicted  sum of the damages of the single swaps, nats per token
    costs      of the whole choice, by name
    """

    picks: tuple[int, ...]
    predicted: float
    costs: Mapping[str, float]


def choose(
    damage: np.ndarray,
    costs: Mapping[str, np.ndarray],
    budgets: Mapping[str, float],
    *,
    needed: np.ndarray | None = None,
) -> Choice:
    """The least damage within all budgets.

    damage   (layer, alternative); NaN where a layer lacks an alternative      costs    each (layer, alternative)
    budgets  the most that the sum of a cost may be
    needed   (layer, alternative) at least one of these must be chosen, somewhere
    Raises ValueError where no choice fits, with the least that could be.
    """
    if not budgets or set(budgets) - set(costs):
        raise ValueError(f"choose: got budgets for {sorted(budgets)}, expected some of {', '.join(costs)}.")
    there = np.isfinite(damage)
    n_layers, n_choices = damage.shape
    one_each = np.kron(np.eye(n_layers), np.ones(n_choices))
    limits: list[Any] = [LinearConstraint(one_each, 1, 1)]
    for name, budget in budgets.items():
        cost = np.where(there, costs[name], 0.0)
        least = float(np.where(there, costs[name], np.inf).min(axis=1).sum())
        scale = max(float(np.abs(cost).max()), np.finfo(float).tiny)  # bytes and milliseconds alike
        if not budget >= least - 1e-9 * scale:
            raise ValueError(f"choose: got a budget of {budget:g} {name}, but no choice takes less than {least:g}.")
        limits.append(LinearConstraint(cost.reshape(1, -1) / scale, -np.inf, budget / scale * (1 + 1e-12) + 1e-12))
    if needed is not None:
        limits.append(LinearConstraint(needed.reshape(1, -1).astype(float), 1, np.inf))
    objective = np.where(there, damage, 0.0).ravel()
    objective = 1e4 * (objective / (np.abs(objective).max() or 1.0))  # a solver stops within 1e-6 of the best
    bounds: Any = Bounds(np.zeros(damage.size), there.ravel().astype(float))  # type: ignore[arg-type]
    exact = {"mip_rel_gap": 0.0}  # else within a share of 1e-4 of it
    found = milp(objective, constraints=limits, integrality=np.ones(damage.size), bounds=bounds, options=exact)
    if found.x is None:
        raise ValueError(f"choose: no choice keeps all budgets {dict(budgets)} at once. Loosen one.")
    picks = tuple(int(pick) for pick in np.asarray(found.x).reshape(n_layers, n_choices).argmax(axis=1))
    return chosen(picks, damage, costs)


def chosen(picks: Sequence[int], damage: np.ndarray, costs: Mapping[str, np.ndarray]) -> Choice:
    """A choice with its sums."""
    rows = np.arange(len(picks))
    told = {name: float(cost[rows, list(picks)].sum()) for name, cost in costs.items()}
    return Choice(tuple(picks), float(damage[rows, list(picks)].sum()), told)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerMenuResult(Result):
    """The menu of every layer, what was chosen at each budget, and what that really did.

    damage        (layer, alternative, text) KL to the untouched model with that swap alone, nats per token
    held          (2, layer, alternative) bytes of the layer's weights, and of one token in its cache
    times_ms      (2, layer, alternative, repeat) of the layer for the prompt, and for a token after it
    types         of each layer: layers of one type take the same time
    needed        (layer, alternative) one such must be left, as the cache needs a layer that attends
    kept          (alternative,) neurons kept, the best ones by the criterion
    order         (layer, neuron) neurons from the best down
    budgets       shares of the whole model's cost `by`
    picks         (budget, way, draw, layer) what each of WAYS chose; only random has several draws
    measured      (budget, way, draw, text) KL of the assembled plans
    n_tokens      (text,) weights of the means over texts
    """

    damage: np.ndarray
    held: np.ndarray
    times_ms: np.ndarray
    types: tuple[str, ...]
    needed: np.ndarray
    kept: np.ndarray
    order: np.ndarray
    budgets: tuple[float, ...]
    by: str
    picks: np.ndarray
    measured: np.ndarray
    n_tokens: np.ndarray
    alternatives: tuple[str, ...]
    shape: tuple[int | None, ...]
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "alternative", "damage", "low", "high", *COSTS, "chosen_at", "seed",
    )  # fmt: skip
    clocks: ClassVar[tuple[str, ...]] = ("times_ms",)

    @functools.cached_property
    def mean_damage(self) -> np.ndarray:
        """(layer, alternative) over texts, each with its tokens."""
        return np.average(self.damage, axis=2, weights=self.n_tokens)

    @functools.cached_property
    def cost(self) -> dict[str, np.ndarray]:
        """(layer, alternative) by name, in the order COSTS; times are medians over repeats and layers of one type."""
        times = np.empty(self.times_ms.shape[:3])
        for layer, kind in enumerate(self.types):
            same = [other for other, one in enumerate(self.types) if one == kind]
            times[:, layer] = np.median(self.times_ms[:, same], axis=(1, 3))
        return dict(zip(COSTS, (*self.held, *times), strict=True))

    def choose(self, **shares: float) -> Choice:
        """The least predicted damage within shares of the whole model's costs: `choose(weight_bytes=.7, decode_ms=.8)`.

        Raises ValueError where none fits.
        """
        whole = {name: float(cost[:, 0].sum()) for name, cost in self.cost.items()}
        unknown = set(shares) - set(COSTS)
        if unknown:
            raise ValueError(f"choose: got {sorted(unknown)[0]!r}, expected some of {', '.join(COSTS)}.")
        budgets = {name: share * whole[name] for name, share in shares.items()}
        return choose(self.mean_damage, self.cost, budgets, needed=self.needed)

    def plan(self, **shares: float) -> Plan:
        """The plan of `choose`."""
        return self.plan_of(self.choose(**shares).picks, **shares)

    def plan_of(self, picks: Sequence[int], **origin: Any) -> Plan:
        """The plan in which each layer has the alternative picked."""
        shape: Any = self.shape
        layers, dropped = {}, []
        for layer, pick in enumerate(picks):
            name = self.alternatives[pick]
            if name == DROPPED:
                dropped.append(layer)
            layers[layer] = layer_plan(name, self.order[layer], int(self.kept[pick]))
        return Plan(Shape(*shape), tuple(layers.items()), tuple(dropped), tuple(origin.items()))

    def table(self) -> pd.DataFrame:
        """One row per layer and alternative: its damage alone with a 95 % interval over texts (nats per token), what
        the layer then costs, and the budgets (shares of `by`) at which the knapsack chose it."""
        rows = []
        for layer in range(len(self.damage)):
            for index, name in enumerate(self.alternatives):
                if not np.isfinite(self.damage[layer, index]).all():
                    continue
                value, low, high = _interval(self.damage[layer, index], self.n_tokens, self.seed)
                at = [
                    f"{b:g}"
                    for b, picks in zip(self.budgets, self.picks[:, 0, 0], strict=True)
                    if picks[layer] == index
                ]
                costs = (float(self.cost[one][layer, index]) for one in COSTS)
                rows.append((layer, name, value, low, high, *costs, ", ".join(at), self.seed))
        return pd.DataFrame(rows, columns=list(self.columns))

    def frontier(self) -> pd.DataFrame:
        """One row per budget and way: budget, way, predicted and measured damage with a 95 % interval, and the share
        of `by` that it really takes. Random draws count as texts of their own."""
        rows = []
        whole = float(self.cost[self.by][:, 0].sum())
        for b, budget in enumerate(self.budgets):
            for w, way in enumerate(WAYS):
                draws = self.picks.shape[2] if way == "random" else 1
                made = [chosen(self.picks[b, w, d], self.mean_damage, self.cost) for d in range(draws)]
                value, low, high = _interval(
                    self.measured[b, w, :draws].ravel(), np.tile(self.n_tokens, draws), self.seed
                )
                share = float(np.mean([one.costs[self.by] for one in made])) / whole
                predicted = float(np.mean([one.predicted for one in made]))
                rows.append((budget, way, predicted, value, low, high, share))
        return pd.DataFrame(rows, columns=["budget", "way", "predicted", "measured", "low", "high", "share"])

    def gain(self) -> tuple[float, float, float]:
        """Measured damage of uniform pruning less that of the knapsack, over all budgets, with its interval."""
        apart = (self.measured[:, 1, 0] - self.measured[:, 0, 0]).mean(axis=0)  # (text,)
        return _interval(apart, self.n_tokens, self.seed)

    def plot(self, view: str = "frontier", **options: Any) -> Figure:
        """frontier: damage against budget for the three ways · menu: damage of every alternative of every layer."""
        if view not in ("frontier", "menu"):
            raise ValueError(f"plot: got view {view!r}, expected frontier or menu.")
        return self._plot_frontier() if view == "frontier" else self._plot_menu()

    def views(self) -> dict[str, list[Any]]:
        return {"view": ["frontier", "menu"]}

    def _plot_frontier(self) -> Figure:
        value, low, high = self.gain()
        verdict = "less than" if low > 0 else "more than" if high < 0 else "no differently from"
        title = (
            f"Choosing layer by layer loses {abs(value):.2g} nats {verdict} the same cut everywhere"
            if verdict != "no differently from"
            else f"Choosing layer by layer loses {verdict} the same cut everywhere"
        )
        title += f" [{low:.2g}, {high:.2g}], at {min(self.budgets):.0%} to {max(self.budgets):.0%} of {self.by}"
        drawn = self.frontier().rename(columns={"measured": "value"})
        return plots.lines(
            drawn, "share", "value", "way", "low", "high",
            title=title, x_title=f"share of {self.by} that is left", y_title="KL from the untouched model (nats)",
        )  # fmt: skip

    def _plot_menu(self) -> Figure:
        table = self.table()
        worst: Any = table.query(f"alternative != {FULL!r}").sort_values("damage")
        title = (
            f"The swap that hurts least is {worst['alternative'].iloc[0]} of layer {worst['layer'].iloc[0]} "
            f"({worst['damage'].iloc[0]:.2g} nats), most {worst['alternative'].iloc[-1]} of layer "
            f"{worst['layer'].iloc[-1]} ({worst['damage'].iloc[-1]:.2g})"
        )
        titles: dict[str, Any] = {"x_title": "alternative", "y_title": "layer", "value_title": "KL (nats)"}
        return plots.heatmap(table, "alternative", "layer", "damage", title=title, **titles)


def layer_plan(name: str, order: np.ndarray, kept: int) -> LayerPlan:
    """What a layer keeps under the alternative of that name."""
    if name in (FULL, DROPPED):
        return LayerPlan()
    if name == "no attention":
        return LayerPlan(heads=())
    return LayerPlan(neurons=tuple(sorted(order[:kept].tolist())))


def _interval(values: np.ndarray, weights: np.ndarray, seed: int) -> tuple[float, float, float]:
    value, low, high = bootstrap_interval(values, weights=weights, seed=seed)
    return float(value), float(low), float(high)
