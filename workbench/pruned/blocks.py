"""Leaving out a whole block or its attention: what runs instead, and which slot of the cache each block then has.

A dropped block returns what it gets; a cache asks its first slot how long the texts are, so the first block that is
left takes that slot: lowest slots first, within the same type of layer. Source: own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.anatomy import KEPT, Anatomy, Kept, attention_path
from workbench.site import Site
from workbench.swap import stand_in, standing_in, swap

if TYPE_CHECKING:
    from workbench.pruned.units import LayerUnits
    from workbench.subject import Subject

SLOT = "layer_idx"  # the attribute by which an attention module finds its part of a cache


def drop_blocks(subject: Subject, layers: Iterable[int], undo: ExitStack) -> None:
    """Let blocks return what they get, and close the gaps in the cache; those that are dropped already stay so.

    Raises ValueError for a block that isn't there, and where no block, or none of a type of layer that the cache
    needs, would be left.
    """
    wanted = sorted(set(layers))
    for layer in wanted:
        if not 0 <= layer < subject.n_layers:
            raise ValueError(f"drop: got block {layer}, but {subject.name} has blocks 0 to {subject.n_layers - 1}.")
    bypass(subject, wanted, undo)
    if not blocks_left(subject):
        raise ValueError(f"drop: all {subject.n_layers} blocks would be gone, expected at least one to be left.")
    number_slots(subject, undo)


def bypass(subject: Subject, layers: Iterable[int], undo: ExitStack) -> None:
    """Let blocks return what they get, for forwards without a cache; those that are dropped already stay so."""
    for layer in layers:
        block = block_of(subject, layer)
        if not is_dropped(block):
            stand_in(block, _passing(subject.units[layer].returns[0]), undo, silent=True)


def blocks_left(subject: Subject) -> list[int]:
    """The blocks that are not dropped by now."""
    return [layer for layer in range(subject.n_layers) if not is_dropped(block_of(subject, layer))]


def refusal(subject: Subject, layers: Iterable[int]) -> str:
    """Why these blocks can't be dropped together, besides those that are; "" where they can."""
    with ExitStack() as undo:
        try:
            drop_blocks(subject, layers, undo)
        except ValueError as error:
            return str(error)
    return ""


def attention_off(subject: Subject, units: LayerUnits, undo: ExitStack) -> None:
    """Let the attention of one block add nothing but the bias of its output."""
    block = block_of(subject, units.layer)
    out = block.get_submodule(units.heads_out)
    stand_in(block.get_submodule(units.attention), _saying(out, units.returns[1]), undo, silent=True)
    number_slots(subject, undo)


def mlp_off(subject: Subject, units: LayerUnits, undo: ExitStack) -> None:
    """Let the MLP of one block add nothing but the bias of its output."""
    block = block_of(subject, units.layer)
    assert units.down is not None
    down = block.get_submodule(units.down)
    stand_in(block.get_submodule(units.down.rpartition(".")[0]), _saying(down, None), undo, silent=True)


def spoken_biases(subject: Subject) -> set[str]:
    """Full names of the biases that an attention or an MLP goes on adding when it is off."""
    return {
        f"{subject.anatomy.blocks}.{units.layer}.{path}.bias"
        for units in subject.units
        for path in (units.heads_out, units.down)
        if path is not None
    }


def is_dropped(module: nn.Module) -> bool:
    """Whether a block, or an attention, is left out by now."""
    found = standing_in(module)
    return found is not None and found.silent


def number_slots(subject: Subject, undo: ExitStack) -> None:
    """Give the blocks that still attend the lowest slots of the cache among those of their type."""
    config: Any = subject.model.config.get_text_config()
    types = list(getattr(config, "layer_types", None) or [""] * subject.n_layers)
    acting = [layer for layer in range(subject.n_layers) if _attends(subject, layer)]
    if len(acting) == subject.n_layers:
        return
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError(f"drop: {subject.name} scales attention by the number of the block, which can't change.")
    if not any(types[layer] == types[0] for layer in acting):
        kind = f" of type {types[0]}" if types[0] else ""
        raise ValueError(
            f"drop: no block{kind} would attend any more; the cache needs one to know its length. Keep one."
        )
    for kind in dict.fromkeys(types):
        slots = [layer for layer in range(subject.n_layers) if types[layer] == kind]
        for slot, layer in zip(slots, (layer for layer in acting if types[layer] == kind), strict=False):
            attention = attention_of(subject.model, subject.anatomy, layer)
            if vars(attention).get(SLOT, slot) != slot:
                swap(attention, SLOT, slot, undo)


def block_of(subject: Subject, layer: int) -> nn.Module:
    """One block."""
    return subject.model.get_submodule(f"{subject.anatomy.blocks}.{layer}")


def attention_of(model: nn.Module, anatomy: Anatomy, layer: int) -> nn.Module:
    """The attention module of a block."""
    return model.get_submodule(".".join(filter(None, (anatomy.blocks, str(layer), attention_path(anatomy, layer)))))


def groups_left(subject: Subject, layer: int) -> Tensor:
    """The key/value heads of a block whose weights are left, by their original numbers."""
    anatomy = subject.anatomy
    kept: Kept | None = vars(anatomy.module(subject.model, Site(layer, "heads"))).get(KEPT)
    heads = torch.arange(anatomy.n_heads) if kept is None or kept.there is None else kept.there
    return (heads // (anatomy.n_heads // anatomy.n_kv_heads)).unique()


def blocks_of_slots(model: nn.Module, anatomy: Anatomy) -> dict[int, int]:
    """Slot of the cache -> the block that uses it, for the blocks that attend."""
    acting = [layer for layer in range(anatomy.n_layers) if _attends_in(model, anatomy, layer)]
    return {vars(attention_of(model, anatomy, layer)).get(SLOT, layer): layer for layer in acting}


def _attends(subject: Subject, layer: int) -> bool:
    return _attends_in(subject.model, subject.anatomy, layer)


def _attends_in(model: nn.Module, anatomy: Anatomy, layer: int) -> bool:
    block = model.get_submodule(f"{anatomy.blocks}.{layer}")
    return not is_dropped(block) and not is_dropped(attention_of(model, anatomy, layer))


def _passing(returns: int | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(_: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return _as_returned(hidden_states, returns)

        return forward

    return make


def _saying(out: nn.Module, returns: int | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(_: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            said, bias = torch.zeros_like(hidden_states), out._parameters.get("bias")  # now: it may be loaded later
            return _as_returned(said if bias is None else said + bias, returns)

        return forward

    return make


def _as_returned(value: Tensor, returns: int | None) -> Any:
    return value if returns is None else (value, *[None] * (returns - 1))
