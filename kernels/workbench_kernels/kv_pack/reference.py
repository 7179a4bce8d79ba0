"""Minimum, step, codes and planes of keys and values in plain PyTorch: what the kernel must equal bit for bit.

s = half((max - min) / (2^b - 1)), m = half(min), c = round((x - m) / s) to even, in 0 .. 2^b - 1; x_hat = c s + m.
All in float32, against the stored float16 s and m. Source: KIVI, Liu et al., 2024 (arXiv 2402.02750); the stored-step
codes and the planes are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.kv_pack.pages import Of, Pages, channels


def pack(x: Tensor, bits: int, of: Of, group: int) -> tuple[Pages, Tensor]:
    """(pages, whether a group can't be represented, bool ()) of x (unit, token, width)."""
    axis, size = (1, group) if of == "keys" else (2, channels(x.shape[2], group))
    grouped = x.float().unflatten(axis, (-1, size))
    low, high = grouped.amin(axis + 1, keepdim=True), grouped.amax(axis + 1, keepdim=True)
    top = torch.full((), 2.0**bits - 1, device=x.device)  # a Python number here: CUDA multiplies by its reciprocal
    step, base = ((high - low) / top).half(), low.half()
    bad = ~(torch.isfinite(step) & torch.isfinite(base)).all()
    safe = torch.where(step > 0, step, 1.0).float()
    codes = torch.round((grouped - base.float()) / safe).clamp(0, 2**bits - 1)
    codes = torch.where(step > 0, codes, 0.0).to(torch.uint8).flatten(axis, axis + 1)
    return Pages(planes(codes, bits, group), step.squeeze(axis + 1), base.squeeze(axis + 1)), bad


def unpack(pages: Pages, bits: int, of: Of, group: int, dtype: torch.dtype) -> Tensor:
    """x_hat (unit, token, width): computed in float32, rounded once to `dtype`."""
    axis = 1 if of == "keys" else 2
    codes = unplaned(pages.rows, bits, group).float()
    grouped = codes.unflatten(axis, (pages.step.shape[axis], -1))
    step, base = pages.step.float().unsqueeze(axis + 1), pages.base.float().unsqueeze(axis + 1)
    return (grouped * step + base).flatten(axis, axis + 1).to(dtype)


def planes(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes (unit, token, width) uint8 as bytes (unit, token * bits / 8, width)."""
    split = codes.unflatten(1, (-1, 8 // bits, group))  # (unit, block, plane, group, width)
    packed = torch.zeros_like(split[:, :, 0])
    for plane in range(8 // bits):
        packed |= split[:, :, plane] << plane * bits
    return packed.flatten(1, 2)


def unplaned(rows: Tensor, bits: int, group: int) -> Tensor:
    """The codes (unit, token, width) of bytes."""
    blocks = rows.unflatten(1, (-1, group))  # (unit, block, group, width)
    split = [blocks >> plane * bits & 2**bits - 1 for plane in range(8 // bits)]
    return torch.stack(split, 2).flatten(1, 3)
