"""Tokens of one cache layer, row by row and head by head, without a slot for padding.

A segment is the tokens of one (row, kv_head), oldest first. `Recent` grows at its end, all heads of a row alike;
`Frozen` holds segments of any lengths end to end, so that unequal budgets free real bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROWTH = 1.125  # a full buffer grows by an eighth: appends cost O(1) on average, and at most an eighth lies idle


@dataclass(eq=False)
class Slots:
    """What attention reads: tensors (batch, kv_head, slot, width), filled from slot 0 on.

    positions   (batch, kv_head or 1, slot) logical position of each token, -1 where a slot is empty
    full        True where no slot is empty: known without asking the device
    """

    tensors: tuple[Tensor, ...]
    positions: Int[Tensor, "batch kv_head slot"]
    full: bool

    @property
    def filled(self) -> Bool[Tensor, "batch kv_head slot"]:
        return self.positions >= 0

    @property
    def lengths(self) -> Int[Tensor, "batch kv_head"]:
        return self.filled.sum(-1)


class Recent:
    """A growing buffer of whole tokens: tensors (batch, kv_head, capacity, width), the same tokens in every head."""

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        self.positions: Tensor = torch.zeros(0)
        self.counts: Tensor = torch.zeros(0)  # (batch,)
        self.length = 0  # the longest row
        self._even = True  # every row is as long: the new tokens' place is one slice

    def append(
        self, new: Sequence[Tensor], positions: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
    ) -> None:
        """Add the real tokens of each row at its end; padding takes no slot."""
        if not self.buffers:
            self._begin(new)
        seq = positions.shape[1]
        all_real = bool(real.all())
        self._reserve(self.length + (seq if all_real else int(real.sum(1).max())))
        if all_real and self._even:
            span = slice(self.length, self.length + seq)
            for buffer, value in zip(self.buffers, new, strict=True):
                buffer[:, :, span] = value
            self.positions[:, span] = positions
            self.counts += seq
        else:
            row, column = real.nonzero(as_tuple=True)
            slot = self.counts[row] + (real.cumsum(1) - 1)[row, column]
            for buffer, value in zip(self.buffers, new, strict=True):
                buffer[row, :, slot] = value[row, :, column]
            self.positions[row, slot] = positions[row, column].to(self.positions.dtype)
            self.counts += real.sum(1)
            self._even = bool((self.counts == self.counts[0]).all())
        self.length = int(self.counts.max())

    def __len__(self) -> int:
        return self.length

    def emptied(self) -> Recent:
        """A buffer for the same rows without a token."""
        fresh = Recent()
        fresh._begin(self.buffers)
        return fresh

    def slots(self) -> Slots:
        """The tokens held, as views."""
        tensors = tuple(buffer[:, :, : self.length] for buffer in self.buffers)
        return Slots(tensors, self.positions[:, None, : self.length], self._even)

    def add(self, number: int, change: Float[Tensor, "batch kv_head slot width"]) -> None:
        """Add to one of the tensors, slot by slot."""
        self.buffers[number][:, :, : self.length] += change

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        if self.buffers:
            self.buffers = tuple(buffer.index_select(0, index.to(buffer.device)) for buffer in self.buffers)
            self.positions = self.positions.index_select(0, index.to(self.positions.device))
            self.counts = self.counts.index_select(0, index.to(self.counts.device))
            self.length = int(self.counts.max()) if len(self.counts) else 0
            self._even = bool((self.counts == self.length).all())

    def _begin(self, new: Sequence[Tensor]) -> None:
        batch, device = new[0].shape[0], new[0].device
        self.buffers = tuple(value.new_zeros(*value.shape[:2], 0, value.shape[3]) for value in new)
        self.positions = torch.full((batch, 0), -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch, dtype=torch.long, device=device)

    def _reserve(self, length: int) -> None:
        capacity = self.positions.shape[1]
        if length <= capacity:
            return
        size = length if capacity == 0 else max(length, int(capacity * GROWTH) + 1)  # a prompt gets what it needs
        wider = []
        for buffer in self.buffers:
            grown = buffer.new_zeros(*buffer.shape[:2], size, buffer.shape[3])
            grown[:, :, : self.length] = buffer[:, :, : self.length]
            wider.append(grown)
        self.buffers = tuple(wider)
        positions = self.positions.new_full((len(self.positions), size), -1)
        positions[:, : self.length] = self.positions[:, : self.length]
        self.positions = positions


class Frozen:
    """Segments of any lengths end to end: tensors (tokens, width); what a selection leaves behind.

    positions   (tokens,)      counts   (batch, kv_head) tokens of each segment
    """

    def __init__(self, tensors: tuple[Tensor, ...], positions: Tensor, counts: Int[Tensor, "batch kv_head"]) -> None:
        self.tensors, self.positions, self.counts = tensors, positions, counts.to(torch.int32)
        self.longest = int(counts.max()) if counts.numel() else 0
        self._even = bool((counts == self.longest).all())

    @classmethod
    def chosen(cls, slots: Slots, keep: Bool[Tensor, "batch kv_head slot"]) -> Frozen:
        """The tokens where `keep` is true, copied into storage of their own, in order."""
        positions = slots.positions.expand_as(keep)[keep].to(torch.int32)
        return cls(tuple(tensor[keep] for tensor in slots.tensors), positions, keep.sum(-1))

    def __len__(self) -> int:
        return len(self.positions)

    def slots(self) -> Slots:
        """The tokens held: a view of equal segments; unequal ones are spread into slots for the time of one reading."""
        shape = (*self.counts.shape, self.longest)
        if self._even:
            return Slots(
                tuple(t.reshape(*shape, t.shape[1]) for t in self.tensors), self.positions.reshape(shape), True
            )
        filled = torch.arange(self.longest, device=self.counts.device) < self.counts[..., None]
        positions = self.positions.new_full(shape, -1)
        positions[filled] = self.positions
        spread = []
        for tensor in self.tensors:
            wide = tensor.new_zeros(*shape, tensor.shape[1])
            wide[filled] = tensor
            spread.append(wide)
        return Slots(tuple(spread), positions, False)

    def add(self, number: int, change: Float[Tensor, "batch kv_head slot width"]) -> None:
        """Add to one of the tensors, slot by slot."""
        filled = torch.arange(self.longest, device=self.counts.device) < self.counts[..., None]
        self.tensors[number].add_(change[filled])

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        order, counts = reordered(self.counts, index)
        self.__init__(tuple(tensor[order] for tensor in self.tensors), self.positions[order], counts)


def reordered(counts: Int[Tensor, "batch kv_head"], rows: Tensor) -> tuple[Tensor, Int[Tensor, "batch kv_head"]]:
    """(index of the items, counts) that put segments of these counts, laid end to end, into another order of rows."""
    chosen = counts[rows.to(counts.device)]
    starts = (counts.flatten().cumsum(0) - counts.flatten()).reshape(counts.shape)[rows.to(counts.device)].flatten()
    lengths = chosen.flatten().long()
    before = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(total, device=counts.device), chosen


def joined(parts: Sequence[Slots]) -> Slots:
    """Several readings side by side; one alone is not copied."""
    if not parts:
        return Slots((), torch.zeros(0, 0, 0, dtype=torch.int32), True)
    if len(parts) == 1:
        return parts[0]
    heads = max(part.positions.shape[1] for part in parts)
    positions = [part.positions.expand(-1, heads, -1) for part in parts]
    tensors = (torch.cat(same, 2) for same in zip(*(part.tensors for part in parts), strict=True))
    return Slots(tuple(tensors), torch.cat(positions, -1), all(part.full for part in parts))
