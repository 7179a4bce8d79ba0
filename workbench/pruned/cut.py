"""Carrying out a plan: by mask, which zeroes what reads a removed unit, or by slice, which takes its weights away.

mask    W_o[:, removed] = 0, W_down[:, removed] = 0                              the same function, the same cost
slice   W_q, W_k, W_v, W_gate, W_up lose rows; W_o, W_down lose columns          the same function, less of everything
The mask lies in weights, so that steering a removed unit changes nothing either. Source: own.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.anatomy import KEPT, Kept, spread
from workbench.pruned.blocks import attention_off, mlp_off
from workbench.pruned.plan import LayerPlan
from workbench.pruned.units import LayerUnits
from workbench.swap import swap, swap_weight

if TYPE_CHECKING:
    from workbench.subject import Subject

Form = Literal["mask", "slice"]
# Attributes of attention modules that count heads, in some family each; a trap where one is forgotten, so units are
# proved by comparing slice and mask before any is used.
HEADS = ("num_heads", "num_attention_heads")
GROUPS = ("num_kv_heads", "num_key_value_heads")


def cut_layer(subject: Subject, units: LayerUnits, plan: LayerPlan, form: Form, undo: ExitStack) -> int:
    """Remove from one block what `plan` does not keep; returns how many modules were changed.

    Units that are gone already stay gone. Raises ValueError where the block can't be cut so, with the reason.
    """
    changed = 0
    if plan.heads is not None:
        changed += _cut_heads(subject, units, plan.heads, form, undo)
    if plan.neurons is not None:
        changed += _cut_neurons(subject, units, plan.neurons, form, undo)
    return changed


def proved(subject: Subject, units: tuple[LayerUnits, ...]) -> tuple[LayerUnits, ...]:
    """`units`, with the reason where slicing half of the first block's heads or neurons differs from masking them."""
    first, anatomy = units[0], subject.anatomy
    n_heads, n_groups = anatomy.n_heads, anatomy.n_kv_heads
    size = n_heads // n_groups
    tried: dict[str, list[LayerPlan]] = {"no_heads": [], "no_neurons": []}
    if not first.no_heads:
        halves = [range(n_groups // 2 * size, n_heads)] if n_groups > 1 else []  # whole groups, also of an odd number
        halves += [range(0, n_heads, 2)] if size % 2 == 0 else []
        tried["no_heads"] = [LayerPlan(heads=tuple(half)) for half in halves]
    if not first.no_neurons:
        tried["no_neurons"] = [LayerPlan(neurons=tuple(range(0, anatomy.d_mlp or 0, 2)))]
    reasons = {
        name: "; ".join(filter(None, (_unequal(subject, first, plan) for plan in plans)))
        for name, plans in tried.items()
    }
    found = {name: reason for name, reason in reasons.items() if reason}
    return tuple(replace(one, **found) for one in units)  # type: ignore[arg-type]


def _unequal(subject: Subject, units: LayerUnits, plan: LayerPlan) -> str:
    """How far slicing is from masking; "" where they agree."""
    ids = (torch.arange(12, device=subject.device).reshape(2, 6) * 11 + 5) % subject.anatomy.vocab
    said = []
    with subject.untoggled(), torch.no_grad():
        for form in ("mask", "slice"):
            with ExitStack() as undo:
                cut_layer(subject, units, plan, form, undo)
                try:
                    said.append(subject.model(input_ids=ids).logits.double())
                except Exception as error:  # of the model's own code, which may not know what was cut
                    return f"a {form} of it fails in {type(subject.model).__name__}: {str(error)[:200]}"
    error = float((said[0] - said[1]).norm() / said[0].norm())
    limit = {torch.float64: 1e-10, torch.float32: 1e-4}.get(subject.dtype, 5e-2)  # as at load
    return "" if error <= limit else f"a slice of it differs from the mask by {error:.1e}"


def _cut_heads(subject: Subject, units: LayerUnits, heads: tuple[int, ...], form: Form, undo: ExitStack) -> int:
    block, anatomy = _block(subject, units), subject.anatomy
    out = block.get_submodule(units.heads_out)
    ids, there = _left(out, heads, anatomy.n_heads)
    if form == "mask":
        return _mask(out, Kept(ids, anatomy.n_heads, anatomy.d_head, there), undo)
    kept = Kept(ids, anatomy.n_heads, anatomy.d_head, ids)
    if not len(ids):
        attention_off(subject, units, undo)
        swap(out, KEPT, kept, undo)
        return 1
    if units.no_heads:
        raise ValueError(f"Prune: heads of layer {units.layer} can't be sliced: {units.no_heads}. Use form='mask'.")
    there = torch.arange(anatomy.n_heads) if there is None else there
    groups, before = _groups(subject, units, ids), _groups(subject, units, there)
    for path, rows in units.heads.items():
        left, present = rows.left(ids, groups), rows.left(there, before)
        _take_rows(block.get_submodule(path), torch.searchsorted(present, left), undo)
    _take_columns(out, kept, there, undo)
    _tell_counts(
        block.get_submodule(units.attention), (len(there), len(before)), (len(ids), len(groups)), anatomy, undo
    )
    return 1 + len(units.heads)


def _cut_neurons(subject: Subject, units: LayerUnits, neurons: tuple[int, ...], form: Form, undo: ExitStack) -> int:
    n_units = subject.anatomy.d_mlp
    if units.no_neurons or units.down is None or n_units is None:
        raise ValueError(f"Prune: neurons of layer {units.layer} can't be removed: {units.no_neurons}.")
    block = _block(subject, units)
    down = block.get_submodule(units.down)
    ids, there = _left(down, neurons, n_units)
    kept = Kept(ids, n_units, 1, there if form == "mask" else ids)
    if form == "slice" and not len(ids) and isinstance(down, Conv1D):  # it can't multiply by nothing
        mlp_off(subject, units, undo)
        swap(down, KEPT, kept, undo)
        return 1
    for path, times in units.gate_up.items():
        module = block.get_submodule(path)
        if form == "slice":
            rows = ids if there is None else torch.searchsorted(there, ids)
            size = n_units if there is None else len(there)
            _take_rows(module, torch.cat([rows + part * size for part in range(times)]), undo)
        swap(module, KEPT, kept, undo)
    if form == "mask":
        return _mask(down, kept, undo) + len(units.gate_up)
    _take_columns(down, kept, torch.arange(n_units) if there is None else there, undo)
    mlp = block.get_submodule(units.down.rpartition(".")[0])
    if "intermediate_size" in vars(mlp):
        swap(mlp, "intermediate_size", len(ids), undo)
    return 1 + len(units.gate_up)


def _left(out: nn.Module, wanted: tuple[int, ...], n_units: int) -> tuple[Tensor, Tensor | None]:
    """Which units stay, of those that were not removed before, and which have weights; None: all have."""
    known: Kept | None = vars(out).get(KEPT)
    present = set(range(n_units)) if known is None else set(known.ids.tolist())
    ids = torch.tensor(sorted(present & set(wanted)), dtype=torch.long)
    return ids, None if known is None else known.there


def _groups(subject: Subject, units: LayerUnits, heads: Tensor) -> Tensor:
    """The key/value heads that these heads read; ValueError where they do so unevenly."""
    size = subject.anatomy.n_heads // subject.anatomy.n_kv_heads
    groups, counts = (heads // size).unique(return_counts=True)
    if len(counts.unique()) > 1:
        raise ValueError(
            f"Prune: with what is gone already, layer {units.layer} would keep heads {heads.tolist()}, unevenly over "
            "its key/value heads. Remove the same number per group."
        )
    return groups


def _mask(out: nn.Module, kept: Kept, undo: ExitStack) -> int:
    """Zero what a projection reads of the units that are not kept."""
    weight = plain_weight(out)
    axis, places = 0 if isinstance(out, Conv1D) else 1, kept.places.to(weight.device)
    new = torch.zeros_like(weight).index_copy(axis, places, weight.index_select(axis, places))
    swap_weight(out, "weight", new, undo)
    swap(out, KEPT, kept, undo)
    return 1


def _take_rows(module: nn.Module, rows: Tensor, undo: ExitStack) -> None:
    """Keep these output rows of a projection, of its weight and its bias."""
    weight, bias = plain_weight(module), module._parameters.get("bias")
    rows = rows.to(weight.device)
    swap_weight(module, "weight", weight.index_select(1 if isinstance(module, Conv1D) else 0, rows), undo)
    swap(module, "nf" if isinstance(module, Conv1D) else "out_features", len(rows), undo)
    if bias is not None:
        swap_weight(module, "bias", bias.detach().index_select(0, rows), undo)


def _take_columns(module: nn.Module, kept: Kept, there: Tensor, undo: ExitStack) -> None:
    """Keep what a projection reads of these units; its bias is whole, as it belongs to no unit."""
    weight = plain_weight(module)
    columns = spread(torch.searchsorted(there, kept.ids), kept.width).to(weight.device)
    swap_weight(module, "weight", weight.index_select(0 if isinstance(module, Conv1D) else 1, columns), undo)
    swap(module, "nx" if isinstance(module, Conv1D) else "in_features", len(columns), undo)
    swap(module, KEPT, kept, undo)


def plain_weight(module: nn.Module) -> Tensor:
    """The weight of a projection; ValueError where it is packed or elsewhere."""
    weight: Any = module.weight
    if weight.is_meta or not weight.is_floating_point():
        what = "on another machine or disk" if weight.is_meta else f"packed as {weight.dtype}"
        raise ValueError(f"prune: a weight of {type(module).__name__} is {what}, expected plain numbers in memory.")
    return weight.detach()


def _tell_counts(attention: Any, old: tuple[int, int], new: tuple[int, int], anatomy: Any, undo: ExitStack) -> None:
    """Tell an attention module how many heads and key/value heads it has by now."""
    (heads, groups), (n_heads, n_groups) = old, new
    counts = {name: (heads, n_heads) for name in HEADS} | {name: (groups, n_groups) for name in GROUPS}
    counts["num_key_value_groups"] = heads // groups, n_heads // n_groups
    counts["split_size"] = heads * anatomy.d_head, n_heads * anatomy.d_head
    for name, (before, after) in counts.items():
        if vars(attention).get(name) == before:
            swap(attention, name, after, undo)
    if "config" in vars(attention):
        told = {"num_attention_heads": n_heads, "num_key_value_heads": n_groups, "head_dim": anatomy.d_head}
        swap(attention, "config", ConfigView(attention.config, told), undo)


class ConfigView:
    """A model's config with some numbers of one layer; all else is asked of the live config, as it may change."""

    def __init__(self, config: Any, told: dict[str, int]) -> None:
        vars(self)["_config"], vars(self)["_told"] = config, told

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._told[name] if name in self._told else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def _block(subject: Subject, units: LayerUnits) -> nn.Module:
    return subject.model.get_submodule(f"{subject.anatomy.blocks}.{units.layer}")
