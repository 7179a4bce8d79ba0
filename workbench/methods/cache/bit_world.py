"""Layers of attention whose need of bits is known, and the slow search that the fast one is held to.

One key in every group is moved by -30 in all channels: its group's step grows, its own attention weight vanishes.
Source: this project.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from torch import Tensor


def world(seed: int, *, outliers: bool, n_layers: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries (4, 200, 16), keys and values (2, 200, 16) of each layer; without outliers all layers are the same."""
    made = torch.Generator().manual_seed(seed)
    query, keys, values = (torch.randn(n_layers, n, 200, 16, generator=made) for n in (4, 2, 2))
    tensors = list(zip(query, keys, values, strict=True))
    if not outliers:
        return [tensors[0]] * n_layers
    query, keys, values = tensors[0]
    keys[:, ::8] -= 30.0  # one token in every group, in all channels
    query += 1.0  # so that no query looks at such a token: only the other keys of its group suffer
    return tensors


def brute_force(errors: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """The least summed error by trying every choice."""
    layers = np.arange(len(errors))
    choices = np.array(list(product(range(errors.shape[1]), repeat=len(errors))))
    sums = errors[layers, choices].sum(axis=1)
    return float(sums[costs[layers, choices].sum(axis=1) <= budget].min())
