"""A clock for work that a device does behind Python's back: it is read once all that was asked for is done."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def read_clock(like: Tensor) -> float:
    """Seconds of a clock that only goes forward, after the device of `like` has finished."""
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
