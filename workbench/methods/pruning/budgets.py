"""From scores to a plan: which units leave, lowest first, so that a given share of the parameters goes.

uniform     each layer: k = round(r n) of its n bundles of heads, m = r I + (r n - k) c_bundle / c_neuron neurons
global      all units in one order by (score / its parameters) / (its kind's scores / parameters, in its layer)
Sources: AMP (arXiv 2504.21174) for `uniform`, whose mode "paper" adds r n - k neurons for as many heads, whatever
either costs; LLM-Pruner (arXiv 2305.11627), LoRAPrune (arXiv 2305.18403): layers that stay whole; the rest is own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from workbench.pruned.plan import LayerPlan, Plan
from workbench.pruned.report import Sizes

LEAST_NEURONS = 8  # of each layer stay, and one bundle of heads: a width of nothing is for whole parts, not for scores
SLACK = 1e-6  # of a unit or a parameter: shares times sizes are products of rounded numbers

Of = Literal["blocks", "all", "heads", "neurons"]


@dataclass(frozen=True)
class Budget:
    """What a share is a share of, and who pays.

    of          "blocks": of the parameters of heads and neurons, both pay; "all": of the whole model's parameters,
                both pay; "heads" or "neurons": of those alone, which pay alone
    allocation  "uniform": every layer the same; "global": the lowest units anywhere; {layer: share removed}
    unit        heads leave in bundles: "group", a key/value head with its query heads, or "head", one query head of
                every group; None: groups where there are several
    mode        how `uniform` makes up for rounding heads: "corrected", by parameters, or as in the "paper"
    round_to    kept neurons of a layer are rounded up to a multiple of this
    keep_first, keep_last   so many layers stay whole; the others pay for them
    """

    of: Of = "blocks"
    allocation: str | Mapping[int, float] | tuple[tuple[int, float], ...] = "uniform"
    unit: Literal["group", "head"] | None = None
    mode: Literal["corrected", "paper"] = "corrected"
    round_to: int = 1
    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.allocation, Mapping):
            object.__setattr__(self, "allocation", tuple(sorted(self.allocation.items())))
        choices: dict[str, tuple[Any, ...]] = {
            "of": ("blocks", "all", "heads", "neurons"),
            "unit": ("group", "head", None),
        }
        choices["mode"] = ("corrected", "paper")
        if not isinstance(self.allocation, tuple):
            choices["allocation"] = ("uniform", "global", "{layer: share removed}")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Budget: got {name}={getattr(self, name)!r}, expected one of {allowed}.")
        if self.round_to < 1 or self.keep_first < 0 or self.keep_last < 0:
            raise ValueError(
                f"Budget: got round_to={self.round_to}, keep_first={self.keep_first}, keep_last={self.keep_last}, "
                "expected a multiple of at least 1 and numbers of layers."
            )

    @property
    def families(self) -> tuple[str, ...]:
        """Whose units pay."""
        return {"heads": ("heads",), "neurons": ("neurons",)}.get(self.of, ("heads", "neurons"))


@dataclass(frozen=True, eq=False)
class Ranking:
    """Units of every layer from the lowest score up. Sorted once: any budget is then a prefix.

    heads, neurons   (layer, unit) scores, higher is worth more        sizes   parameters of each
    """

    heads: np.ndarray
    neurons: np.ndarray
    sizes: Sizes

    def __post_init__(self) -> None:
        for name in ("heads", "neurons"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f"Ranking: scores of {name} hold NaN or infinity, expected numbers that can be ranked."
                )

    def plan(self, ratio: float | None, budget: Budget, origin: Mapping[str, Any] | None = None) -> Plan:
        """The plan that takes `ratio` of the parameters away; with an allocation by layer `ratio` is None.

        Raises ValueError with the reason where that can't be met: floors, units that can't be cut, layers kept whole.
        """
        self._check(ratio, budget)
        if isinstance(budget.allocation, tuple):
            gone = {layer: self._in_layer(layer, share, budget) for layer, share in budget.allocation}
        else:
            assert ratio is not None
            wanted = ratio * self._base(budget)
            self._check_room(ratio, wanted, budget)
            gone = self._global(wanted, budget) if budget.allocation == "global" else self._uniform(wanted, budget)
        layers = {layer: self._layer_plan(layer, *counts, budget) for layer, counts in gone.items()}
        plan = Plan(self.sizes.shape, tuple(layers.items()))
        told = {"ratio": ratio, **{name: _told(value) for name, value in vars(budget).items()}}
        share = self.sizes.removed(plan) / self._base(budget)
        return replace(plan, origin=tuple({**(origin or {}), **told, "achieved": share}.items()))

    def most(self, budget: Budget) -> float:
        """The largest ratio that a budget can have: the floors of its layers forbid more.

        Raises ValueError where the model has nothing of what the budget takes.
        """
        layers = self._prunable(budget)
        if not self._base(budget):
            reason = self.sizes.no_heads or self.sizes.no_neurons
            raise ValueError(f"Budget: there are no {budget.of} to take: {reason}.")
        if not len(layers):
            raise ValueError(self._all_whole(budget))
        room = [self._room(layer, budget) for layer in layers]
        if budget.allocation == "uniform":  # every layer gives the same share of what it has
            weights = [self._weight(layer, budget) for layer in layers]
            return min(r / w for r, w in zip(room, weights, strict=True)) * sum(weights) / self._base(budget)
        return sum(room) / self._base(budget)

    def groups(self) -> np.ndarray:
        """(layer, kv_head) the score of a key/value head: the sum over the heads that read it."""
        shape = self.sizes.shape
        return self.heads.reshape(len(self.heads), shape.n_kv_heads, shape.group).sum(axis=2)

    # Orders: made once

    @functools.cached_property
    def _neuron_order(self) -> np.ndarray:
        return np.argsort(self.neurons, axis=1, kind="stable")

    @functools.cached_property
    def _bundles(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By kind: (layer, bundle, head) who leaves together, the lowest bundle first, and (layer, bundle) scores."""
        shape, n_layers = self.sizes.shape, len(self.heads)
        grouped = self.heads.reshape(n_layers, shape.n_kv_heads, shape.group)
        order = np.argsort(grouped.sum(axis=2), axis=1, kind="stable")
        inside = np.argsort(grouped, axis=2, kind="stable").transpose(0, 2, 1)  # the j-th lowest head of every group
        heads = {
            "group": order[..., None] * shape.group + np.arange(shape.group),
            "head": inside + shape.group * np.arange(shape.n_kv_heads),
        }
        return {
            unit: (ids, np.take_along_axis(self.heads[:, None], ids, axis=2).sum(axis=2)) for unit, ids in heads.items()
        }

    @functools.cached_property
    def _orders(self) -> dict[tuple[tuple[str, ...], str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """What `_order` has made."""
        return {}

    def _order(self, families: tuple[str, ...], unit: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all units that may leave, from the lowest value up: layer, whether it is a bundle, parameters."""
        if (families, unit) in self._orders:
            return self._orders[families, unit]
        parts = []
        for layer in range(len(self.heads)):
            for family in families:
                scores, cost = self._scores(layer, family, unit), self._cost(layer, family, unit)
                free = len(scores) - self._floor(family)
                mean = scores.mean() if len(scores) else 0.0
                # within a layer and a family all cost alike, so that parameters cancel: score / mean score is left
                value = scores[:free] / mean if mean > 0 else np.zeros(free)
                parts.append((value, np.full(free, layer), np.full(free, family == "heads"), np.full(free, cost)))
        value, layer, bundle, cost = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(value, kind="stable")
        return self._orders.setdefault((families, unit), (layer[order], bundle[order], cost[order]))

    def _scores(self, layer: int, family: str, unit: str) -> np.ndarray:
        """The scores of a layer's bundles or neurons, ascending."""
        if family == "heads":
            return self._bundles[unit][1][layer]
        return self.neurons[layer][self._neuron_order[layer]]

    # What must stay and what can go

    def _unit(self, budget: Budget) -> str:
        shape = self.sizes.shape
        if shape.group == 1:  # a group is a head
            return "group"
        return budget.unit or ("group" if shape.n_kv_heads > 1 else "head")

    def _count(self, family: str, unit: str) -> int:
        shape = self.sizes.shape
        heads = shape.n_kv_heads if unit == "group" else shape.group
        return heads if family == "heads" else self.neurons.shape[1]

    def _floor(self, family: str) -> int:
        return 1 if family == "heads" else min(LEAST_NEURONS, self.neurons.shape[1])

    def _cost(self, layer: int, family: str, unit: str) -> int:
        """Parameters of one bundle or neuron."""
        sizes, shape = self.sizes, self.sizes.shape
        if family == "neurons":
            return sizes.neuron[layer]
        if unit == "group":
            return shape.group * sizes.head[layer] + sizes.group[layer]
        return shape.n_kv_heads * sizes.head[layer]

    def _prunable(self, budget: Budget) -> range:
        return range(budget.keep_first, len(self.heads) - budget.keep_last)

    def _weight(self, layer: int, budget: Budget) -> int:
        """Parameters of those units of a layer that pay."""
        of_family = {"heads": self.sizes.attention, "neurons": self.sizes.mlp}
        return sum(of_family[family](layer) for family in budget.families)

    def _base(self, budget: Budget) -> int:
        """The parameters that a ratio is of."""
        if budget.of == "all":
            return self.sizes.total
        return sum(self._weight(layer, budget) for layer in range(len(self.heads)))

    def _room(self, layer: int, budget: Budget) -> int:
        """The most parameters that can leave a layer."""
        unit = self._unit(budget)
        return sum(
            (self._count(family, unit) - self._floor(family)) * self._cost(layer, family, unit)
            for family in budget.families
        )

    def _check(self, ratio: float | None, budget: Budget) -> None:
        by_layer = isinstance(budget.allocation, tuple)
        if by_layer == (ratio is not None):
            raise ValueError("plan: expected ratio or keep, or an allocation {layer: share removed}, one of the three.")
        if budget.of == "all" and by_layer:
            raise ValueError("plan: got of='all' with shares by layer, expected of='blocks', 'heads' or 'neurons'.")
        for share in dict(budget.allocation).values() if isinstance(budget.allocation, tuple) else [ratio]:
            if share is None or not 0 <= share < 1:
                raise ValueError(f"plan: got a ratio of {share}, expected a share to remove, from 0 to below 1.")
        if budget.of in ("blocks", "all", "heads") and self.sizes.no_heads:
            raise ValueError(f"plan: heads of this model can't be cut: {self.sizes.no_heads}. Ask for of='neurons'.")
        if budget.of in ("blocks", "all", "neurons") and self.sizes.no_neurons:
            raise ValueError(f"plan: this model has no neurons: {self.sizes.no_neurons}. Ask for of='heads'.")
        if isinstance(budget.allocation, tuple):
            wrong = [layer for layer, _ in budget.allocation if layer not in self._prunable(budget)]
            if wrong:
                raise ValueError(f"plan: got a share for layer {wrong[0]}, expected one of {self._prunable(budget)}.")

    def _check_room(self, ratio: float, wanted: float, budget: Budget) -> None:
        layers, base = self._prunable(budget), self._base(budget)
        if not len(layers):
            raise ValueError(self._all_whole(budget))
        room = sum(self._room(layer, budget) for layer in layers)
        if wanted > room + SLACK:
            raise ValueError(
                f"plan: got ratio={ratio:g}, but at most {room / base:.4f} can leave: {self._stays(budget)}."
            )

    def _all_whole(self, budget: Budget) -> str:
        return (
            f"plan: got keep_first={budget.keep_first}, keep_last={budget.keep_last}, but there are "
            f"{len(self.heads)} layers. Keep fewer whole."
        )

    def _stays(self, budget: Budget) -> str:
        bundle = "key/value head" if self._unit(budget) == "group" else "query head per group"
        said = {"heads": f"one {bundle}", "neurons": f"{self._floor('neurons')} neurons"}
        whole = budget.keep_first + budget.keep_last
        rest = f", and {whole} stay whole" if whole else ""
        return f"each layer keeps {' and '.join(said[family] for family in budget.families)}{rest}"

    # Who goes: (layer -> bundles, neurons)

    def _uniform(self, wanted: float, budget: Budget) -> dict[int, tuple[int, int]]:
        layers = self._prunable(budget)
        share = wanted / sum(self._weight(layer, budget) for layer in layers)
        return {layer: self._in_layer(layer, share, budget) for layer in layers}

    def _in_layer(self, layer: int, share: float, budget: Budget) -> tuple[int, int]:
        """How many bundles and neurons leave a layer with this share of its parameters that pay."""
        unit = self._unit(budget)
        if share * self._weight(layer, budget) > self._room(layer, budget) + SLACK:
            most = self._room(layer, budget) / self._weight(layer, budget)
            raise ValueError(
                f"plan: layer {layer} would lose {share:.4f} of its parameters, but at most {most:.4f} can leave: "
                f"{self._stays(budget)}."
            )
        n_neurons = self._count("neurons", unit)
        if budget.of == "neurons":
            return 0, math.floor(share * n_neurons + SLACK)
        cost = self._cost(layer, "heads", unit)
        bundles = share * self.sizes.attention(layer) / cost  # a broken number; of groups it is r K
        k = min(round(bundles), self._count("heads", unit) - 1)
        if budget.of == "heads":
            return k, 0
        worth = 1.0 if budget.mode == "paper" else cost / self.sizes.neuron[layer]
        free = n_neurons - self._floor("neurons")
        neurons = share * n_neurons + (bundles - k) * worth
        while neurons < -SLACK:  # one bundle is more than the whole share: the neurons pay instead
            k, neurons = k - 1, neurons + worth
        while neurons > free + SLACK and k < self._count("heads", unit) - 1:
            k, neurons = k + 1, neurons - worth
        return k, min(max(math.floor(neurons + SLACK), 0), free)

    def _global(self, wanted: float, budget: Budget) -> dict[int, tuple[int, int]]:
        layer, bundle, cost = self._order(budget.families, self._unit(budget))
        inside = np.isin(layer, list(self._prunable(budget)))
        layer, bundle, cost = layer[inside], bundle[inside], cost[inside]
        n_gone = int(np.searchsorted(np.cumsum(cost), wanted + SLACK, side="right"))
        gone = layer[:n_gone], bundle[:n_gone]
        return {
            one: (int((gone[1] & (gone[0] == one)).sum()), int((~gone[1] & (gone[0] == one)).sum()))
            for one in self._prunable(budget)
        }

    def _layer_plan(self, layer: int, bundles: int, neurons: int, budget: Budget) -> LayerPlan:
        """What stays of a layer without its lowest bundles and neurons."""
        heads, n_neurons = self._bundles[self._unit(budget)][0][layer], self.neurons.shape[1]
        kept = n_neurons - neurons
        kept = min(n_neurons, -(-kept // budget.round_to) * budget.round_to)
        return LayerPlan(
            heads=tuple(sorted(heads[bundles:].ravel().tolist())) if bundles else None,
            neurons=tuple(sorted(self._neuron_order[layer][n_neurons - kept :].tolist())) if kept < n_neurons else None,
        )


def _told(value: Any) -> Any:
    """A setting as JSON data."""
    return {str(layer): share for layer, share in value} if isinstance(value, tuple) else value
