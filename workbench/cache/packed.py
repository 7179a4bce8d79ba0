"""Tokens of a cache layer in few bits: whole units of tokens, segment by segment, and the rule that says when to pack.

With T tokens in a segment: min(S, T) sinks stay whole, u floor(max(0, T - S - R) / u) are packed, the rest stays whole.
The rule is a function of T alone, so a text read token by token ends in the same state as one read at once.
Source: KIVI, Liu et al., 2024 (arXiv 2402.02750); shared key and value boundaries, sinks and residual are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench import fused
from workbench.cache.held import held_bytes
from workbench.cache.layer import KVLayer
from workbench.cache.packing import dequantise, pack_planes, quantise, unpack_planes, unpack_planes_into
from workbench.cache.segments import Frozen, Slots, joined, reordered

SMALL = 2048  # tokens: a packed part below is quicker joined with the next than read beside it
WHOLE = 16  # bits that leave a tensor alone
SCRATCH_CPU = 2**20  # numbers unpacked at once while reading: what a processor's cache holds
SCRATCH_GPU = 2**24


@dataclass(frozen=True)
class Format:
    """Bits per key and value, and the sizes of their groups.

    key_bits     2, 4, 8, or 16 for whole; groups of `group` consecutive tokens of one channel
    value_bits   the same; groups of `group` consecutive channels of one token (all channels where fewer)
    """

    key_bits: int
    value_bits: int
    group: int = 32

    @property
    def unit(self) -> int:
        """Tokens that are packed together: no group of keys or values is ever cut."""
        return self.group * 8 // min(self.key_bits, self.value_bits, 8)


class Packed:
    """Whole units of tokens of every segment, end to end; never reopened.

    keys, values   (codes uint8 (unit, row, width), step, base) float16; or (whole (unit, token, width),) at 16 bits
    units          (batch, kv_head) units of each segment
    """

    def __init__(
        self,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        positions: Int[Tensor, "unit token"],
        units: Int[Tensor, "batch kv_head"],
        form: Format,
        dtype: torch.dtype,
    ) -> None:
        self.keys, self.values, self.positions, self.units = keys, values, positions, units.to(torch.int32)
        self.form, self.dtype = form, dtype
        self.longest = int(units.max()) if units.numel() else 0
        self.even = bool((units == self.longest).all())

    @classmethod
    def chosen(cls, slots: Slots, keep: Bool[Tensor, "batch kv_head slot"], form: Format) -> Packed:
        """The tokens where `keep` is true, packed; each segment must bring whole units."""
        keys, values = (tensor[keep].reshape(-1, form.unit, tensor.shape[-1]) for tensor in slots.tensors[:2])
        positions = slots.positions.expand_as(keep)[keep].to(torch.int32).reshape(-1, form.unit)
        packed = pack_keys(keys, form), pack_values(values, form)
        return cls(*packed, positions, keep.sum(-1) // form.unit, form, slots.tensors[0].dtype)

    def __len__(self) -> int:
        return self.positions.numel()

    def slots(self) -> Slots:
        """The tokens as keys and values again, for the time of one reading."""
        keys, values = unpack_keys(self.keys, self.form, self.dtype), unpack_values(self.values, self.form, self.dtype)
        flat = (keys.flatten(0, 1), values.flatten(0, 1))
        return Frozen(flat, self.positions.flatten(), self.units * self.form.unit).slots()

    def blocks(self, which: int) -> Iterator[Float[Tensor, "batch kv_head slot width"]]:
        """Keys (0) or values (1), a block at a time, in memory that the next block overwrites; see `filled`."""
        if not len(self):  # the rows that had some were dropped
            return
        parts = (self.keys, self.values)[which]
        bits, group, unit = (self.form.key_bits, self.form.value_bits)[which], self.form.group, self.form.unit
        (batch, heads), width = self.units.shape, parts[0].shape[-1]
        most = SCRATCH_CPU if parts[0].device.type == "cpu" else SCRATCH_GPU
        size = min(self.longest, max(1, most // (batch * heads * unit * width)))
        scratch = torch.empty(batch, heads, size, unit, width, device=parts[0].device)
        for start in range(0, self.longest, size):
            stored = self._units(parts, start, min(start + size, self.longest))
            if bits == WHOLE:
                yield stored[0].flatten(2, 3)
                continue
            rows, step, base = stored
            out = scratch[:, :, : rows.shape[2]]
            unpack_planes_into(out, rows, bits, group)
            if which == 0:
                grouped, step, base = out.unflatten(3, (-1, group)), step[..., None, :], base[..., None, :]
            else:
                grouped, step, base = out.unflatten(4, (step.shape[-1], -1)), step[..., None], base[..., None]
            torch.addcmul(base.float(), grouped, step.float(), out=grouped)
            yield out.flatten(2, 3)

    @property
    def filled(self) -> Bool[Tensor, "batch kv_head slot"]:
        """False at the slots of `blocks` that a shorter segment lacks."""
        slots = torch.arange(self.longest * self.form.unit, device=self.units.device)
        return slots < self.units[..., None] * self.form.unit

    def _units(self, parts: tuple[Tensor, ...], start: int, stop: int) -> list[Tensor]:
        """These units of every segment, each (batch, kv_head, unit, ...): a view where segments are equal."""
        if self.even:
            return [part.unflatten(0, (*self.units.shape, -1))[:, :, start:stop] for part in parts]
        counts = self.units.long()
        first = (counts.flatten().cumsum(0) - counts.flatten()).reshape(counts.shape)
        wanted = torch.arange(start, stop, device=counts.device).minimum((counts[..., None] - 1).clamp_min(0))
        index = (first[..., None] + wanted).clamp_max(len(self.positions) - 1)  # what is not filled may be anything
        return [part[index] for part in parts]

    def accounts(self) -> Iterator[tuple[str, int, int]]:
        """Part, bytes, and the keys and values that it stands for."""
        formats = (("keys", "codes_k", self.form.key_bits), ("values", "codes_v", self.form.value_bits))
        for (whole, codes, bits), packed in zip(formats, (self.keys, self.values), strict=True):
            numbers = packed[0].numel() if bits == WHOLE else packed[0].numel() * 8 // bits
            yield whole if bits == WHOLE else codes, packed[0].nbytes, numbers
            for name, tensor in zip(("scale", "zero"), packed[1:], strict=False):
                yield name, tensor.nbytes, 0
        yield "index", self.positions.nbytes + self.units.nbytes, 0

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        order, units = reordered(self.units, index)
        keys, values = (tuple(t[order] for t in packed) for packed in (self.keys, self.values))
        self.__init__(keys, values, self.positions[order], units, self.form, self.dtype)

    def with_later(self, later: Packed) -> Packed:
        """These units and later ones of the same segments as one part."""
        counts = torch.cat([self.units.flatten(), later.units.flatten()]).long()
        segment = torch.arange(self.units.numel(), device=counts.device).repeat(2)
        order = torch.repeat_interleave(segment, counts).sort(stable=True).indices

        def merged(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(torch.cat(pair)[order] for pair in zip(a, b, strict=True))

        keys, values = merged(self.keys, later.keys), merged(self.values, later.values)
        (positions,) = merged((self.positions,), (later.positions,))
        return Packed(keys, values, positions, self.units + later.units, self.form, self.dtype)


def pack_keys(keys: Float[Tensor, "unit token width"], form: Format) -> tuple[Tensor, ...]:
    """Groups of `form.group` tokens of one channel; step and base (unit, token / group, width)."""
    if form.key_bits == WHOLE:
        return (keys,)
    if fused.serves(keys):
        return fused.packed(keys, form.key_bits, "keys", form.group)
    grouped = keys.unflatten(1, (-1, form.group)).transpose(2, 3)  # (unit, group number, width, group)
    codes, step, base = quantise(grouped, form.key_bits)
    rows = pack_planes(codes.transpose(2, 3).flatten(1, 2), form.key_bits, form.group)
    return rows, step.squeeze(-1), base.squeeze(-1)


def unpack_keys(packed: tuple[Tensor, ...], form: Format, dtype: torch.dtype) -> Float[Tensor, "unit token width"]:
    """What `pack_keys` packed, up to rounding."""
    if form.key_bits == WHOLE:
        return packed[0]
    rows, step, base = packed
    codes = unpack_planes(rows, form.key_bits, form.group).unflatten(1, (-1, form.group))
    return dequantise(codes, step[:, :, None], base[:, :, None], dtype).flatten(1, 2)


def pack_values(values: Float[Tensor, "unit token width"], form: Format) -> tuple[Tensor, ...]:
    """Groups of `form.group` channels of one token; step and base (unit, token, width / group)."""
    if form.value_bits == WHOLE:
        return (values,)
    if fused.serves(values):
        return fused.packed(values, form.value_bits, "values", form.group)
    codes, step, base = quantise(values.unflatten(2, (-1, _channels(values.shape[2], form))), form.value_bits)
    return pack_planes(codes.flatten(2), form.value_bits, form.group), step.squeeze(-1), base.squeeze(-1)


def unpack_values(packed: tuple[Tensor, ...], form: Format, dtype: torch.dtype) -> Float[Tensor, "unit token width"]:
    """What `pack_values` packed, up to rounding."""
    if form.value_bits == WHOLE:
        return packed[0]
    rows, step, base = packed
    codes = unpack_planes(rows, form.value_bits, form.group)
    codes = codes.unflatten(2, (step.shape[2], -1))
    return dequantise(codes, step[..., None], base[..., None], dtype).flatten(2)


@dataclass(frozen=True)
class PackStore:
    """The store stage of one layer after another.

    formats    of each layer       residual   newest tokens that stay whole       sinks   oldest tokens that stay whole
    """

    formats: tuple[Format, ...]
    residual: int
    sinks: int

    def pack(self, layer: KVLayer) -> None:
        """Pack what the rule names, once; what is packed is never packed again."""
        form = self.formats[layer.layer]
        if min(form.key_bits, form.value_bits) == WHOLE or layer.longest < self.residual + form.unit:
            return
        whole = joined([part.slots() for part in layer.whole])
        lengths = whole.lengths.expand(whole.tensors[0].shape[:2])  # (batch, kv_head)
        taken = layer.state.setdefault("sinks", torch.zeros_like(lengths))
        sinks = (self.sinks - taken).clamp_min(0)
        due = (lengths - sinks - self.residual).clamp_min(0) // form.unit * form.unit
        if not int(due.max()):
            return
        sinks = torch.where(due > 0, sinks, 0)[..., None]
        rank = whole.filled.cumsum(-1).expand(*lengths.shape, -1) - 1  # of each token in its segment
        filled = whole.filled.expand_as(rank)
        first, chosen = filled & (rank < sinks), filled & (rank >= sinks) & (rank < sinks + due[..., None])
        before = held_bytes(*layer.parts)
        if bool(first.any()):
            layer.packed.insert(0, Frozen.chosen(whole, first))
            layer.state["sinks"] = taken + sinks[..., 0]
        layer.packed.append(Packed.chosen(whole, chosen, form))
        self._merge(layer.packed)
        layer.hold(whole, filled & ~first & ~chosen)
        heads = lengths.shape[1]
        layer.stages.acted("store", int(due.sum()) // heads, before - held_bytes(*layer.parts))

    @staticmethod
    def _merge(parts: list[Any]) -> None:
        """Join the last two parts while small or about as large: few parts, and each token moves O(log T) times."""
        while len(parts) > 1 and isinstance(parts[-2], Packed):
            if len(parts[-2]) >= 2 * len(parts[-1]) and parts[-2].longest * parts[-2].form.unit >= SMALL:
                break
            later = parts.pop()
            parts[-1] = parts[-1].with_later(later)


def _channels(width: int, form: Format) -> int:
    """Channels of one value group: the group size where it divides the width, else all of them."""
    return form.group if width % form.group == 0 else width
