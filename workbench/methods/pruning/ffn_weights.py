"""The weights of one feed-forward block in one layout for all families, as they are by now, and its activation.

neurons = act(gate x) * up x, or act(up x) where there is no gate; y = down neurons + bias. Source: own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.anatomy import KEPT, Kept, add_tap
from workbench.discovery import is_linear
from workbench.pruned.blocks import block_of
from workbench.pruned.cut import plain_weight
from workbench.site import Site
from workbench.tokens import batches

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True, eq=False)
class Rows:
    """What some neurons read: a row each, and its bias."""

    weight: Float[Tensor, "neuron d_model"]
    bias: Float[Tensor, " neuron"] | None

    def __call__(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token neuron"]:
        return nn.functional.linear(x, self.weight, self.bias)

    def take(self, places: Tensor) -> Rows:
        """Some of the rows, in memory of their own."""
        return Rows(self.weight[places].contiguous(), None if self.bias is None else self.bias[places])

    def above(self, other: Rows) -> Rows:
        """These rows and then the other ones."""
        biases = None if self.bias is None or other.bias is None else torch.cat([self.bias, other.bias])
        return Rows(torch.cat([self.weight, other.weight]), biases)

    @property
    def normed(self) -> Rows:
        """Rows of norm 1, biases along with them."""
        norm = self.weight.norm(dim=1).clamp_min(torch.finfo(self.weight.dtype).tiny)
        return Rows(self.weight / norm[:, None], None if self.bias is None else self.bias / norm)


@dataclass(frozen=True, eq=False)
class FFNWeights:
    """One block: what its neurons read and write. `units` are their original numbers: removed ones are left out."""

    units: Int[Tensor, " neuron"]
    gate: Rows | None
    up: Rows
    down: Float[Tensor, "d_model neuron"]
    bias: Float[Tensor, " d_model"] | None
    act: nn.Module

    @classmethod
    def of(cls, subject: Subject, layer: int) -> FFNWeights:
        """The weights that act now. ValueError in words where a block has no neurons that can be told apart."""
        for kind in ("neurons", "up"):
            subject.anatomy.place(Site(layer, kind))
        gate = _rows(subject, layer, "gate") if "gate" in subject.anatomy.places[layer] else None
        module: Any = subject.anatomy.module(subject.model, Site(layer, "neurons"))
        kept: Kept | None = vars(module).get(KEPT)
        weight, bias = plain_weight(module), module._parameters.get("bias")
        down = weight if isinstance(module, nn.Linear) else weight.T  # GPT-2's Conv1D is (in, out)
        units = torch.arange(subject.anatomy.d_mlp or 0) if kept is None else kept.ids
        if kept is not None:
            down = down.index_select(1, kept.places.to(down.device))
        block = block_of(subject, layer)  # blocks of one class have it in one place: found once for all
        path = subject.remember(("activation", type(block).__name__), lambda: activation(subject, layer))
        act = block.get_submodule(path)
        return cls(units, gate, _rows(subject, layer, "up"), down, None if bias is None else bias.detach(), act)

    def places_of(self, units: Sequence[int]) -> Int[Tensor, " places"]:
        """Where neurons stand among those that are left, of the ones that are."""
        wanted = torch.tensor(sorted(set(units) & set(self.units.tolist())), dtype=torch.long)
        return torch.searchsorted(self.units, wanted).to(self.down.device)

    def said(self, x: Float[Tensor, "token d_model"], *, normed: bool = False) -> Float[Tensor, "token neuron"]:
        """What the neurons say; `normed`: with inputs and rows of norm 1."""
        if not normed:
            return self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        length = x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        up = self.up.normed(x) / length
        return self.act(up) if self.gate is None else self.act(self.gate.normed(x) / length) * up


@torch.no_grad()
def activation(subject: Subject, layer: int) -> str:
    """Path of a block's activation function: what makes its neurons of gate and up, without any toggle."""
    anatomy, model = subject.anatomy, subject.model
    heard: dict[str, Tensor] = {}
    ids = torch.arange(1, 9, device=subject.device)[None] % anatomy.vocab

    def note(kind: str, value: Tensor) -> None:
        heard[kind] = value.clone()

    kinds = [kind for kind in ("gate", "up", "neurons") if kind in anatomy.places[layer]]
    with subject.untoggled(), ExitStack() as undo:
        for kind in kinds:
            add_tap(model, anatomy, Site(layer, kind), partial(note, kind), undo)  # type: ignore[arg-type]
        model(input_ids=ids, use_cache=False)
    neurons = heard["neurons"].double()
    for path, module in block_of(subject, layer).named_modules():
        if next(module.children(), None) is None and next(module.parameters(), None) is None:
            made = module(heard["gate"]) * heard["up"] if "gate" in heard else module(heard["up"])
            if made.shape == neurons.shape and float((made.double() - neurons).norm()) <= 1e-2 * float(neurons.norm()):
                return path
    raise ValueError(f"{subject.name}: no module of block {layer} is the activation that makes its neurons.")


@torch.no_grad()
def ffn_inputs(
    subject: Subject, texts: Sequence[Sequence[int]], layer: int, tokens: int, seed: int, batch: int = 4096
) -> Float[Tensor, "token d_model"]:
    """What the feed-forward block reads of texts (token ids) under the active toggles: at most `tokens` rows.

    Which texts and tokens, `seed` draws. Texts of one length share a batch, so that nothing is padded.
    """
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    before = [0, *accumulate(len(texts[row]) for row in drawn)]
    texts = [texts[row] for row, sum_before in zip(drawn, before, strict=False) if sum_before < tokens]
    found: list[Tensor] = []
    entry = block_of(subject, layer).get_submodule(subject.anatomy.place(Site(layer, "up")).path)
    with ExitStack() as undo:
        handle = entry.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2).clone()))
        undo.callback(handle.remove)
        for rows in batches([len(ids) for ids in texts], batch, even=True):
            given = torch.tensor([list(texts[row]) for row in rows], device=subject.device)
            subject.model(input_ids=given, use_cache=False)
    x = torch.cat(found) if found else torch.zeros(0, subject.anatomy.d_model)
    return x[:tokens]


def _rows(subject: Subject, layer: int, kind: str) -> Rows:
    site = Site(layer, kind)  # type: ignore[arg-type]
    module: Any = subject.anatomy.module(subject.model, site)
    assert is_linear(module)
    kept: Kept | None = vars(module).get(KEPT)
    place = subject.anatomy.place(site)
    part = slice(*(place.columns if kept is None else kept.columns(place.columns)) or (None,))
    weight, bias = plain_weight(module), module._parameters.get("bias")
    rows = (weight if isinstance(module, nn.Linear) else weight.T)[part]
    bias = None if bias is None else bias.detach()[part]
    return Rows(rows, bias) if kept is None else Rows(rows, bias).take(kept.places.to(rows.device))
