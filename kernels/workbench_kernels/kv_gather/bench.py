"""Eviction of a layer against boolean indexing, tensor by tensor, and against a gather of equal budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels import timing
from workbench_kernels.kv_gather import kv_gather, reference

CASES = [(1, 8192, 0.5), (1, 32768, 0.25), (8, 32768, 0.25), (8, 32768, 0.9)]  # batch, slots, share that is kept
HEADS, WIDTH = 8, 128


def rows(device: torch.device | str = "cuda") -> list[dict[str, object]]:
    """One row per case and implementation; equality with the reference first. Raises ValueError without CUDA."""
    device = torch.device(device)
    timing.require_cuda(device)
    copy = timing.copy_gb_per_s(device)
    return [row for case in CASES for row in _case(*case, device, copy)]


def _case(batch: int, slots: int, share: float, device: torch.device, copy: float) -> list[dict[str, object]]:
    shape = (batch, HEADS, slots)
    scores = torch.rand(shape, device=device)
    keys, values = (torch.randn(*shape, WIDTH, device=device, dtype=torch.float16) for _ in range(2))
    positions = torch.arange(slots, device=device, dtype=torch.int32).expand(shape)
    tensors: tuple[Tensor, ...] = (keys, values, positions, scores)
    keep = scores > 1 - share  # by chance, heads keep different numbers
    total = int(keep.sum())
    made = kv_gather(tensors, keep, room=total, impl="triton")
    for ours, theirs in zip(made.tensors, reference.gather(tensors, keep), strict=True):
        assert torch.equal(ours, theirs), "kv_gather: kept tokens are not the reference's"
    best = scores.topk(total // (batch * HEADS), -1).indices.sort(-1).values
    rivals = {
        "triton": lambda: kv_gather(tensors, keep, room=total, impl="triton"),
        "triton, room unknown": lambda: kv_gather(tensors, keep, impl="triton"),
        "reference": lambda: (reference.gather(tensors, keep), reference.kept_counts(keep, None)),
        "equal budgets": lambda: [_gathered(tensor, best) for tensor in tensors],
    }
    bytes_of_token = sum(tensor.element_size() * (WIDTH if tensor.dim() == 4 else 1) for tensor in tensors)
    moved = 2 * total * bytes_of_token + keep.numel()  # what is kept is read and written, the mask read
    case = {"batch": batch, "slots": slots, "share": share, "freed_bytes": (keep.numel() - total) * bytes_of_token}
    return [timing.timed("kv_gather", impl, run, moved, copy, **case) for impl, run in rivals.items()]


def _gathered(tensor: Tensor, best: Tensor) -> Tensor:
    index = best[..., None].expand(*best.shape, tensor.shape[-1]) if tensor.dim() == 4 else best
    return tensor.gather(2, index)
