"""The tokens that a selection keeps, end to end and in order, in plain PyTorch: what the kernel must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather(tensors: Sequence[Tensor], keep: Tensor) -> tuple[Tensor, ...]:
    """Each tensor (*keep.shape, ...) at the places where `keep` is true: (kept, ...), segment after segment."""
    return tuple(tensor[keep] for tensor in tensors)


def kept_counts(keep: Tensor, counts: Tensor | None) -> Tensor:
    """Kept tokens of every segment, (batch, kv_head) int32, one segment after another."""
    if counts is None:
        return keep.sum(-1, dtype=torch.int32)
    found, start = torch.zeros_like(counts, dtype=torch.int32), 0
    for segment, size in enumerate(counts.flatten().tolist()):
        found.view(-1)[segment] = keep[start : start + size].sum()
        start += size
    return found
