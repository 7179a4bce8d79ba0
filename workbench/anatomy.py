"""The shape of a decoder and the places in it, and how a value at a place is read or replaced.

A place is a module's input or output; one tap reads it in every family, whatever the module returns or is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.site import Site
from workbench.swap import standing_in

UNIT_KINDS = ("heads", "neurons", "gate", "up")  # whose values are told apart by unit
KEPT = "kept_units"  # the attribute of a projection that tells which of its units are left


@dataclass(frozen=True)
class Place:
    """Where a kind of site is found in one block: a module's input or output, or some columns of it."""

    path: str  # relative to the block; "" is the block itself
    side: Literal["in", "out"]
    columns: tuple[int, int] | None = None  # of a fused projection
    per_head: bool = False  # read as (..., n_heads, d_head)
    flat: bool = False  # the module sees (batch * seq, width), as OPT's MLP does

    def __str__(self) -> str:
        part = f"[{self.columns[0]}:{self.columns[1]}]" if self.columns else ""
        return f"{'input' if self.side == 'in' else 'output'} of {self.path or 'the block'}{part}"


@dataclass(frozen=True)
class Anatomy:
    """The shape of a decoder and the places in it.

    blocks      path of the block list        trunk    path of the module that owns it and receives the tokens
    places      for each layer, kind -> Place; a kind that a layer lacks is in `missing` with the reason
    d_mlp       None where no layer has a single down projection (mixture of experts)
    """

    blocks: str
    trunk: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int | None
    vocab: int
    places: tuple[Mapping[str, Place], ...] = field(repr=False)
    missing: tuple[Mapping[str, str], ...] = field(repr=False)

    def place(self, site: Site) -> Place:
        """Where `site` is; ValueError names the layers there are, or why the model has no such place."""
        if site.layer >= self.n_layers:
            raise ValueError(
                f"{site}: got layer {site.layer}, but this model has {self.n_layers} blocks, "
                f"0 to {self.n_layers - 1}. Choose a layer in that range."
            )
        if site.kind not in self.places[site.layer]:
            raise ValueError(
                f"{site}: this model has no such place: {self.missing[site.layer][site.kind]}. "
                f"It has {', '.join(self.places[site.layer])}."
            )
        return self.places[site.layer][site.kind]

    def width(self, site: Site) -> tuple[int, ...]:
        """Shape of one token's value at `site`."""
        place = self.place(site)
        if place.per_head:
            return (self.n_heads, self.d_head)
        if site.kind in ("neurons", "gate", "up"):
            assert self.d_mlp is not None
            return (self.d_mlp,)
        return (self.d_model,)

    def module(self, model: nn.Module, site: Site) -> nn.Module:
        """The module at whose input or output `site` is read."""
        path = ".".join(filter(None, (self.blocks, str(site.layer), self.place(site).path)))
        return model.get_submodule(path)

    def summary(self) -> str:
        groups = f"{self.n_heads} heads on {self.n_kv_heads} key/value heads of {self.d_head}"
        return (
            f"{self.n_layers} blocks, d_model {self.d_model}, {groups}, d_mlp {self.d_mlp}, vocabulary {self.vocab:,}"
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """Which units of a projection a toggle left, by their original numbers: attribute `kept_units` of its module.

    A site goes on showing all of its units, the removed ones as zeros, and an edit of those does nothing: ids that a
    probe found stay true.

    ids       (kept,) ascending                            n_units   how many there were
    width     numbers per unit: d_head for heads           there     (left,) units whose weights are left; None: all
    """

    ids: Tensor
    n_units: int
    width: int = 1
    there: Tensor | None = None

    def columns(self, columns: tuple[int, int] | None) -> tuple[int, int] | None:
        """Where the columns of a fused projection stand by now."""
        if columns is None or self.there is None:
            return columns
        low, high = columns
        left = len(self.there) * self.width
        return (low // (high - low) * left, (low // (high - low) + 1) * left)

    def show(self, part: Tensor) -> Tensor:
        """(..., units that are there) as (..., all units), zeros where one was removed."""
        shown = part.new_zeros(*part.shape[:-1], self.n_units * self.width)
        ids, places = self.numbers.to(part.device), self.places.to(part.device)
        return shown.index_copy(-1, ids, part.index_select(-1, places))

    def take(self, new: Tensor, part: Tensor) -> Tensor:
        """Of new values (..., all units) what the model has room for; what was removed stays as it is in `part`."""
        ids, places = self.numbers.to(part.device), self.places.to(part.device)
        return part.index_copy(-1, places, new.index_select(-1, ids).to(part.dtype))

    @property
    def numbers(self) -> Tensor:
        """Where the kept units stand among all."""
        return spread(self.ids, self.width)

    @property
    def places(self) -> Tensor:
        """Where the kept units stand among those that are there."""
        return self.numbers if self.there is None else spread(torch.searchsorted(self.there, self.ids), self.width)


def spread(units: Tensor, width: int) -> Tensor:
    """(..., unit) to (..., unit * width): the numbers of units that hold `width` numbers each."""
    return (units[..., None] * width + torch.arange(width, device=units.device)).flatten(-2)


def attention_path(anatomy: Anatomy, layer: int) -> str:
    """Path, below the block, of the attention module: what holds the projection that reads the heads."""
    return anatomy.place(Site(layer, "heads")).path.rpartition(".")[0]


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a module's output: the tensor itself, or the first item of a tuple (Falcon, GPT-J).

    Indexing [0] blindly would take batch row 0 of a plain tensor.
    """
    return output if isinstance(output, Tensor) else output[0]


def with_first_tensor(output: Any, value: Tensor) -> Any:
    """`output` with its hidden states replaced by `value`."""
    return value if isinstance(output, Tensor) else type(output)((value, *output[1:]))


def add_tap(
    model: nn.Module, anatomy: Anatomy, site: Site, tap: Callable[[Tensor], Tensor | None], undo: ExitStack
) -> None:
    """Call `tap` with the value (batch, seq, *width) at `site` on every forward; a tensor it returns replaces it.

    The value may alias the model's own memory: a tap that keeps it must copy (Falcon adds to it in place), and one
    that changes it must return a new tensor.
    """
    place, width = anatomy.place(site), anatomy.width(site)
    module = anatomy.module(model, site)
    of_units = site.kind in UNIT_KINDS  # the module may be another kind's place too (OPT)
    rows: list[int] = []  # batch size of the forward under way, for flat places

    def through(raw: Tensor) -> Tensor | None:
        kept: Kept | None = vars(module).get(KEPT) if of_units else None  # now: a toggle may come after this tap
        columns = place.columns if kept is None else kept.columns(place.columns)
        part = raw if columns is None else raw[..., slice(*columns)]
        shown = part if kept is None else kept.show(part)
        new = tap(shown.reshape(rows[-1] if place.flat else raw.shape[0], -1, *width))
        if new is None:
            return None
        new = new.reshape(shown.shape)
        new = new.to(raw.dtype) if kept is None else kept.take(new, part)
        if columns is None:
            return new
        low, high = columns
        return torch.cat([raw[..., :low], new, raw[..., high:]], dim=-1)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = through(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def on_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = through(first_tensor(output))
        return None if new is None else with_first_tensor(output, new)

    def on_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows[:] = [(args[0] if args else kwargs["hidden_states"]).shape[0]]

    if place.flat:
        block = model.get_submodule(f"{anatomy.blocks}.{site.layer}")
        handle = block.register_forward_pre_hook(on_block, with_kwargs=True)
        undo.callback(handle.remove)
    if place.side == "in":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    undo.callback(handle.remove)


def silence(model: nn.Module, anatomy: Anatomy, site: Site) -> str | None:
    """Why nothing was read at `site` in a forward: "" where nothing runs there, so that zero is what it says.

    None where no toggle stands in for a module on the way, else the reason that it gives.
    """
    module: nn.Module = model.get_submodule(f"{anatomy.blocks}.{site.layer}")
    for name in [None, *filter(None, anatomy.place(site).path.split("."))]:
        module = module if name is None else module.get_submodule(name)
        found = standing_in(module)
        if found is not None and (found.silent or found.reason):
            return found.reason
    return None


def has_units(model: nn.Module, anatomy: Anatomy, site: Site) -> bool:
    """Whether anything is left at `site` that an edit could change."""
    kept: Kept | None = vars(anatomy.module(model, site)).get(KEPT)
    return silence(model, anatomy, site) is None and (site.kind not in UNIT_KINDS or kept is None or len(kept.ids) > 0)
