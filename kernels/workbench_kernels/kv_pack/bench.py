"""Packing and unpacking against the copy of the same bytes, the reference, and the reference compiled."""

from __future__ import annotations

import torch

from workbench_kernels import timing
from workbench_kernels.kv_pack import kv_pack, kv_unpack, new_pages, reference
from workbench_kernels.kv_pack.pages import OF, Of

GROUP = 32
CASES: list[
    tuple[Of, int, int, int, int]
] = [  # of, units, tokens of a unit, width, bits: 8 heads of 32768 tokens, then one flush of 32 rows
    (of, units, GROUP * 8 // bits, 128, bits)
    for bits in (2, 4, 8)
    for of in OF
    for units in (8 * 32768 * bits // 256, 8 * 32)
]


def rows(device: torch.device | str = "cuda") -> list[dict[str, object]]:
    """One row per case and implementation; equality with the reference first. Raises ValueError without CUDA."""
    device = torch.device(device)
    timing.require_cuda(device)
    copy = timing.copy_gb_per_s(device)
    return [row for case in CASES for row in _case(*case, device, copy)]


def _case(
    of: Of, units: int, tokens: int, width: int, bits: int, device: torch.device, copy: float
) -> list[dict[str, object]]:
    x = torch.randn(units, tokens, width, device=device, dtype=torch.float16)
    pages = new_pages(units, tokens, width, bits, of, device=device)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    made, _ = reference.pack(x, bits, of, GROUP)
    kv_pack(x, bits, of, out=pages, bad=bad, impl="triton")
    for ours, theirs in zip(pages, made, strict=True):
        assert torch.equal(ours, theirs), f"kv_pack: {of} at {bits} bits are not the reference's"
    back = kv_unpack(pages, bits, of, dtype=x.dtype, impl="triton")
    assert torch.equal(back, reference.unpack(made, bits, of, GROUP, x.dtype)), f"kv_unpack: {of} at {bits} bits differ"
    torch.compiler.reset()  # beyond 8 shapes it would fall back to plain PyTorch in silence
    compiled = torch.compile(reference.pack, dynamic=False)
    rivals = {
        ("kv_pack", "triton"): lambda: kv_pack(x, bits, of, out=pages, bad=bad, impl="triton"),
        ("kv_pack", "reference"): lambda: reference.pack(x, bits, of, GROUP),
        ("kv_pack", "compiled"): lambda: compiled(x, bits, of, GROUP),
        ("kv_unpack", "triton"): lambda: kv_unpack(pages, bits, of, dtype=x.dtype, impl="triton"),
        ("kv_unpack", "reference"): lambda: reference.unpack(pages, bits, of, GROUP, x.dtype),
    }
    moved = x.nbytes + sum(part.nbytes for part in pages)
    case = {"of": of, "units": units, "tokens": tokens, "width": width, "bits": bits}
    return [timing.timed(op, impl, run, moved, copy, **case) for (op, impl), run in rivals.items()]
