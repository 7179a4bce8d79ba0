"""Scales on which mechanisms can be compared: 1 is as before, 0 is gone.

above chance   (after - chance) / (before - chance)
sets           (J - J0) / (1 - J0), J the Jaccard overlap, J0 that of sets of the same sizes drawn at random
features       (c - c0) / (1 - c0), c the mean cosine of matched features, c0 with their neurons shuffled
profiles       1 - |after - before|_1 / |flat - before|_1
Source: Jaccard, 1901; the correction for chance after Hubert and Arabie, 1985 (for partitions); profiles are ours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workbench.methods.snmf.factorise import matched_cosines

N_SHUFFLES = 20


def above_chance(before: float, after: float, chance: float = 0.0) -> float:
    """What is left of a score that is `chance` where nothing is known; negative where it falls below that."""
    if not before > chance:
        raise ValueError(f"above_chance: got {before:.3g} before and a chance of {chance:.3g}, expected more before.")
    return (after - chance) / (before - chance)


def overlap_above_chance(before: np.ndarray, after: np.ndarray) -> float:
    """Overlap of two sets given as boolean masks (..., unit): units are exchangeable along the last axis only.

    So the same number of units in the same layers, but other units, is 0. Two empty sets have no overlap: NaN.
    """
    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    sizes = a.sum(-1, dtype=np.float64), b.sum(-1, dtype=np.float64)
    total = float(sizes[0].sum() + sizes[1].sum())
    if a.shape != b.shape:
        raise ValueError(f"overlap: got masks of shape {a.shape} and {b.shape}, expected the same units.")
    if not total:
        return float("nan")
    common, by_chance = float((a & b).sum()), float((sizes[0] * sizes[1]).sum()) / a.shape[-1]
    found, drawn = common / (total - common), by_chance / (total - by_chance)
    return (found - drawn) / (1.0 - drawn) if drawn < 1.0 else 1.0


def features_above_chance(before: Tensor, after: Tensor, seed: int = 0) -> float:
    """Mean cosine of features (neuron, feature), matched one to one, sign included: 0 where only shapes are alike."""
    draw = torch.Generator().manual_seed(seed)
    shuffled = [after[torch.randperm(len(after), generator=draw)] for _ in range(N_SHUFFLES)]
    by_chance = float(np.mean([float(matched_cosines(before, one).nanmean()) for one in shuffled]))
    return (float(matched_cosines(before, after).nanmean()) - by_chance) / (1.0 - by_chance)


def profile_agreement(before: np.ndarray, after: np.ndarray, flat: float) -> float:
    """How near two profiles are, as a share of how far the first is from a flat one that says nothing."""
    far = float(np.abs(flat - before).sum())
    if not far:
        raise ValueError(f"profile_agreement: the first profile is {flat:.3g} everywhere, expected one that says more.")
    return 1.0 - float(np.abs(after - before).sum()) / far
