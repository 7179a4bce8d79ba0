"""Keys and values in 2, 4 or 8 bits, packed and unpacked: one pass over the numbers, into pages that already exist.

Keys have one step per channel and group of tokens, values one per token and group of channels: see `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import choose
from workbench_kernels.kv_pack import reference
from workbench_kernels.kv_pack.pages import Of, Pages, channels, new_pages, part_of, shapes

__all__ = ["Of", "Pages", "channels", "kv_pack", "kv_unpack", "new_pages", "refuse_bad"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def kv_pack(
    x: Tensor,
    bits: int,
    of: Of,
    *,
    group: int = 32,
    out: Pages | None = None,
    start: int = 0,
    bad: Tensor | None = None,
    impl: str = "auto",
) -> Pages:
    """Pages of x (unit, token, width), of any strides, in float32, float16 or bfloat16.

    of      "keys": groups of `group` tokens of a channel; "values": groups of `group` channels of a token (of all where
            `group` does not divide the width)
    out     pages to write into, units [start, start + n); what comes back are views of them. None makes new ones
    bad     int32 (1,) that is set to 1 where a group can't be represented, and never cleared: check it with
            `refuse_bad` when it suits. None checks here, which waits for the device
    impl    "auto", "triton" or "reference": see `dispatch.choose`

    Raises ValueError for NaN, infinity and groups whose base or step is beyond float16 (65504); what was written then
    means nothing. Raises ValueError for shapes and dtypes that don't fit.
    """
    if x.dim() != 3 or x.dtype not in DTYPES:
        raise ValueError(
            f"kv_pack: got {tuple(x.shape)} {x.dtype}, expected (unit, token, width) in float32, float16 or bfloat16."
        )
    units, tokens, width = x.shape
    wanted = shapes(units, tokens, width, bits, of, group)
    if out is None:
        if start:
            raise ValueError(f"kv_pack: got start={start} without `out`, expected pages to write into.")
        out = new_pages(units, tokens, width, bits, of, group=group, device=x.device)
    part = part_of(out, start, wanted, x.device)
    flag = torch.zeros(1, dtype=torch.int32, device=x.device) if bad is None else bad
    if flag.shape != (1,) or flag.dtype != torch.int32 or flag.device != x.device:
        raise ValueError(f"kv_pack: got bad {tuple(flag.shape)} {flag.dtype} on {flag.device}, expected int32 (1,).")
    chosen = choose(impl, x, *part, flag)
    if x.numel():
        if chosen == "triton":
            from workbench_kernels.kv_pack import kernel

            kernel.pack(part, flag, x, bits, of, group)
        else:
            made, wrong = reference.pack(x, bits, of, group)
            for place, tensor in zip(part, made, strict=True):
                place.copy_(tensor)
            flag |= wrong
    if bad is None:
        refuse_bad(flag)
    return part


def refuse_bad(bad: Tensor) -> None:
    """Raise ValueError if a `kv_pack` since set this flag; waits for the device."""
    if bool(bad):
        raise ValueError(
            "kv_pack: got NaN, infinity or a group beyond float16 (65504), expected finite numbers. One such number "
            "would poison its whole group."
        )


@torch.no_grad()
def kv_unpack(
    pages: Pages | tuple[Tensor, Tensor, Tensor],
    bits: int,
    of: Of,
    *,
    group: int = 32,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """The numbers (unit, token, width) of pages, rounded to `dtype` once. Raises ValueError as `kv_pack`."""
    rows = pages[0]
    if rows.dim() != 3 or dtype not in DTYPES:
        raise ValueError(
            f"kv_unpack: got rows {tuple(rows.shape)} and dtype {dtype}, expected (unit, row, width) and float32, "
            "float16 or bfloat16."
        )
    tokens, width = rows.shape[1] * 8 // bits if bits else 0, rows.shape[2]
    part = part_of(Pages(*pages), 0, shapes(len(rows), tokens, width, bits, of, group), rows.device)
    if choose(impl, *part) == "reference" or not rows.numel():
        return reference.unpack(part, bits, of, group, dtype)
    from workbench_kernels.kv_pack import kernel

    return kernel.unpack(part, bits, of, group, dtype)
