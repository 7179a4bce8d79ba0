"""How many tokens of a prompt go on to each layer, and which: the closed form of a pyramid, and its scores.

n_0 = T, n_(l+1) = floor(r_l (n_l - 1 - R)) + 1 + R, R = floor(recent T): the context shrinks by a rate that falls with
depth, the newest tokens stay. Source: PyramidInfer, Yang et al., 2024 (arXiv 2405.12532).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.methods.cache.budgets import best

Schedule = Literal["cosine", "linear"]
NEWEST = 1.2  # weight of the newest row that scores; the oldest has 1


def rates(n_layers: int, decay: float, schedule: Schedule = "cosine") -> list[float]:
    """Share of its context that each layer hands on: 1 after layer 0, falling towards `decay`, which no layer reaches.

    The paper's code has a linear schedule that rises, and never uses it; this one falls.
    """
    if schedule == "cosine":
        falling = [(math.cos(math.pi * layer / n_layers) + 1) / 2 for layer in range(n_layers)]
    else:
        falling = [1 - layer / n_layers for layer in range(n_layers)]
    return [decay + (1 - decay) * height for height in falling]


def lengths(
    tokens: int,
    n_layers: int,
    *,
    decay: float = 0.9,
    recent: float = 0.2,
    schedule: Schedule = "cosine",
    interval: int = 1,
    min_context: int = 64,
) -> list[int]:
    """Tokens of a prompt of `tokens` that enter each layer, and that it caches.

    decay       the rate of the deepest layers; rates multiply, so 0.9 keeps far less than 90 %
    recent      share of the prompt that always goes on, in addition to its last token
    interval    layers between two reductions        min_context   a context is never cut to so few or fewer
    """
    n_recent = newest(tokens, recent)
    floor, n, entering = min(min_context, tokens - n_recent), tokens, []
    for layer, rate in enumerate(rates(n_layers, decay, schedule)):
        entering.append(n)
        context = n - n_recent
        if layer % interval == 0 and context > floor and rate < 1:
            kept = int(context * rate)
            n = (kept if kept > floor else context) + n_recent
    return entering


def newest(tokens: int, recent: float) -> int:
    """Newest tokens that always go on: the last one, and a share of the prompt before it."""
    return min(tokens, 1 + int(tokens * recent))


def flops_fraction(entering: Sequence[int], *, weights: int, width: int) -> float:
    """Multiplications of a prompt's forward through the blocks, relative to all tokens going through all of them.

    weights   parameters that one token meets in the matrix products of a block
    width     query heads times their size; causal attention costs n^2 width, keys and values together
    """
    full = entering[0]
    cost = sum(n * weights + n * n * width for n in entering)
    return cost / (len(entering) * (full * weights + full * full * width))


def row_weights(
    positions: Int[Tensor, "batch query"], last: Int[Tensor, "batch 1"], rows: Int[Tensor, "batch 1"]
) -> Float[Tensor, "batch query"]:
    """Weight of each query's row of attention: rising from 1 to `NEWEST` over the `rows` newest, 0 for all others."""
    age = last - positions
    rise = (rows - 1 - age) / (rows - 1).clamp_min(1)
    return (1 + (NEWEST - 1) * rise).where((age >= 0) & (age < rows), 0.0)


def going_on(
    scores: Float[Tensor, "batch slot"],
    positions: Int[Tensor, "batch slot"],
    counts: Int[Tensor, " batch"],
    *,
    sinks: int,
    recent: Int[Tensor, "batch 1"],
) -> Bool[Tensor, "batch slot"]:
    """The `counts` tokens of each row that go on: its first and its newest ones, then the best context tokens.

    positions   -1 where a slot is empty        recent   newest tokens of each row, its last one included
    """
    last = positions.amax(1, keepdim=True)
    forced = (positions < sinks) | (positions > last - recent)
    chosen = best(scores[:, None], (positions >= 0)[:, None], forced[:, None], counts[:, None])
    return chosen[:, 0]


def thinned(
    scores: Float[Tensor, "batch slot"],
    positions: Int[Tensor, "batch slot"],
    starts: Int[Tensor, " batch"],
    due: Int[Tensor, " batch"],
    *,
    block: int,
    count: int,
) -> Bool[Tensor, "batch slot"]:
    """True at all slots but those dropped: of each of a row's `due` blocks from position `starts` on, `count` stay.

    A token of a block that is missing here is held elsewhere, and takes its place among those that stay.
    """
    keep = torch.ones_like(positions, dtype=torch.bool)
    number = torch.div(positions - starts[:, None], block, rounding_mode="floor")
    for index in range(int(due.max())):
        inside = (number == index) & (positions >= 0) & (index < due)[:, None]
        left = (count - block + inside.sum(1)).clamp_min(0)
        chosen = best(scores[:, None], inside[:, None], torch.zeros_like(inside)[:, None], left[:, None])[:, 0]
        keep &= chosen | ~inside
    return keep
