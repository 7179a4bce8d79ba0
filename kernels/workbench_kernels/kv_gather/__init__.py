"""Kept tokens of a cache, end to end: what eviction leaves of keys, values, positions and scores, in one launch.

How many tokens each segment keeps is data on the device: where the caller knows how much room is needed, nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workbench_kernels.dispatch import choose
from workbench_kernels.kv_gather import reference

__all__ = ["Kept", "kv_gather"]


class Kept(NamedTuple):
    """What was kept, segment after segment, each in its old order.

    tensors   each (room, width), or (room,) where the source had no width; only the first `total` rows mean something
    counts    (batch, kv_head) int32 kept tokens of each segment
    total     () their number
    """

    tensors: tuple[Tensor, ...]
    counts: Tensor
    total: Tensor

    def checked(self) -> Kept:
        """The same, cut to `total` rows; waits for the device. Raises ValueError where the room was too small."""
        total, held, room = int(self.total), int(self.counts.sum()), len(self.tensors[0])
        if total > room:
            raise ValueError(f"kv_gather: got {total} tokens to keep and room for {room}. The last ones were left out.")
        if held != total:
            raise ValueError(
                f"kv_gather: the segments hold {held} of {total} kept tokens. Do the counts add up to all?"
            )
        return Kept(tuple(tensor[:total] for tensor in self.tensors), self.counts, self.total)


@torch.no_grad()
def kv_gather(
    tensors: Sequence[Tensor],
    keep: Tensor,
    counts: Tensor | None = None,
    *,
    room: int | None = None,
    out: Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> Kept:
    """The tokens of several tensors that a selection keeps, in storage of their own.

    tensors   a buffer's: each (batch, kv_head, slot, width) or (batch, kv_head, slot), of any strides; or segments end
              to end: each (token, width) or (token,), with `counts`
    keep      bool (batch, kv_head, slot) or (token,); or the slots to keep, int64 (batch, kv_head, n): a set, any order
    counts    (batch, kv_head) tokens of each segment that lies end to end
    room      rows of the new tensors; None makes just enough, which waits for the device unless `keep` are slots
    out       tensors (room, ...) to write into, contiguous, one per tensor; rows after the kept ones stay as they are
    impl      "auto", "triton" or "reference": see `dispatch.choose`

    What comes back shares no memory with `tensors`: theirs is free as soon as the caller lets go of them. With too
    little room the last tokens are left out: `Kept.checked` refuses that. Raises ValueError for what does not fit.
    """
    tensors = tuple(tensors)
    if not tensors or (room is not None and (room < 0 or out is not None)):
        raise ValueError(
            f"kv_gather: got {len(tensors)} tensors and room={room}, expected at least one tensor, and a room of 0 or "
            "more only where there is no `out`."
        )
    if keep.dtype != torch.bool:
        keep, room = _mask(keep, tensors[0]), keep.numel() if room is None else room
    _check(tensors, keep, counts)
    chosen = choose(impl, keep, counts, *tensors, *(out or ()))
    rank = keep.flatten().cumsum(0, dtype=torch.int32 if keep.numel() < 2**31 else torch.int64)
    total = rank[-1].clone() if len(rank) else rank.new_zeros(())  # a view would keep all of `rank`
    if out is None:
        rows = int(total) if room is None else room
        out = [tensor.new_empty(rows, *tensor.shape[keep.dim() :]) for tensor in tensors]
    else:
        _check_out(out, tensors, keep)
    if chosen == "triton":
        _launch(out, tensors, keep, rank)
        return Kept(tuple(out), _kept_counts(keep, rank, counts), total)
    for target, found in zip(out, reference.gather(tensors, keep), strict=True):
        target[: len(found)] = found[: len(target)]
    return Kept(tuple(out), reference.kept_counts(keep, counts), total)


def _launch(out: Sequence[Tensor], tensors: Sequence[Tensor], keep: Tensor, rank: Tensor) -> None:
    if not keep.numel() or not len(out[0]):
        return
    from workbench_kernels.kv_gather import kernel

    if keep.dim() == 1:  # end to end: one long segment
        keep, tensors = keep[None, None], [tensor[None, None] for tensor in tensors]
    wide = [tensor if tensor.dim() == 4 else tensor[..., None] for tensor in tensors]
    kernel.gather(out, wide, keep.contiguous(), rank)


def _kept_counts(keep: Tensor, rank: Tensor, counts: Tensor | None) -> Tensor:
    """As `reference.kept_counts`, without asking the device for a number."""
    if counts is None:
        return keep.sum(-1, dtype=torch.int32)
    ends = counts.flatten().cumsum(0)
    before = torch.cat([rank.new_zeros(1), rank])  # kept before each token, and in all
    last = len(rank)  # counts that add up to more are refused by `Kept.checked`
    kept = before[ends.clamp_max(last)] - before[(ends - counts.flatten()).clamp_max(last)]
    return kept.reshape(counts.shape).to(torch.int32)


def _mask(slots: Tensor, tensor: Tensor) -> Tensor:
    """True at the slots that are named, (batch, kv_head, slot)."""
    if slots.dtype != torch.int64 or slots.dim() != 3 or tensor.dim() < 3:
        raise ValueError(
            f"kv_gather: got keep {tuple(slots.shape)} {slots.dtype}, expected bool, or int64 slots "
            "(batch, kv_head, n) of tensors (batch, kv_head, slot, ...)."
        )
    mask = torch.zeros(*slots.shape[:2], tensor.shape[2], dtype=torch.bool, device=slots.device)
    return mask.scatter_(2, slots, True)


def _check(tensors: Sequence[Tensor], keep: Tensor, counts: Tensor | None) -> None:
    if keep.dim() != (3 if counts is None else 1):
        wanted = "(batch, kv_head, slot)" if counts is None else "(token,) with counts"
        raise ValueError(f"kv_gather: got keep {tuple(keep.shape)}, expected {wanted}.")
    if counts is not None and (counts.dim() != 2 or counts.is_floating_point()):
        found = f"{tuple(counts.shape)} {counts.dtype}"
        raise ValueError(f"kv_gather: got counts {found}, expected integers (batch, kv_head).")
    for tensor in tensors:
        if tensor.shape[: keep.dim()] != keep.shape or tensor.dim() > keep.dim() + 1 or 0 in tensor.shape[keep.dim() :]:
            raise ValueError(
                f"kv_gather: got a tensor {tuple(tensor.shape)} with keep {tuple(keep.shape)}, expected that shape, "
                "with a width after it or without. Expand what all heads share."
            )
        if tensor.element_size() not in (1, 2, 4, 8) or tensor.is_complex():
            raise ValueError(f"kv_gather: got {tensor.dtype}, expected real numbers of 1, 2, 4 or 8 bytes.")


def _check_out(out: Sequence[Tensor], tensors: Sequence[Tensor], keep: Tensor) -> None:
    if len(out) != len(tensors):
        raise ValueError(f"kv_gather: got {len(out)} tensors in out for {len(tensors)}, expected one for each.")
    for target, tensor in zip(out, tensors, strict=True):
        shape = (len(out[0]), *tensor.shape[keep.dim() :])
        if tuple(target.shape) != shape or target.dtype != tensor.dtype or not target.is_contiguous():
            raise ValueError(
                f"kv_gather: got out {tuple(target.shape)} {target.dtype}, expected {shape} {tensor.dtype}, contiguous."
            )
