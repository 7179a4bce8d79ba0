"""The tensors of a block while those of another are fused into them.

W' = W + B A + (P Q) o W_i for a matrix, b' = b + c o b_i for its bias, g' = g + d for a norm; B, P, c and d start at
zero, so that W' = W at first, to the bit. Source: FuseGPT, Pan et al., 2024 (arXiv 2411.14507); biases are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from workbench.pruned.blocks import block_of

if TYPE_CHECKING:
    from workbench.subject import Subject

Donor = Literal["block", "shuffled", "none"]


@dataclass(eq=False)
class Graft:
    """One tensor of a neighbour while it learns.

    base           trained, added: B, A of a matrix; the change of a norm; nothing of a bias
    coefficients   trained, times the donor: P, Q of a matrix; one number per number of a bias
    """

    weight: Tensor
    donor: Tensor | None
    base: list[Tensor] = field(default_factory=list)
    coefficients: list[Tensor] = field(default_factory=list)

    def fused(self) -> Tensor | None:
        """What comes from the donor."""
        if self.donor is None or not self.coefficients:
            return None
        return _product(self.coefficients) * self.donor.to(self.coefficients[0].dtype)

    def value(self) -> Tensor:
        """W', in the dtype of the model; sums are float32 or better."""
        parts = [_product(self.base) if self.base else None, self.fused()]
        total = self.weight
        for part in parts:
            total = total if part is None else total.to(part.dtype) + part
        return total.to(self.weight.dtype)


def make_grafts(
    subject: Subject, group: Sequence[int], block: int, *, rank: int, donor: Donor, dice: torch.Generator
) -> dict[str, Graft]:
    """Untrained grafts for every parameter of the group's other blocks. ValueError where blocks are not alike."""
    leaving = dict(block_of(subject, block).named_parameters())
    grafts: dict[str, Graft] = {}
    for other in (layer for layer in group if layer != block):
        module = block_of(subject, other)
        parameters = dict(module.named_parameters())
        for name in dict.fromkeys([*leaving, *parameters]):
            shapes = [tuple(held[name].shape) if name in held else None for held in (leaving, parameters)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"FuseBlocks: {name} is {shapes[0]} in block {block} and {shapes[1]} in block {other}, expected "
                    "blocks of one shape. Use a smaller group, or DropBlocks."
                )
            if not parameters[name].is_floating_point() or parameters[name].is_meta:
                raise ValueError(f"FuseBlocks: {name} of block {other} is packed or elsewhere, expected plain numbers.")
            given = _given(leaving[name].detach(), donor, dice)
            graft = _graft(parameters[name].detach(), given, rank, dice, bias=_is_bias(module, name))
            if graft.base or graft.coefficients:
                grafts[f"{other}.{name}"] = graft
    return grafts


def share_of_donor(grafts: Mapping[str, Graft], layer: int) -> float:
    """|C o W_i| / |W'| over the tensors of one block."""
    fused = whole = 0.0
    for name, graft in grafts.items():
        part = graft.fused() if name.startswith(f"{layer}.") else None
        if part is not None:
            fused += float(part.detach().double().square().sum())
            whole += float(graft.value().detach().double().square().sum())
    return math.sqrt(fused / whole) if whole else 0.0


def _given(tensor: Tensor, donor: Donor, dice: torch.Generator) -> Tensor | None:
    """What is added of a tensor of the leaving block, or what stands in for it in a control."""
    if donor == "shuffled":
        order = torch.randperm(tensor.numel(), generator=dice).to(tensor.device)
        return tensor.reshape(-1)[order].reshape(tensor.shape)
    return tensor if donor == "block" else None


def _graft(weight: Tensor, given: Tensor | None, rank: int, dice: torch.Generator, *, bias: bool) -> Graft:
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=weight.device, requires_grad=True)

    def pair() -> list[Tensor]:
        *stack, rows, columns = weight.shape  # experts come in stacks of matrices
        inner = min(rank, rows, columns)
        drawn = (torch.rand(*stack, inner, columns, generator=dice, dtype=dtype) * 2 - 1) * columns**-0.5  # Kaiming's
        return [zeros(*stack, rows, inner), drawn.to(weight.device).requires_grad_()]

    if weight.dim() >= 2:
        return Graft(weight, given, pair(), [] if given is None else pair())
    if bias:
        return Graft(weight, given, [], [] if given is None else [zeros(*weight.shape)])
    return Graft(weight, None, [zeros(*weight.shape)])


def _product(factors: list[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


def _is_bias(block: nn.Module, name: str) -> bool:
    """Whether a parameter is the bias of a projection; that of a norm belongs to the norm."""
    path, _, last = name.rpartition(".")
    weight = block.get_submodule(path)._parameters.get("weight")
    return last == "bias" and weight is not None and weight.dim() >= 2
