"""Keys and values packed and unpacked in one pass: every number is read once, every byte written once.

A program owns the bytes of one block of planes: `group` rows and some columns. Reduction along tokens (keys) or along
channels (values) is one constant of the same kernel.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportCallIssue=false, reportReturnType=false
# (a jitted function takes more, and gives back other, than its Python text says)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.kv_pack.pages import Of, Pages, channels

ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits, rounded half to even


@triton.jit
def pack_block(
    x, rows, step, base, bad,
    tokens, width, x_unit, x_token, x_width, rows_unit, step_unit, base_unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = 2**BITS - 1
    AXIS: tl.constexpr = 0 if KEYS else 1
    blocks = tokens // (PLANES * GROUP)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    t = tl.arange(0, G)[:, None]  # row of the block
    column = tl.arange(0, W)[None, :]
    w = (tl.program_id(1) * SPAN + column).to(tl.int64)
    here_t, here_w = t < GROUP, (column < SPAN) & (w < width)
    here = here_t & here_w
    packed = tl.zeros([G, W], tl.int32)
    wrong = 0
    for plane in tl.static_range(PLANES):
        token = (block * PLANES + plane) * GROUP + t
        v = tl.load(x + unit * x_unit + token * x_token + w * x_width, here, other=0.0).to(tl.float32)
        low = tl.min(tl.where(here, v, float("inf")), AXIS, keep_dims=True)  # keys [1, W], values [G, 1]
        high = tl.max(tl.where(here, v, float("-inf")), AXIS, keep_dims=True)
        s = tl.div_rn(high - low, TOP * 1.0).to(tl.float16)  # `/` is an approximation on a GPU
        m = low.to(tl.float16)
        wide_s, wide_m = s.to(tl.float32), m.to(tl.float32)
        code = tl.div_rn(v - wide_m, tl.where(wide_s > 0, wide_s, 1.0))
        code = (tl.minimum(tl.maximum(code, 0.0), TOP * 1.0) + ROUND) - ROUND  # clipped first: same, and in range
        packed |= tl.where(here & (wide_s > 0), code, 0.0).to(tl.int32) << plane * BITS
        if KEYS:
            at, there = (block * PLANES + plane) * width + w, here_w
        else:
            at, there = token * tl.num_programs(1) + tl.program_id(1), here_t
        tl.store(step + unit * step_unit + at, s, there)
        tl.store(base + unit * base_unit + at, m, there)
        lost = there & ~((wide_s < float("inf")) & (tl.abs(wide_m) < float("inf")))
        nan = here & (v != v)  # min and max pass over NaN
        wrong += tl.sum(lost.to(tl.int32)) + tl.sum(nan.to(tl.int32))
    tl.store(rows + unit * rows_unit + (block * GROUP + t) * width + w, packed.to(tl.uint8), here)
    tl.store(bad, 1, mask=wrong > 0)  # several programs may write: all write the same


@triton.jit
def unpack_block(
    out, rows, step, base, tokens, width, rows_unit, step_unit, base_unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    blocks = tokens // (PLANES * GROUP)
    unit = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    t = tl.arange(0, G)[:, None]
    column = tl.arange(0, W)[None, :]
    w = (tl.program_id(1) * SPAN + column).to(tl.int64)
    here_t, here_w = t < GROUP, (column < SPAN) & (w < width)
    here = here_t & here_w
    packed = tl.load(rows + unit * rows_unit + (block * GROUP + t) * width + w, here, other=0).to(tl.int32)
    for plane in tl.static_range(PLANES):
        token = (block * PLANES + plane) * GROUP + t
        if KEYS:
            at, there = (block * PLANES + plane) * width + w, here_w
        else:
            at, there = token * tl.num_programs(1) + tl.program_id(1), here_t
        s = tl.load(step + unit * step_unit + at, there, other=0.0).to(tl.float32)
        m = tl.load(base + unit * base_unit + at, there, other=0.0).to(tl.float32)
        code = (packed >> plane * BITS & 2**BITS - 1).to(tl.float32)
        v = code * s + m  # the product of 8 and 11 bits is exact: fused or not, one rounding
        tl.store(out + (unit * tokens + token) * width + w, v.to(out.dtype.element_ty), here)


def pick_config(of: Of, width: int, group: int) -> tuple[int, int, int, int]:
    """(channels of a program, columns of its tile, rows of its tile, warps)."""
    rows = triton.next_power_of_2(group)
    span = min(64, triton.next_power_of_2(width)) if of == "keys" else channels(width, group)
    columns = triton.next_power_of_2(span)
    return span, columns, rows, 1 if rows * columns <= 512 else 2 if rows * columns <= 1024 else 4


def pack(pages: Pages, bad: Tensor, x: Tensor, bits: int, of: Of, group: int) -> None:
    """Write x (unit, token, width) into pages of its size; set `bad` (1,) to 1 where a group can't be represented."""
    units, tokens, width = x.shape
    span, columns, rows, warps = pick_config(of, width, group)
    grid = (units * (tokens * bits // (8 * group)), triton.cdiv(width, span))
    strides = *x.stride(), *(part.stride(0) for part in pages)
    sizes = {"BITS": bits, "GROUP": group, "SPAN": span, "KEYS": of == "keys", "G": rows, "W": columns}
    with torch.cuda.device_of(x):  # a kernel starts on the current device, not on that of its tensors
        pack_block[grid](x, *pages, bad, tokens, width, *strides, **sizes, num_warps=warps)


def unpack(pages: Pages, bits: int, of: Of, group: int, dtype: torch.dtype) -> Tensor:
    """What `reference.unpack` gives."""
    units, tokens, width = pages.rows.shape[0], pages.rows.shape[1] * 8 // bits, pages.rows.shape[2]
    out = torch.empty(units, tokens, width, dtype=dtype, device=pages.rows.device)
    span, columns, rows, warps = pick_config(of, width, group)
    grid = (units * (tokens * bits // (8 * group)), triton.cdiv(width, span))
    strides = [part.stride(0) for part in pages]
    sizes = {"BITS": bits, "GROUP": group, "SPAN": span, "KEYS": of == "keys", "G": rows, "W": columns}
    with torch.cuda.device_of(out):
        unpack_block[grid](out, *pages, tokens, width, *strides, **sizes, num_warps=warps)
    return out
