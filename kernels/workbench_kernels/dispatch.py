"""Which implementation answers a call: decided by the tensors of that call, and never changed silently.

auto        Triton where all tensors are on one CUDA device and triton is installed, else the reference
triton      Triton, or an error with the cure
reference   plain PyTorch, anywhere
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

Impl = Literal["auto", "triton", "reference"]
IMPLS = ("auto", "triton", "reference")


def choose(impl: str, *tensors: Tensor | None) -> Literal["triton", "reference"]:
    """The implementation for these tensors; None among them is skipped.

    Raises ValueError for an unknown name, for tensors on several devices, and for "triton" where it can't run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}, expected one of {', '.join(IMPLS)}.")
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"impl: got tensors on {found}, expected all on one device.")
    kind = devices.pop().type
    if impl == "reference" or (impl == "auto" and (kind != "cuda" or not has_triton())):
        return "reference"
    if not has_triton():
        raise ValueError("impl: got 'triton', but triton is not installed. Install it, or pass impl='reference'.")
    if kind != "cuda" and not interpreting():
        raise ValueError(
            f"impl: got 'triton' for tensors on {kind}, expected CUDA. Move them, pass impl='reference', or set "
            "TRITON_INTERPRET=1 before Python starts to run kernels slowly on the CPU."
        )
    return "triton"


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; one that is and fails raises at its import."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: decided when triton is imported, by TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
