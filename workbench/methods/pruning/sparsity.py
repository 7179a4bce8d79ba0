"""Which single weights of a matrix to set to zero: by magnitude, by Wanda, by chance; in rows, or n of every m.

magnitude |W_ij|; Wanda |W_ij| |X_j|, X_j what input j is over many tokens. Counts are exact and ties go by place, so
that a higher sparsity removes all that a lower one does. Sources: Wanda, Sun et al., 2023 (arXiv 2306.11695); the
thresholds of published code remove every tie, which exact counts mend; the refit is ours.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

By = Literal["magnitude", "wanda", "sparsegpt", "random"]
Per = Literal["row", "matrix"]
BY: tuple[By, ...] = ("magnitude", "wanda", "sparsegpt", "random")
DAMPING = (
    0.01  # of the mean squared input: SparseGPT's, and enough for inputs that span fewer dimensions than there are
)
REFIT_NUMBERS = 1 << 25  # numbers in memory while rows are refitted: as many rows at once as fit


def read_pattern(pattern: str) -> tuple[int, int]:
    """(n, m) of "n:m": n of every m consecutive inputs of a row become zero. ValueError for anything else."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise ValueError(
            f"sparsify: got pattern {pattern!r}, expected 'n:m' with 0 < n < m: n zeros among every m inputs. "
            "Hardware documents count what is kept: their 2:4 is ours, their 1:4 is our '3:4'."
        )
    return n, m


def magnitude(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """|W|, in float64."""
    return weight.double().abs()


def wanda(weight: Float[Tensor, "out in"], squares: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """|W_ij| times the size of input j, from its mean (or summed) squares; in float64."""
    return weight.double().abs() * squares.double().sqrt()


def chance(weight: Float[Tensor, "out in"], *seed: int) -> Float[Tensor, "out in"]:
    """A number per weight that knows nothing of it: the control."""
    drawn = np.random.default_rng(seed).random(tuple(weight.shape))
    return torch.from_numpy(drawn).to(weight.device)


def lowest(scores: Tensor, sparsity: float, *, per: Per) -> Tensor:
    """True at the lowest scores: floor(s * in) in every row, or round(s * numel) in the matrix."""
    if per == "row":
        count = math.floor(sparsity * scores.shape[1] + 1e-9)  # 0.29 * 100 is a hair below 29
        return _first(scores, count)
    return _first(scores.reshape(1, -1), round(sparsity * scores.numel())).reshape(scores.shape)


def lowest_in_groups(scores: Float[Tensor, "out in"], n: int, m: int) -> Bool[Tensor, "out in"]:
    """True at the n lowest of every m consecutive inputs in each row; inputs after the last whole group stay."""
    rows, width = scores.shape
    whole = width // m * m
    removed = torch.zeros_like(scores, dtype=torch.bool)
    groups = scores[:, :whole].reshape(-1, m)
    removed[:, :whole] = _first(groups, n).reshape(rows, whole)
    return removed


def refitted(
    weight: Float[Tensor, "out in"],
    removed: Bool[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    damping: float = DAMPING,
) -> Float[Tensor, "out in"]:
    """The best weights with these zeros: least squares row by row of (W' - W) H (W' - W)^T, damped; in float64.

    moment   H = X^T X over tokens, or its mean. It solves one system of size `in` per row: for small matrices.
    """
    damped = damp(moment, damping)
    target, kept = weight.double() @ damped, (~removed).double()  # (out, in)
    made = torch.empty_like(target)
    step = max(1, REFIT_NUMBERS // weight.shape[1] ** 2)
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(weight), step):
        rows = kept[start : start + step]
        # Zeroed inputs leave the system: their rows and columns become those of the identity, their solution 0.
        system = damped * rows[:, :, None] * rows[:, None, :] + identity * (1 - rows)[:, None, :]
        made[start : start + step] = torch.linalg.solve(system, target[start : start + step] * rows)
    return made * kept


def damp(moment: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """H plus a share of its mean diagonal, in float64. ValueError where the inputs were no finite numbers."""
    moment = moment.double()
    if not torch.isfinite(moment).all():
        raise ValueError("sparsify: got inputs that are NaN or infinite, expected numbers. Read other texts.")
    mean = float(moment.diagonal().mean())
    extra = damping * mean if mean > 0 else 1.0
    return moment + extra * torch.eye(len(moment), dtype=torch.float64, device=moment.device)


def output_error(
    weight: Float[Tensor, "out in"], sparse: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
) -> float:
    """|X W'^T - X W^T| / |X W^T|, from H = X^T X; 0 where both are nothing."""

    def size(part: Tensor) -> float:
        return float(((part @ moment.double()) * part).sum().clamp_min(0))

    lost, whole = size((sparse - weight).double()), size(weight.double())
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def _first(scores: Float[Tensor, "row number"], count: int) -> Bool[Tensor, "row number"]:
    """True at the `count` lowest of each row; of equal ones those that come first."""
    order = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
