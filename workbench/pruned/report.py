"""What a plan weighs: parameters, bytes and cache of each layer, before and after. Pure arithmetic.

query head     d_head (d_model + biases) rows, d_head d_model columns of the output projection
key/value head its rows of keys and values, shared by its query heads            neuron   rows that make it, its column
Source: own; biases of outputs belong to no unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from workbench import plots
from workbench.pruned.blocks import is_dropped
from workbench.pruned.plan import Plan, Shape
from workbench.pruned.units import LayerUnits, rows_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.subject import Subject

MOST_COLUMNS = 64  # of a map: more units are drawn in blocks of neighbours
PLAN_COLUMNS = (
    "layer", "heads", "heads_before", "kv_heads", "kv_heads_before", "neurons", "neurons_before",
    "parameters", "parameters_before", "bytes", "bytes_before", "kv_bytes_per_token", "kv_bytes_per_token_before",
    "lowest_kept_head", "highest_removed_head", "lowest_kept_neuron", "highest_removed_neuron",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Parameters that leave with each unit of a model; one number per layer.

    head      a query head                        group    a key/value head, without the query heads that read it
    neuron    0 where there are none              rest     what no unit holds: norms, output biases, experts
    outside   one number: embeddings, final norm, unembedding; what is tied counts once
    itemsize  bytes of one parameter, and of one number in the cache
    no_heads, no_neurons   why the units of some layer can't be cut out, or ""
    """

    shape: Shape
    head: tuple[int, ...]
    group: tuple[int, ...]
    neuron: tuple[int, ...]
    rest: tuple[int, ...]
    outside: int
    itemsize: int = 4
    no_heads: str = ""
    no_neurons: str = ""

    @classmethod
    def of(cls, subject: Subject) -> Sizes:
        """The sizes of the untoggled subject."""
        shape, model = Shape.of(subject), subject.model
        with subject.untoggled():
            blocks = [model.get_submodule(f"{subject.anatomy.blocks}.{layer}") for layer in range(shape.n_layers)]
            found = np.array([_unit_sizes(*pair) for pair in zip(blocks, subject.units, strict=True)])
            whole = np.array([_parameters(block) for block in blocks])
            outside = _parameters(model) - int(whole.sum())
        units = found @ [shape.n_heads, shape.n_kv_heads, shape.d_mlp or 0]
        reasons = [
            next(filter(None, (vars(one)[name] for one in subject.units)), "") for name in ("no_heads", "no_neurons")
        ]
        head, group, neuron, rest = (tuple(map(int, column)) for column in (*found.T, whole - units))
        return cls(shape, head, group, neuron, rest, outside, subject.dtype.itemsize, *reasons)

    def attention(self, layer: int) -> int:
        """Parameters of all heads of a layer."""
        return self.shape.n_heads * self.head[layer] + self.shape.n_kv_heads * self.group[layer]

    def mlp(self, layer: int) -> int:
        """Parameters of all neurons of a layer."""
        return (self.shape.d_mlp or 0) * self.neuron[layer]

    @property
    def units(self) -> int:
        """Parameters of all heads and neurons: what pruning units can take from."""
        return sum(self.attention(layer) + self.mlp(layer) for layer in range(self.shape.n_layers))

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.units + sum(self.rest) + self.outside

    def left(self, plan: Plan, layer: int) -> int:
        """Parameters of a block under a plan."""
        if layer in plan.dropped:
            return 0
        heads, groups, neurons = (plan.kept(layer, family) for family in ("heads", "kv_heads", "neurons"))
        return heads * self.head[layer] + groups * self.group[layer] + neurons * self.neuron[layer] + self.rest[layer]

    def removed(self, plan: Plan) -> int:
        """Parameters that a plan takes away."""
        return self.total - self.outside - sum(self.left(plan, layer) for layer in range(self.shape.n_layers))

    def cache_bytes(self, plan: Plan, layer: int) -> int:
        """Bytes that one token takes in this layer's key/value cache."""
        return 2 * plan.kept(layer, "kv_heads") * self.shape.d_head * self.itemsize


def plan_table(
    plan: Plan, sizes: Sizes, heads: np.ndarray | None = None, neurons: np.ndarray | None = None
) -> pd.DataFrame:
    """One row per layer, what a plan leaves of it, in the columns PLAN_COLUMNS.

    heads, neurons   (layer, unit) scores: the lowest of a kept and the highest of a removed unit are told, else NaN
    """
    whole, rows = Plan(plan.shape), []
    for layer in range(plan.shape.n_layers):
        counts = [one.kept(layer, family) for family in ("heads", "kv_heads", "neurons") for one in (plan, whole)]
        parameters = [sizes.left(one, layer) for one in (plan, whole)]
        cache = [sizes.cache_bytes(one, layer) for one in (plan, whole)]
        edges = [
            bound
            for family, scores in (("heads", heads), ("neurons", neurons))
            for bound in _edges(plan, layer, family, scores)
        ]
        rows.append((layer, *counts, *parameters, *(n * sizes.itemsize for n in parameters), *cache, *edges))
    return pd.DataFrame(rows, columns=list(PLAN_COLUMNS))


def kept_map(plan: Plan, *, title: str) -> Figure:
    """Layer x unit, heads and neurons side by side: the share kept, white where all are gone.

    More than MOST_COLUMNS units of a layer are drawn in blocks of neighbouring numbers.
    """
    maps = {}
    for family in ("heads", "neurons"):
        n_units = plan.total(family)
        if not n_units:
            continue
        width = -(-n_units // MOST_COLUMNS)
        kept = np.stack([_kept_mask(plan, layer, family) for layer in range(plan.shape.n_layers)])
        rows = [
            (layer, start, float(mask[start : start + width].mean()))
            for layer, mask in enumerate(kept)
            for start in range(0, n_units, width)
        ]
        drawn = pd.DataFrame(rows, columns=["layer", "unit", "kept"])
        first = {"heads": "head", "neurons": "neuron"}[family] + ("" if width == 1 else f" (blocks of {width})")
        titles: dict[str, Any] = {"x_title": first, "y_title": "layer", "value_title": "share kept"}
        figure = plots.heatmap(drawn, "unit", "layer", "kept", span=(0.0, 1.0), show_values=False, **titles)
        maps[first] = figure.update_traces(colorscale=[[0.0, "#FFFFFF"], [1.0, plots.BLUE]])
    made = plots.beside(maps, title=title).update_xaxes(title={"text": "number of the unit"})
    made.update_traces(showscale=False, selector=lambda trace: trace is not made.data[-1])
    return made.update_layout(height=330 + 12 * plan.shape.n_layers, plot_bgcolor="#D9D9D9")


def parameter_bytes(subject: Subject) -> int:
    """Bytes of the parameters that act now, each storage once; dropped blocks and silent attention count nothing."""
    silent = {
        id(parameter) for module in subject.model.modules() if is_dropped(module) for parameter in module.parameters()
    }
    acting = {p.data_ptr(): p.nbytes for p in subject.model.parameters() if id(p) not in silent}
    return sum(acting.values())


def _parameters(module: nn.Module) -> int:
    return sum({p.data_ptr(): p.numel() for p in module.parameters()}.values())


def _unit_sizes(block: nn.Module, units: LayerUnits) -> tuple[int, int, int]:
    """Parameters of one query head, one key/value head and one neuron of a block."""
    head = group = neuron = 0
    for path, rows in units.heads.items():
        each = _row(block.get_submodule(path))
        head, group = head + rows.of_head.shape[1] * each, group + rows.of_group.shape[1] * each
    if units.heads:
        n_heads = len(next(iter(units.heads.values())).of_head)
        head += rows_of(block.get_submodule(units.heads_out)).numel() // n_heads
    if units.down is not None:
        neuron = len(rows_of(block.get_submodule(units.down)))
        neuron += sum(times * _row(block.get_submodule(path)) for path, times in units.gate_up.items())
    return head, group, neuron


def _row(linear: nn.Module) -> int:
    """Parameters of one output row of a projection, its bias included."""
    return rows_of(linear).shape[1] + (linear._parameters.get("bias") is not None)


def _kept_mask(plan: Plan, layer: int, family: str) -> np.ndarray:
    kept = np.zeros(plan.total(family), dtype=bool)
    units = getattr(plan.at(layer), family)
    if layer not in plan.dropped:
        kept[slice(None) if units is None else list(units)] = True
    return kept


def _edges(plan: Plan, layer: int, family: str, scores: np.ndarray | None) -> tuple[float, float]:
    """The lowest score of a kept unit and the highest of a removed one; NaN where there is none."""
    if scores is None or not scores.shape[1]:
        return (float("nan"), float("nan"))
    kept, edge = _kept_mask(plan, layer, family), scores[layer]
    bounds: list[tuple[Callable[..., Any], np.ndarray]] = [(np.min, edge[kept]), (np.max, edge[~kept])]
    lowest, highest = (float(bound(part)) if len(part) else float("nan") for bound, part in bounds)
    return lowest, highest
