"""Tokens of one cache layer, row by row and head by head, without a slot for padding.

A segment is the tokens of one (row, kv_head), oldest first. `Recent` grows at its end, all heads of a row alike;
`Frozen` holds segments of any lengths end to end, so that unequal budgets free real bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from workbench import fused

PARTS = ("keys", "values", "scores")  # what the tensors of a segment are, in order
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

    def without(self, hidden: Bool[Tensor, "batch kv_head slot"]) -> Slots:
        """The same slots, some of the first ones as if they were empty."""
        hidden = pad(hidden, (0, self.positions.shape[-1] - hidden.shape[-1]))
        return Slots(self.tensors, self.positions.expand_as(hidden).masked_fill(hidden, -1), False)


class Recent:
    """A growing buffer of whole tokens: tensors (batch, kv_head, capacity, width), the same tokens in every head."""

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        self.positions: Tensor = torch.zeros(0)
        self.counts: Tensor = torch.zeros(0)  # (batch,)
        self.length = 0  # the longest row
        self.even = True  # every row is as long: the new tokens' place is one slice

    def append(
        self, new: Sequence[Tensor], positions: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
    ) -> None:
        """Add the real tokens of each row at its end; padding takes no slot."""
        if not self.buffers:
            self._begin(new)
        seq = positions.shape[1]
        all_real = bool(real.all())
        self._reserve(self.length + (seq if all_real else int(real.sum(1).max())))
        if all_real and self.even:
            span = slice(self.length, self.length + seq)
            for buffer, value in zip(self.buffers, new, strict=True):
                buffer[:, :, span] = value
            self.positions[:, span] = positions
            self.counts += seq
            self.length += seq
        else:
            row, column = real.nonzero(as_tuple=True)
            slot = self.counts[row] + (real.cumsum(1) - 1)[row, column]
            for buffer, value in zip(self.buffers, new, strict=True):
                buffer[row, :, slot] = value[row, :, column]
            self.positions[row, slot] = positions[row, column].to(self.positions.dtype)
            self.counts += real.sum(1)
            self.even = bool((self.counts == self.counts[0]).all())
            self.length = int(self.counts.max())

    def __len__(self) -> int:
        return self.length

    def forget(self, count: int) -> None:
        """Take back the newest tokens of every row; all rows are as long."""
        self.positions[:, self.length - count : self.length] = -1
        self.counts -= count
        self.length -= count

    def emptied(self) -> Recent:
        """A buffer for the same rows without a token."""
        fresh = Recent()
        fresh._begin(self.buffers)
        return fresh

    @property
    def filled(self) -> Bool[Tensor, "batch 1 slot"]:
        """False at the slots of `blocks` that a shorter row lacks."""
        return torch.arange(self.length, device=self.counts.device) < self.counts[:, None, None]

    def blocks(self, which: int) -> Iterator[Float[Tensor, "batch kv_head slot width"]]:
        """Keys (0) or values (1), as one view."""
        yield self.buffers[which][:, :, : self.length]

    def slots(self) -> Slots:
        """The tokens held, as views."""
        tensors = tuple(buffer[:, :, : self.length] for buffer in self.buffers)
        return Slots(tensors, self.positions[:, None, : self.length], self.even)

    def add(self, number: int, change: Float[Tensor, "batch kv_head slot width"]) -> None:
        """Add to one of the tensors, slot by slot."""
        self.buffers[number][:, :, : self.length] += change

    def accounts(self) -> Iterator[tuple[str, int, int]]:
        """Part, bytes, and the keys and values that it stands for."""
        tokens = int(self.counts.sum())
        for name, buffer in zip(PARTS, self.buffers, strict=False):
            used = tokens * buffer.shape[1] * buffer.shape[3]
            yield name, used * buffer.element_size(), 0 if name == "scores" else used
            yield "idle", buffer.nbytes - used * buffer.element_size(), 0
        filled = tokens * self.positions.element_size()
        yield "index", filled + self.counts.nbytes, 0
        yield "idle", self.positions.nbytes - filled, 0

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        if self.buffers:
            self.buffers = tuple(buffer.index_select(0, index.to(buffer.device)) for buffer in self.buffers)
            self.positions = self.positions.index_select(0, index.to(self.positions.device))
            self.counts = self.counts.index_select(0, index.to(self.counts.device))
            self.length = int(self.counts.max()) if len(self.counts) else 0
            self.even = bool((self.counts == self.length).all())

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
        self.even = bool((counts == self.longest).all())

    @classmethod
    def chosen(cls, slots: Slots, keep: Bool[Tensor, "batch kv_head slot"]) -> Frozen:
        """The tokens where `keep` is true, copied into storage of their own, in order."""
        if fused.serves(*slots.tensors):
            return cls(*fused.chosen(slots, keep))
        positions = slots.positions.expand_as(keep)[keep].to(torch.int32)
        return cls(tuple(tensor[keep] for tensor in slots.tensors), positions, keep.sum(-1))

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def filled(self) -> Bool[Tensor, "batch kv_head slot"]:
        """False at the slots of `blocks` that a shorter segment lacks."""
        return torch.arange(self.longest, device=self.counts.device) < self.counts[..., None]

    def blocks(self, which: int) -> Iterator[Float[Tensor, "batch kv_head slot width"]]:
        """Keys (0) or values (1): a view of equal segments, others spread into slots."""
        yield self._spread(self.tensors[which])

    def slots(self) -> Slots:
        """The tokens held: a view of equal segments; unequal ones are spread into slots for the time of one reading."""
        positions = self._spread(self.positions[:, None], -1)[..., 0]
        return Slots(tuple(map(self._spread, self.tensors)), positions, self.even)

    def add(self, number: int, change: Float[Tensor, "batch kv_head slot width"]) -> None:
        """Add to one of the tensors, slot by slot."""
        self.tensors[number].add_(change[self.filled])

    def accounts(self) -> Iterator[tuple[str, int, int]]:
        """Part, bytes, and the keys and values that it stands for."""
        for name, tensor in zip(PARTS, self.tensors, strict=False):
            yield name, tensor.nbytes, 0 if name == "scores" else tensor.numel()
        yield "index", self.positions.nbytes + self.counts.nbytes, 0

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        order, counts = reordered(self.counts, index)
        self.__init__(tuple(tensor[order] for tensor in self.tensors), self.positions[order], counts)

    def _spread(self, tensor: Tensor, empty: int = 0) -> Tensor:
        """(tokens, width) as (batch, kv_head, slot, width)."""
        shape = (*self.counts.shape, self.longest, tensor.shape[1])
        if self.even:
            return tensor.reshape(shape)
        wide = tensor.new_full(shape, empty)
        wide[self.filled] = tensor
        return wide


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
