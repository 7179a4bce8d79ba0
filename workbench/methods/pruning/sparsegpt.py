"""SparseGPT: zero the weights of a matrix column by column and let the later columns make up for what is lost.

e = (w_i - q_i) / U_ii;  W[:, i:] -= e U[i, i:],  H^-1 = U^T U with U upper triangular, H = X^T X + damping.
In blocks of columns: which of a block's weights go is decided when the sweep reaches it, the same share in each block.
Source: Frantar and Alistarh, 2023 (arXiv 2301.00774). Ours: a random order of columns, as equal shares per block make
their order matter; unused inputs cost nothing instead of being removed beyond the share; exact counts; float64.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.methods.pruning.sparsity import DAMPING, damp, lowest_in_groups

Order = Literal["random", "given", "rising", "falling"]
ORDERS: tuple[str, ...] = get_args(Order)


def sparsegpt(
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    sparsity: float = 0.5,
    *,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    permute: Order = "random",
    damping: float = DAMPING,
    seed: int = 0,
) -> Float[Tensor, "out in"]:
    """`weight` with round(s * numel) zeros, or n in every m inputs, and the rest repaired; in float64.

    moment    H = X^T X over tokens, or its mean: the answer doesn't depend on its scale
    block     columns that are decided upon together, each block with the same share of zeros
    permute   the order in which columns are swept: random, given, or by rising or falling input energy
    With a pattern whole groups of m inputs trade places; inputs after the last whole group are repaired, not zeroed.
    Raises ValueError for inputs that are no finite numbers.
    """
    weight = weight.double()
    if sparsity == 0 and pattern is None:
        return weight.clone()
    if sparsity == 1:
        return torch.zeros_like(weight)
    order = column_order(moment.diagonal(), permute, 1 if pattern is None else pattern[1], seed)
    swept, used = moment[order][:, order], moment.diagonal()[order] > 0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damp(swept, damping)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    made = torch.empty_like(weight)
    made[:, order] = _swept(weight[:, order], upper, used, sparsity, pattern, block)
    return made


def column_order(energy: Float[Tensor, " in"], permute: str, group: int = 1, seed: int = 0) -> Int[Tensor, " in"]:
    """The order of the sweep over columns, in whole groups of `group`; what is left of a last group comes last."""
    if permute not in ORDERS:
        raise ValueError(f"sparsegpt: got permute {permute!r}, expected one of {', '.join(ORDERS)}.")
    whole = len(energy) // group
    if permute == "random":
        order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))
    elif permute == "given":
        order = torch.arange(whole)
    else:
        size = energy[: whole * group].reshape(whole, group).sum(1).cpu()
        order = size.sort(stable=True, descending=permute == "falling").indices
    columns = (order[:, None] * group + torch.arange(group)).flatten()
    return torch.cat([columns, torch.arange(whole * group, len(energy))]).to(energy.device)


def _swept(
    weight: Tensor, upper: Tensor, used: Tensor, sparsity: float, pattern: tuple[int, int] | None, block: int
) -> Tensor:
    """The sweep over columns in the order in which they are given."""
    width = weight.shape[1]
    block = min(block, width) if pattern is None else max(1, block // pattern[1]) * pattern[1]
    weight, made = weight.clone(), torch.zeros_like(weight)
    for start in range(0, width, block):
        part = slice(start, min(start + block, width))
        size = part.stop - part.start
        current, inner, cost = weight[:, part].clone(), upper[part, part], upper.diagonal()[part]
        removed = _removed(current, cost, used[part], sparsity, start) if pattern is None else None
        errors = torch.zeros_like(current)
        for i in range(size):
            if pattern is not None and i % pattern[1] == 0:  # decided when the sweep is there, by what the weights are
                removed = _removed_of_group(current, cost, used[part], pattern, i, removed)
            assert removed is not None
            made[:, start + i] = current[:, i].masked_fill(removed[:, i], 0.0)
            errors[:, i] = (current[:, i] - made[:, start + i]) / inner[i, i]
            current[:, i:] -= errors[:, i, None] * inner[i, i:]
        weight[:, part.stop :] -= errors @ upper[part, part.stop :]
    return made


def _removed(weight: Tensor, cost: Tensor, used: Tensor, sparsity: float, start: int) -> Bool[Tensor, "out block"]:
    """The weights of a block that go: the share of all columns so far, less what went before."""
    rows, width = weight.shape
    count = round(sparsity * rows * (start + width)) - round(sparsity * rows * start)
    order = _loss(weight, cost, used).flatten().sort(stable=True).indices[:count]
    removed = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    return removed.index_fill(0, order, True).reshape(rows, width)


def _removed_of_group(
    weight: Tensor, cost: Tensor, used: Tensor, pattern: tuple[int, int], start: int, before: Tensor | None
) -> Bool[Tensor, "out block"]:
    """The weights that go, with those of the group of inputs that begins at `start`."""
    removed = torch.zeros_like(weight, dtype=torch.bool) if before is None else before
    part = slice(start, start + pattern[1])
    removed[:, part] = lowest_in_groups(_loss(weight[:, part], cost[part], used[part]), *pattern)
    return removed


def _loss(weight: Tensor, cost: Tensor, used: Tensor) -> Tensor:
    """What it costs to zero each weight, after the best repair: w^2 / U_ii^2; an input that is never there costs 0."""
    return (weight / cost).square() * used
