"""What a factorisation must beat: principal components and k-means of the same activations, in the same blocks.

Principal components: A^T A V = V L, by subspace iteration. k-means: each token to its nearest centre, each centre to
the mean of its tokens.
Sources: Halko, Martinsson and Tropp, 2011 (randomised subspace); Lloyd, 1982; Arthur and Vassilvitskii, 2007 (start).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Blocks = Sequence[Tensor]  # each (n_tokens, m), on any device; a lazy sequence may read them from disk

OVERSAMPLING, SUBSPACE_ITERATIONS = 8, 8
KMEANS_ITERATIONS = 15  # as the paper's initialisation
START_SAMPLE = 4096  # tokens among which k-means looks for its start


def mean_of(blocks: Blocks, device: torch.device | str = "cpu") -> Float[Tensor, " m"]:
    """Mean over all tokens, summed in float64."""
    total = sum((block.to(device).sum(0, dtype=torch.float64) for block in blocks), torch.zeros((), device=device))
    return total / sum(len(block) for block in blocks)


def principal_axes(
    blocks: Blocks, n_axes: int, *, seed: int = 0, centred: bool = True, device: torch.device | str = "cpu"
) -> Float[Tensor, "m n_axes"]:
    """Orthonormal axes of largest variance (about zero where not `centred`), largest first, float32.

    Never forms the m x m covariance. Axes beyond the rank of the data are arbitrary.
    """
    m = blocks[0].shape[1]
    width = min(m, n_axes + OVERSAMPLING)
    mean = mean_of(blocks, device) if centred else torch.zeros(m, dtype=torch.float64, device=device)
    start = torch.randn(m, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes = torch.linalg.qr(start.to(device)).Q
    values = torch.zeros(width, dtype=torch.float64, device=device)
    for _ in range(SUBSPACE_ITERATIONS):
        image = torch.zeros_like(axes)
        for block in blocks:
            block = block.to(device)
            scores = block @ axes.to(block.dtype) - (mean @ axes).to(block.dtype)
            image += (block.T @ scores).double() - mean[:, None] * scores.sum(0, dtype=torch.float64)
        left, values, _ = torch.linalg.svd(image, full_matrices=False)
        axes = left
    return axes[:, values.argsort(descending=True)[:n_axes]].float()


def k_means(
    blocks: Blocks, n_centres: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "n_centres m"], list[Int[Tensor, " n_tokens"]]]:
    """(centres in float32, the centre of each token, block by block). A centre that loses all tokens stays."""
    centres = _spread_start(blocks, n_centres, seed).to(device)
    nearest: list[Tensor] = []
    for _ in range(KMEANS_ITERATIONS):
        total, count = torch.zeros_like(centres, dtype=torch.float64), torch.zeros(n_centres, device=device)
        nearest = []
        for block in blocks:
            block = block.to(device, centres.dtype)
            chosen = (block @ centres.T - centres.square().sum(1) / 2).argmax(1)  # nearest: |a|^2 is common to all
            total.index_add_(0, chosen, block.double())
            count += torch.bincount(chosen, minlength=n_centres)
            nearest.append(chosen)
        moved = (total / count.clamp_min(1)[:, None]).to(centres.dtype)
        centres = torch.where(count[:, None] > 0, moved, centres)
    return centres, nearest


def _spread_start(blocks: Blocks, n_centres: int, seed: int) -> Tensor:
    """k-means++: each start is drawn with a chance that grows with its squared distance from those before it."""
    generator = torch.Generator().manual_seed(seed)
    per_block = max(1, START_SAMPLE // len(blocks))
    parts = [block[torch.randperm(len(block), generator=generator)[:per_block].to(block.device)] for block in blocks]
    sample = torch.cat([part.float().cpu() for part in parts])
    chosen = [int(torch.randint(len(sample), (), generator=generator))]
    distance = torch.full((len(sample),), torch.inf)
    for _ in range(n_centres - 1):
        distance = torch.minimum(distance, (sample - sample[chosen[-1]]).square().sum(1))
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)  # all tokens alike
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return sample[chosen]
