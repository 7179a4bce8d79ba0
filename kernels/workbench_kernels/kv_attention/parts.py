"""What one decode step reads: tokens in few bits, and tokens in full precision, each in segments of (batch, kv_head).

A segment is the tokens of one key/value head of one row. Nothing here copies: parts are the caller's own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 4, 8)
WHOLE = 16  # bits that leave a tensor alone


@dataclass(frozen=True)
class PackedPart:
    """Whole units of tokens of every segment, end to end; all tensors contiguous.

    keys       (codes uint8 (unit, row, width), step, base float16 (unit, token / group, width)): a step per channel
    values     (codes uint8 (unit, row, width), step, base float16 (unit, token, channel group)): a step per token
    units      int (batch, kv_head), units of each segment
    longest    units of the longest segment, where known without asking the device: balances work, changes no result

    x_hat = code * step + base. A unit has group * 8 / min(key_bits, value_bits, 8) tokens; each block of
    group * 8 / bits tokens in it is `group` rows of bytes, and byte (w, d) holds the codes of tokens w, w + group, ...
    from its lowest bits on. At 16 bits keys or values are (numbers (unit, token, width),) instead.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    units: Tensor
    key_bits: int
    value_bits: int
    group: int
    longest: int | None = None

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return self.group * 8 // min(self.key_bits, self.value_bits, 8)

    @property
    def kv_heads(self) -> int:
        return self.units.shape[1]

    @property
    def width(self) -> int:
        """Of a value."""
        return self.values[0].shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.keys, *self.values, self.units


@dataclass(frozen=True)
class WholePart:
    """Tokens as they are, filled from slot 0 on, with any strides; or segments of any lengths end to end.

    keys       (batch, kv_head, slot, width), or (token, width) end to end, which needs `lengths`
    values     the same; their width may be another
    lengths    int (batch, kv_head), tokens of each segment; None where every slot is filled
    longest    tokens of the longest segment, where known without asking the device: balances work, changes no result
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None
    longest: int | None = None

    @property
    def end_to_end(self) -> bool:
        return self.keys.dim() == 2

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1] if self.lengths is None else self.lengths.shape[1]

    @property
    def width(self) -> int:
        """Of a value."""
        return self.values.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values) if self.lengths is None else (self.keys, self.values, self.lengths)


Part = PackedPart | WholePart


def check(query: Tensor, parts: Sequence[Part]) -> tuple[int, int]:
    """(kv_heads, width of a value). Raises ValueError, in words, for shapes and dtypes that don't belong together."""
    if query.dim() != 4 or query.shape[2] != 1:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected (batch, head, 1, d_head): one per head.")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"query: got {query.dtype}, expected float16, bfloat16 or float32.")
    if not parts:
        raise ValueError("kv_attention: got no part, expected at least one. An empty cache is a part without tokens.")
    for number, part in enumerate(parts):
        wrong = _wrong_packed(query, part) if isinstance(part, PackedPart) else _wrong_whole(query, part)
        if wrong:
            raise ValueError(f"parts[{number}].{wrong}.")
    found = {(part.kv_heads, part.width) for part in parts}
    if len(found) > 1:
        raise ValueError(f"parts: got (kv_heads, value width) {sorted(found)}, expected the same in every part.")
    kv_heads, width = found.pop()
    if not kv_heads or query.shape[1] % kv_heads:
        raise ValueError(f"query: got {query.shape[1]} heads, expected a multiple of {kv_heads} key/value heads.")
    return kv_heads, width


def _wrong_packed(query: Tensor, part: PackedPart) -> str | None:
    """What is wrong, in words that are made only then: a decode step asks in every layer."""
    for name, bits in (("key_bits", part.key_bits), ("value_bits", part.value_bits)):
        if bits not in (*BITS, WHOLE):
            return f"{name}: got {bits}, expected 2, 4, 8 or 16"
    if not _are_counts(part.units, query):
        return f"units: got {part.units.dtype} {tuple(part.units.shape)}, expected integers (batch, kv_head)"
    for name, side, bits in (("keys", part.keys, part.key_bits), ("values", part.values, part.value_bits)):
        if len(side) != (1 if bits == WHOLE else 3) or any(tensor.dim() != 3 for tensor in side):
            got = [tuple(tensor.shape) for tensor in side]
            return f"{name}: got shapes {got}, expected three axes each of codes, step and base, or of what is whole"
        width = query.shape[-1] if name == "keys" else part.width
        wanted = [(query.dtype, (len(part.keys[0]), part.unit, width))]
        if bits != WHOLE:
            steps = (part.unit // part.group, width) if name == "keys" else (part.unit, side[1].shape[2])
            codes = torch.uint8, (len(part.keys[0]), part.unit * bits // 8, width)
            wanted = [codes, *[(torch.float16, (len(part.keys[0]), *steps))] * 2]
        for tensor, (dtype, shape) in zip(side, wanted, strict=True):
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                order = "" if tensor.is_contiguous() else " not contiguous"
                return f"{name}: got {tensor.dtype} {tuple(tensor.shape)}{order}, expected {dtype} {shape} contiguous"
    if part.value_bits != WHOLE and (not part.values[1].shape[2] or part.width % part.values[1].shape[2]):
        return f"values: got {part.values[1].shape[2]} channel groups, expected a divisor of {part.width}"
    return None


def _wrong_whole(query: Tensor, part: WholePart) -> str | None:
    """What is wrong, in words, or None."""
    if part.lengths is not None and not _are_counts(part.lengths, query):
        return f"lengths: got {part.lengths.dtype} {tuple(part.lengths.shape)}, expected integers (batch, kv_head)"
    if part.end_to_end and part.lengths is None:
        return "lengths: got None for tokens end to end, expected (batch, kv_head) counts"
    if not part.keys.dtype == part.values.dtype == query.dtype:
        return f"keys and values: got {part.keys.dtype} and {part.values.dtype}, expected the query's {query.dtype}"
    keys, values = tuple(part.keys.shape), tuple(part.values.shape)
    slots = len(keys) == 4 and keys[:2] == (query.shape[0], part.kv_heads)
    if not (slots or part.end_to_end) or keys[-1] != query.shape[-1] or keys[:-1] != values[:-1]:
        rest = f"({query.shape[0]}, kv_head, slot, {query.shape[-1]}) or (token, {query.shape[-1]}), and as many values"
        return f"keys and values: got {keys} and {values}, expected {rest}"
    return None


def _are_counts(counts: Tensor, query: Tensor) -> bool:
    whole_numbers = not counts.is_floating_point() and counts.dtype != torch.bool
    return counts.dim() == 2 and counts.shape[0] == query.shape[0] and whole_numbers
