"""Which rows and columns of a layer's weights belong to which head, key/value head or neuron: found, then proved.

Every projection of an attention module is made to say noise; a block of its rows belongs to the heads whose output it
changes: to one head (its queries), or to the heads of a group (its keys and values). No table of families. Source: own.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.anatomy import add_tap, attention_path, spread
from workbench.discovery import is_linear
from workbench.site import Site

if TYPE_CHECKING:
    from workbench.subject import Subject

SEQ = 6  # tokens of the forward that finds the rows
NOTICEABLE = 1e-3  # relative change of a head's output: noise changes it by about 1, another row of a batch by 1e-7


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The rows of one projection of an attention module.

    of_head    (head, number) output rows that only this head uses: its queries; without groups keys and values too
    of_group   (kv_head, number) output rows that all heads of a group use; number is 0 where there are none
    """

    of_head: Int[Tensor, "head number"]
    of_group: Int[Tensor, "kv_head number"]

    def left(self, heads: Int[Tensor, " kept"], groups: Int[Tensor, " kept"]) -> Int[Tensor, " rows"]:
        """The rows that are left of the projection, ascending, so that its layout stays what it was."""
        return torch.cat([self.of_head[heads].flatten(), self.of_group[groups].flatten()]).sort().values


@dataclass(frozen=True, eq=False)
class LayerUnits:
    """Where the units of one block are.

    attention     path of the attention module below the block
    heads         path -> rows of each of its projections; empty where heads can't be cut out
    gate_up       paths of the projections that make the neurons, each with how many times it holds them (fused: 2)
    down          path of the projection that reads them; None where there is none
    returns       of the block and of its attention: the length of the tuple that it returns, None for a tensor
    no_heads, no_neurons   why they can't be cut out, or ""
    """

    layer: int
    attention: str
    heads_out: str
    heads: dict[str, HeadRows] = field(default_factory=dict)
    gate_up: dict[str, int] = field(default_factory=dict)
    down: str | None = None
    returns: tuple[int | None, int | None] = (None, None)
    no_heads: str = ""
    no_neurons: str = ""


def find_units(subject: Subject) -> tuple[LayerUnits, ...]:
    """Where the units of every block of `subject` are; one forward without toggles per kind of layer."""
    with subject.untoggled():
        rows: dict[Any, dict[str, HeadRows] | str] = {}
        found, returns = [], _returns(subject)
        for layer in range(subject.n_layers):
            block = subject.model.get_submodule(f"{subject.anatomy.blocks}.{layer}")
            attention = attention_path(subject.anatomy, layer)
            kind = tuple(
                (name, type(module), tuple(getattr(module, "weight", torch.empty(0)).shape))
                for name, module in block.get_submodule(attention).named_modules()
            )
            if kind not in rows:
                rows[kind] = _head_rows(subject, layer, attention)
            found.append(_layer_units(subject, layer, attention, rows[kind], returns[layer]))
    return tuple(found)


def rows_of(linear: Any) -> Tensor:
    """The weight of a projection as (out, in): GPT-2's Conv1D holds it the other way round."""
    return linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()


def in_layout(linear: Any, rows: Tensor) -> Tensor:
    """A matrix (out, in) as the projection holds its weight."""
    return rows.T if isinstance(linear, Conv1D) else rows


def _returns(subject: Subject) -> list[tuple[int | None, int | None]]:
    """For each block, what it and its attention return."""
    found: dict[tuple[int, str], int | None] = {}

    def note(layer: int, path: str, _: nn.Module, args: Any, output: Any) -> None:
        found[layer, path] = len(output) if isinstance(output, tuple) else None

    paths = [("", attention_path(subject.anatomy, layer)) for layer in range(subject.n_layers)]
    with ExitStack() as undo, torch.no_grad():
        for layer, both in enumerate(paths):
            block = subject.model.get_submodule(f"{subject.anatomy.blocks}.{layer}")
            for path in both:
                undo.callback(block.get_submodule(path).register_forward_hook(partial(note, layer, path)).remove)
        subject.model(input_ids=torch.ones(1, 2, dtype=torch.long, device=subject.device), use_cache=False)
    return [(found[layer, block], found[layer, attention]) for layer, (block, attention) in enumerate(paths)]


def _layer_units(
    subject: Subject,
    layer: int,
    attention: str,
    rows: dict[str, HeadRows] | str,
    returns: tuple[int | None, int | None],
) -> LayerUnits:
    anatomy = subject.anatomy
    made: dict[str, Any] = {"attention": attention, "heads_out": anatomy.place(Site(layer, "heads")).path}
    made["returns"] = returns
    made |= {"no_heads": rows} if isinstance(rows, str) else {"heads": rows}
    places = anatomy.places[layer]
    if "neurons" not in places or "up" not in places:
        reason = anatomy.missing[layer].get("neurons") or anatomy.missing[layer]["up"]
        return LayerUnits(layer, **made, no_neurons=reason)
    paths = [places[kind].path for kind in ("gate", "up") if kind in places]
    gate_up = {path: paths.count(path) for path in paths}
    return LayerUnits(layer, **made, gate_up=gate_up, down=places["neurons"].path)


def _head_rows(subject: Subject, layer: int, attention: str) -> dict[str, HeadRows] | str:
    """The rows of every projection of one attention module, or why they can't be told."""
    anatomy, model = subject.anatomy, subject.model
    module = model.get_submodule(f"{anatomy.blocks}.{layer}.{attention}")
    out = anatomy.module(model, Site(layer, "heads"))
    linears = {name: one for name, one in module.named_modules() if is_linear(one) and one is not out}
    found: dict[str, Tensor] = {}
    for name, linear in linears.items():
        width = int(rows_of(linear).shape[0])
        if width % anatomy.d_head:
            return f"{name} of {type(module).__name__} has {width} rows, no multiple of d_head {anatomy.d_head}"
        found[f"{attention}.{name}"] = _changed_heads(subject, layer, linears, name, width // anatomy.d_head)
    group_of = torch.arange(anatomy.n_heads) // (anatomy.n_heads // anatomy.n_kv_heads)
    single = torch.eye(anatomy.n_heads, dtype=torch.bool)
    groups = group_of == torch.arange(anatomy.n_kv_heads)[:, None]  # (kv_head, head)
    rows = {}
    for path, changed in found.items():
        of_head, of_group = _blocks(changed, single), _blocks(changed, groups)
        if of_group is not None and anatomy.n_heads == anatomy.n_kv_heads:
            of_group = of_group[:, :0]
        if of_head is None or of_group is None or of_head.numel() + of_group.numel() != len(changed):
            return f"a part of {path} changes heads that are neither one nor a group, as where a norm spans all heads"
        rows[path] = HeadRows(spread(of_head, anatomy.d_head), spread(of_group, anatomy.d_head))
    n_single, n_group = (sum(len(getattr(r, name).T) for r in rows.values()) for name in ("of_head", "of_group"))
    expected = (anatomy.d_head * 3, 0) if len(groups) == len(single) else (anatomy.d_head, anatomy.d_head * 2)
    if (n_single, n_group) != expected:
        return f"got {n_single} rows per head and {n_group} per group in block {layer}, expected {expected}"
    return rows


def _changed_heads(subject: Subject, layer: int, linears: dict[str, nn.Module], name: str, n_blocks: int) -> Tensor:
    """(block, head) True where other noise in a block of rows of one projection changes a head's output."""
    anatomy = subject.anatomy
    generator = torch.Generator().manual_seed(0)
    heard: list[Tensor] = []

    def noise(one: str, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        said = torch.randn(1, *output.shape[1:], generator=generator).repeat(output.shape[0], 1, 1)
        if one == name:
            other = torch.randn(output.shape[1], output.shape[2], generator=generator)
            for block in range(n_blocks):
                part = slice(block * anatomy.d_head, (block + 1) * anatomy.d_head)
                said[block + 1, :, part] = other[:, part]
        return said.to(output.device, output.dtype)

    ids = torch.arange(1, SEQ + 1, device=subject.device).repeat(n_blocks + 1, 1) % anatomy.vocab
    with ExitStack() as undo, torch.no_grad():
        for one, linear in linears.items():
            undo.callback(linear.register_forward_hook(partial(noise, one)).remove)
        add_tap(subject.model, anatomy, Site(layer, "heads"), lambda value: heard.append(value.clone()), undo)
        subject.model(input_ids=ids, use_cache=False)
    value = heard[0].double()  # (1 + block, seq, head, d_head)
    moved = (value[1:] - value[:1]).flatten(3).transpose(1, 2).flatten(2).norm(dim=-1)
    return (moved > NOTICEABLE * value[:1].norm() / anatomy.n_heads**0.5).cpu()


def _blocks(changed: Tensor, wanted: Tensor) -> Tensor | None:
    """(unit, blocks) which blocks change exactly the heads of each unit; None where units differ in how many."""
    equal = (changed[None] == wanted[:, None]).all(-1)  # (unit, block)
    counts = equal.sum(1)
    if int(counts.min()) != int(counts.max()):
        return None
    return equal.nonzero()[:, 1].reshape(len(wanted), -1)
