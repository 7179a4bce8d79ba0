"""When is a feed-forward block saturated, which blocks does a token skip, and how much is that over a calibration text?

c = cos(x, x + y), x the stream before a feed-forward block and y what it adds; c >= threshold: the next `run` blocks of
the middle layers are skipped for this token. Source: FFN-SkipLLM, Jaiswal et al., 2024 (arXiv 2404.03865); no code is
public, so the rules of the middle and of the threshold are ours, and so is the test by length, |y| / |x|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Test = Literal["cosine", "relative"]
GRID = 201  # thresholds that are tried: quantiles of what was measured


def change(before: Float[Tensor, "*token d"], after: Float[Tensor, "*token d"], test: Test) -> Float[Tensor, " *token"]:
    """How far a block turned the stream (cosine), or how much it added (relative), in float32 or better.

    Half precision can't tell cosines near 1 apart: its steps there are 5e-4 and 4e-3.
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    if test == "cosine":
        return torch.nn.functional.cosine_similarity(before, after, dim=-1)
    return (after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(torch.finfo(wide).tiny)


def is_saturated(value: Tensor, threshold: float, test: Test) -> Tensor:
    """Whether a block with this cosine, or this relative length, calls for a rest."""
    return value >= threshold if test == "cosine" else value <= threshold


def still_to_skip(
    left: Int[Tensor, " *token"],
    skipped: Bool[Tensor, " *token"],
    saturated: Bool[Tensor, " *token"],
    run: int,
) -> Int[Tensor, " *token"]:
    """Blocks that each token has still to skip, after one that it skipped, or that ran and was saturated or not."""
    return torch.where(skipped, left - 1, torch.where(saturated, run, left))


def simulated(
    values: Float[Tensor, "token layer"], threshold: float, first: int, last: int, run: int | None, test: Test
) -> Bool[Tensor, "token layer"]:
    """Which blocks each token would skip, were its cosines those of the whole model.

    An approximation: a skipped block changes what the next ones get. `values` as `change` gives them.
    """
    left = torch.zeros(len(values), dtype=torch.long, device=values.device)
    skips = torch.zeros_like(values, dtype=torch.bool)
    for layer in range(first, last + 1):
        skips[:, layer] = left > 0
        saturated = is_saturated(values[:, layer], threshold, test) & (left == 0)
        left = still_to_skip(left, left > 0, saturated, values.shape[1] if run is None else run)
    return skips


def middle(values: Float[Tensor, "token layer"]) -> tuple[int, int]:
    """First and last layer of the plateau of cosines: the longest run of layers above the middle of lowest and highest.

    Layers outside stay cold: they always run. Where layers differ less than tokens do, all are the plateau.
    """
    mean, spread = values.mean(0), float(values.std(0, correction=min(1, len(values) - 1)).mean())  # one token: 0
    if float(mean.max() - mean.min()) <= spread:
        return 0, values.shape[1] - 1
    high = (mean >= (mean.min() + mean.max()) / 2).tolist()
    runs, start = [], None
    for layer, one in enumerate([*high, False]):
        if one and start is None:
            start = layer
        elif not one and start is not None:
            runs.append((start, layer - 1))
            start = None
    return max(runs, key=lambda run: run[1] - run[0])


def thresholds(values: Float[Tensor, "token layer"], first: int, last: int) -> Float[Tensor, " grid"]:
    """Thresholds worth trying: quantiles of what was measured in the middle layers, ascending."""
    measured = values[:, first : last + 1].flatten().sort().values
    places = torch.linspace(0, len(measured) - 1, GRID, dtype=torch.float64).round().long()
    return measured[places].unique()


def threshold_for(share: Callable[[float], float], candidates: Float[Tensor, " grid"], target: float) -> float:
    """The candidate whose share of skipped blocks comes nearest to the target; among equals the first."""
    return min(candidates.tolist(), key=lambda candidate: abs(share(candidate) - target))
