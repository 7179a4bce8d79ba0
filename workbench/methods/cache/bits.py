"""Which bits for which layer's keys and values: the exact best plan within a budget, and plans as values.

min sum_l w_l e[l, p_l]  subject to  sum_l cost[l, p_l] <= budget: a multiple-choice knapsack, solved exactly by
best[l][b] = min_p w_l e[l, p] + best[l + 1][b - cost[l, p]].
Source: the search space is KVTuner's, Li et al., 2025 (arXiv 2502.04420); the knapsack and its ties are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from workbench.cache.packed import WHOLE, Format
from workbench.cache.packing import BITS
from workbench.files import write_atomically

Pair = tuple[int, int]  # bits of keys, bits of values
PAIRS: tuple[Pair, ...] = tuple((keys, values) for keys in (8, 4, 2) for values in (8, 4, 2))
FINE = 2.0**40  # errors are compared as whole multiples of the largest one / FINE, so that ties are ties
MOST_STATES = 2**28  # layers x budgets that the dynamic programme may tabulate


@dataclass(frozen=True)
class BitPlan:
    """(key bits, value bits) of every layer, the first layer first; 2, 4, 8, or 16 for whole.

    `QuantizeKV(plan.key_bits, plan.value_bits)` acts by it. On disk: YAML of {layer: {nbits_key, nbits_value}}.
    """

    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        allowed = (*BITS, WHOLE)
        wrong = [pair for pair in self.pairs if len(pair) != 2 or any(bits not in allowed for bits in pair)]
        if not self.pairs or wrong:
            got = f"pair {wrong[0]}" if wrong else "no layer"
            raise ValueError(f"BitPlan: got {got}, expected for each layer two of {allowed}: key and value bits.")

    @classmethod
    def of(cls, layers: Mapping[int, Pair] | Sequence[tuple[int, Pair]], n_layers: int) -> BitPlan:
        """The plan from (layer, pair) items. Raises ValueError unless each of the layers comes exactly once."""
        items = list(layers.items()) if isinstance(layers, Mapping) else list(layers)
        given = [layer for layer, _ in items]
        twice = sorted({layer for layer in given if given.count(layer) > 1})
        absent, strange = sorted(set(range(n_layers)) - set(given)), sorted(set(given) - set(range(n_layers)))
        for layers_at_fault, fault in ((twice, "twice"), (absent, "not at all"), (strange, "beyond the last layer")):
            if layers_at_fault:
                raise ValueError(
                    f"BitPlan: got layers {layers_at_fault} {fault}, expected each of 0 to {n_layers - 1} exactly once."
                )
        pairs = dict(items)
        return cls(tuple((int(pairs[layer][0]), int(pairs[layer][1])) for layer in range(n_layers)))

    @property
    def key_bits(self) -> tuple[int, ...]:
        return tuple(keys for keys, _ in self.pairs)

    @property
    def value_bits(self) -> tuple[int, ...]:
        return tuple(values for _, values in self.pairs)

    @property
    def mean_bits(self) -> float:
        """Nominal bits per number of the cache: scales, minima and whole tokens don't count, as in papers."""
        return self.mean_over(range(len(self.pairs)))

    def mean_over(self, layers: Sequence[int]) -> float:
        """The same over some layers, such as those that can be packed at all."""
        return float(np.mean([self.pairs[layer] for layer in layers])) if len(layers) else float(WHOLE)

    def save(self, path: str | Path) -> Path:
        """Write the plan as YAML."""
        lines = [f"{n}:\n  nbits_key: {keys}\n  nbits_value: {values}\n" for n, (keys, values) in enumerate(self.pairs)]
        path = Path(path)
        write_atomically(path, "".join(lines).encode())
        return path

    @classmethod
    def load(cls, path: str | Path, n_layers: int | None = None) -> BitPlan:
        """The plan in a YAML file; n_layers where it must fit a model. ValueError unless each layer comes once."""
        path = Path(path)
        try:
            root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"BitPlan.load: {path} is no YAML: {error}") from None
        layers = [(_layer(key, path), _pair(value, path)) for key, value in _items(root, path)]  # a dict hides doubles
        return cls.of(layers, len({layer for layer, _ in layers}) if n_layers is None else n_layers)

    def __str__(self) -> str:
        return " ".join(said(pair) for pair in self.pairs)


def said(pair: Pair) -> str:
    """KV4 for equal bits, K8V4 for others, as papers write them; - for a layer left whole."""
    keys, values = pair
    if pair == (WHOLE, WHOLE):
        return "-"
    return f"KV{keys}" if keys == values else f"K{keys}V{values}"


# Searching


def pareto(errors: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(pair,) True where no other pair is as cheap and as good, and better in one; of equal pairs the first stays."""
    errors, costs = np.asarray(errors, dtype=np.float64), np.asarray(costs)
    as_good = (errors[:, None] <= errors) & (costs[:, None] <= costs)  # [i, j]: i is at least as good as j
    same = (errors[:, None] == errors) & (costs[:, None] == costs)
    earlier = np.arange(len(errors))[:, None] < np.arange(len(errors))
    return ~(as_good & (~same | earlier)).any(axis=0)


def knapsack(errors: np.ndarray, costs: np.ndarray, budget: int) -> tuple[int, ...]:
    """The pair of each layer with the least summed error within the budget: (layer, pair) errors, whole-number costs.

    Ties: fewer bits in all, then more of them in earlier layers, then the pair that is named first.
    O(layer x pair x budget / gcd of the costs). Raises ValueError where not even the cheapest pairs fit.
    """
    errors, costs = np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.int64)
    costs = np.broadcast_to(costs, errors.shape)
    if not errors.size:
        return ()
    if not np.isfinite(errors).all() or (errors < 0).any() or (costs <= 0).any():
        raise ValueError("knapsack: got a negative or non-finite error or a cost below 1, expected none.")
    least = int(costs.min(axis=1).sum())
    if budget < least:
        raise ValueError(f"knapsack: got a budget of {budget}, but the cheapest choice costs {least}. Allow more.")
    unit = int(np.gcd.reduce(costs.ravel()))
    costs, room = costs // unit, min(budget // unit, int((costs // unit).max(axis=1).sum()))
    if room * len(errors) > MOST_STATES:
        raise ValueError(f"knapsack: {len(errors)} layers x {room} budgets are too many. Use coarser costs.")
    whole = np.round(errors / (errors.max() or 1.0) * FINE).astype(np.int64)
    best = _least_errors(whole, costs, room)
    left = int(np.argmin(best[0]))  # the first of equals: the fewest bits
    chosen = []
    for layer, (error, cost) in enumerate(zip(whole, costs, strict=True)):
        fits = [p for p in range(len(cost)) if cost[p] <= left]
        reached = [p for p in fits if best[layer][left] == error[p] + best[layer + 1][left - cost[p]]]
        chosen.append(max(reached, key=lambda p: (cost[p], -p)))
        left -= int(cost[chosen[-1]])
    return tuple(chosen)


def _least_errors(errors: np.ndarray, costs: np.ndarray, room: int) -> np.ndarray:
    """best[l][b]: the least error of layers l, l + 1, ... at a cost of at most b; huge where they don't fit."""
    impossible = np.iinfo(np.int64).max // 4
    best = np.full((len(errors) + 1, room + 1), impossible)
    best[-1] = 0
    for layer in reversed(range(len(errors))):
        for error, cost in zip(errors[layer], costs[layer], strict=True):
            if cost <= room:
                here = best[layer, cost:]
                np.minimum(here, error + best[layer + 1, : room + 1 - cost], out=here)
        np.minimum(best[layer], impossible, out=best[layer])
    return best


def clusters(errors: np.ndarray, kept: np.ndarray, distance: float) -> np.ndarray:
    """(layer,) numbers of groups: layers that keep the same pairs, and whose error curves are alike.

    A curve is a layer's errors over its largest one; groups are joined while curves differ by `distance` on average
    (average linkage, root of the mean squared difference).
    """
    errors, kept = np.asarray(errors, dtype=np.float64), np.asarray(kept, dtype=bool)
    curves = errors / np.maximum(errors.max(axis=1, keepdims=True), np.finfo(float).tiny)
    _, by_kept = np.unique(kept, axis=0, return_inverse=True)
    labels = np.zeros(len(errors), dtype=np.int64)
    for group in np.unique(by_kept):
        (inside,) = np.nonzero(by_kept == group)
        within = np.ones(1, dtype=np.int64)
        if len(inside) > 1:
            apart = pdist(curves[inside]) / np.sqrt(errors.shape[1])
            within = fcluster(linkage(apart, "average"), distance, criterion="distance")
        labels[inside] = labels.max() + within
    _, first, renamed = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[renamed]  # numbered in the order of their first layers


def search(errors: np.ndarray, costs: np.ndarray, budget: int, groups: np.ndarray | None = None) -> tuple[int, ...]:
    """`knapsack`, with one choice per group of layers where groups are given."""
    errors = np.asarray(errors, dtype=np.float64)
    costs = np.broadcast_to(np.asarray(costs, dtype=np.int64), errors.shape)
    if groups is None:
        groups = np.arange(len(errors))
    together = np.eye(int(groups.max()) + 1)[groups] if len(errors) else np.zeros((0, 0))  # (layer, group)
    summed = together.T @ errors
    chosen = knapsack(summed, (together.T @ costs).round().astype(np.int64), budget)
    return tuple(chosen[group] for group in groups)


def random_choice(costs: np.ndarray, budget: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Pairs drawn at random, then made cheaper at random layers until they fit the budget."""
    chosen = rng.integers(0, costs.shape[1], len(costs))
    layers = np.arange(len(costs))
    while costs[layers, chosen].sum() > budget:
        cheaper = [(n, p) for n in layers for p in range(costs.shape[1]) if costs[n, p] < costs[n, chosen[n]]]
        if not cheaper:
            raise ValueError(f"random_choice: got a budget of {budget}, but the cheapest choice costs more.")
        layer, pair = cheaper[rng.integers(len(cheaper))]
        chosen[layer] = pair
    return tuple(int(pair) for pair in chosen)


# Counting


def held_bits(
    pair: Pair, tokens: int, shape: tuple[int, int, int], *, group: int, residual: int, sinks: int, whole: int = 16
) -> int:
    """Bits that one layer really holds of `tokens` tokens: codes, steps, minima, sinks and residual; no positions.

    shape   key/value heads, width of a key, width of a value          whole   bits of a number that is left whole
    """
    heads, width, value_width = shape
    form = Format(*pair, group)
    packed = packed_tokens(tokens, form, residual, sinks)
    step_and_base = 32  # float16 both
    keys = packed * width * pair[0] + packed // group * width * step_and_base
    per_value = value_width // group if value_width % group == 0 else 1
    values = packed * value_width * pair[1] + packed * per_value * step_and_base
    keys = packed * width * whole if pair[0] == WHOLE else keys
    values = packed * value_width * whole if pair[1] == WHOLE else values
    return heads * (keys + values + (tokens - packed) * (width + value_width) * whole)


def packed_tokens(tokens: Any, form: Format, residual: int, sinks: int) -> Any:
    """How many of so many tokens are packed: u floor(max(0, T - S - R) / u). A number or a tensor of numbers."""
    if min(form.key_bits, form.value_bits) == WHOLE:
        return tokens * 0
    beyond = tokens - sinks - residual
    return (beyond * (beyond > 0)) // form.unit * form.unit


# Reading YAML


def _items(node: Any, path: Path) -> list[tuple[Any, Any]]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"BitPlan.load: {path} holds no mapping of layers to nbits_key and nbits_value.")
    return node.value


def _layer(node: Any, path: Path) -> int:
    if not (isinstance(node, yaml.ScalarNode) and node.value.isdigit()):
        raise ValueError(f"BitPlan.load: {path}: got layer {node.value!r}, expected a whole number.")
    return int(node.value)


def _pair(node: Any, path: Path) -> Pair:
    names = [(key.value, value.value) for key, value in _items(node, path)]
    bits = {name: int(value) for name, value in names if isinstance(value, str) and value.isdigit()}
    if sorted(name for name, _ in names) != ["nbits_key", "nbits_value"] or len(bits) != 2:
        raise ValueError(f"BitPlan.load: {path}: got {names}, expected nbits_key and nbits_value, each once.")
    return bits["nbits_key"], bits["nbits_value"]
