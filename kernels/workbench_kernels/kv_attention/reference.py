"""The truth that the kernel must equal: unpack, lay tokens side by side, softmax. Float32, a segment at a time.

out = softmax(q K^T scaling) V over all tokens of a segment, K and V their packed and whole tokens together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench_kernels.kv_attention.parts import WHOLE, PackedPart, Part


def kv_attention(
    query: Tensor, parts: Sequence[Part], kv_heads: int, *, scaling: float, soft_cap: float | None = None
) -> Tensor:
    """(batch, head, 1, value width) in the query's dtype; a segment without tokens gives zeros."""
    batch, heads, _, width = query.shape
    rows = query.float().reshape(batch, kv_heads, heads // kv_heads, width)
    held = [list(zip(*segments(part, batch, kv_heads), strict=True)) for part in parts]
    outputs = []
    for segment, row in enumerate(rows.flatten(0, 1)):  # row (head of this kv_head, width)
        keys = torch.cat([part[segment][0] for part in held])  # (token, width)
        values = torch.cat([part[segment][1] for part in held])
        logits = row @ keys.T * scaling
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        outputs.append(logits.softmax(-1) @ values)
    return torch.stack(outputs).reshape(batch, heads, 1, -1).to(query.dtype)


def segments(part: Part, batch: int, kv_heads: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each segment in float32, (token, width)."""
    if isinstance(part, PackedPart):
        tokens = (part.units * part.unit).flatten().tolist()
        keys, values = (side.flatten(0, 1) for side in (unpack_keys(part), unpack_values(part)))
        return list(keys.split(tokens)), list(values.split(tokens))
    lengths = [part.keys.shape[-2]] * batch * kv_heads if part.lengths is None else part.lengths.flatten().tolist()
    sides = part.keys.float(), part.values.float()
    if part.end_to_end:
        keys, values = (list(side.split(lengths)) for side in sides)
    else:
        keys, values = ([t[:n] for t, n in zip(side.flatten(0, 1), lengths, strict=True)] for side in sides)
    return keys, values


def unpack_keys(part: PackedPart) -> Tensor:
    """(unit, token, width) in float32."""
    if part.key_bits == WHOLE:
        return part.keys[0].float()
    rows, step, base = part.keys
    codes = unpack(rows, part.key_bits, part.group).unflatten(1, (-1, part.group))  # (unit, group number, token, width)
    return (codes * step.float()[:, :, None] + base.float()[:, :, None]).flatten(1, 2)


def unpack_values(part: PackedPart) -> Tensor:
    """(unit, token, width) in float32."""
    if part.value_bits == WHOLE:
        return part.values[0].float()
    rows, step, base = part.values
    codes = unpack(rows, part.value_bits, part.group).unflatten(2, (step.shape[2], -1))  # (unit, token, group, channel)
    return (codes * step.float()[..., None] + base.float()[..., None]).flatten(2)


def unpack(rows: Tensor, bits: int, group: int) -> Tensor:
    """Codes (unit, token, width) of bytes (unit, row, width): token = block * planes * group + plane * group + w."""
    shifts = torch.arange(0, 8, bits, device=rows.device, dtype=torch.uint8)[:, None, None]  # (plane, 1, 1)
    blocks = rows.unflatten(1, (-1, 1, group))  # (unit, block, 1, w, width)
    return ((blocks >> shifts) & 2**bits - 1).flatten(1, 3)
