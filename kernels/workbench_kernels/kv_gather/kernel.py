"""Kept tokens of several tensors, written end to end by one launch.

A program owns some slots of one segment. Where a kept slot goes is data: the number of kept slots before it.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# (a jitted function takes more, and gives back other, than its Python text says)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numbers are moved as bits, never read


@triton.jit
def gather_slots(
    sources, targets, strides, keep, rank, heads, slots, room,
    WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(slots, SLOTS)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    row, head = segment // heads, segment % heads
    slot = (tl.program_id(0) % blocks).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < slots
    to = tl.load(rank + segment * slots + slot, inside, other=0).to(tl.int64) - 1  # kept up to and with this one
    kept = inside & (tl.load(keep + segment * slots + slot, inside, other=0) != 0) & (to < room)
    for i in tl.static_range(len(WIDTHS)):
        column = tl.arange(0, COLUMNS[i])[None, :].to(tl.int64)
        here = kept[:, None] & (column < WIDTHS[i])  # [SLOTS, COLUMNS]
        first = sources[i] + row * strides[i][0] + head * strides[i][1]
        moved = tl.load(first + slot[:, None] * strides[i][2] + column * strides[i][3], here)
        tl.store(targets[i] + to[:, None] * WIDTHS[i] + column, moved, here)


def pick_config(widths: Sequence[int]) -> tuple[int, int]:
    """(slots of a program, warps): tiles of about 4096 numbers."""
    widest = max(triton.next_power_of_2(width) for width in widths)
    slots = max(8, min(128, 4096 // widest))
    return slots, 4 if slots * widest >= 2048 else 2


def gather(targets: Sequence[Tensor], sources: Sequence[Tensor], keep: Tensor, rank: Tensor) -> None:
    """Write the kept tokens of sources (batch, kv_head, slot, width) into targets (room, width), in order.

    keep   (batch, kv_head, slot) bool, contiguous      rank   its running sum over all slots, as many numbers
    """
    widths = tuple(source.shape[3] for source in sources)
    slots, warps = pick_config(widths)
    batch, heads, length = keep.shape
    columns = tuple(triton.next_power_of_2(width) for width in widths)
    grid = (batch * heads * triton.cdiv(length, slots),)  # one axis: the others end at 65535
    with torch.cuda.device_of(keep):  # a kernel starts on the current device, not on that of its tensors
        gather_slots[grid](
            *(tuple(tensor.view(INTEGERS[tensor.element_size()]) for tensor in group) for group in (sources, targets)),
            tuple(tuple(source.stride()) for source in sources),
            keep.view(torch.uint8), rank, heads, length, len(targets[0]), widths, columns, slots, num_warps=warps,
        )  # fmt: skip
