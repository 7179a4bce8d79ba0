"""What every bench of this package shares: medians with a cold cache, and the copy that no kernel can beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

COPIED = 2**29  # bytes: many times a second-level cache


def median_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of a call on CUDA; the second-level cache is flushed before each."""
    from triton.testing import do_bench

    return cast(float, do_bench(run, warmup=25, rep=100, return_mode="median"))


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a plain copy on this device: the roof of what is bound by memory."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / median_ms(lambda: target.copy_(source)) / 1e6


def require_cuda(device: torch.device) -> None:
    """Raise ValueError where a time would not be a GPU's."""
    if device.type != "cuda":
        raise ValueError(f"bench: got {device}, expected a CUDA device. A time on another is no time of a kernel.")


def timed(
    op: str, impl: str, run: Callable[[], object], n_bytes: int, copy: float, **case: object
) -> dict[str, object]:
    """One row of a bench: the case, milliseconds, GB/s of the bytes that must move, and its share of a copy's."""
    ms = median_ms(run)
    rate = n_bytes / ms / 1e6
    return {"op": op, **case, "impl": impl, "ms": ms, "bytes": n_bytes, "gb_per_s": rate, "share_of_copy": rate / copy}
