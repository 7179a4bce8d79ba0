"""The control of every direction: random directions of the same norm, and the band in which their effects lie.

band = mean -+ t_{n-1} s sqrt(1 + 1/n): where the effect of one more random direction would fall, at level .95.
Source: the prediction interval of a normal sample (Fisher, 1935); random directions as control: Arditi et al. 2024.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor


def random_units(count: int, width: int, seed: int) -> Float[Tensor, "direction width"]:
    """Unit vectors of random orientation, float64."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise / noise.norm(dim=1, keepdim=True)


def prediction_band(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of one more draw, from the draws along the last axis; infinitely wide for fewer than two draws.

    A few draws make it wide: what lies outside is no accident of the few.
    """
    values = np.asarray(values, dtype=np.float64)
    n = values.shape[-1]
    if n < 2:
        wide = np.full(values.shape[:-1], np.inf)
        return -wide, wide
    half = stdtrit(n - 1, 0.5 + level / 2) * values.std(axis=-1, ddof=1) * np.sqrt(1 + 1 / n)
    return values.mean(axis=-1) - half, values.mean(axis=-1) + half
