"""Attention over slots: each query sees the filled slots at or before its own logical position.

out = softmax(c tanh(q K^T s / c)) V over those slots, c the soft cap of models that have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench import fused
from workbench.cache.segments import Slots

if TYPE_CHECKING:
    from workbench.cache.layer import Part

BLOCK = 1024  # queries at a time where a mask is needed: the mask is (batch, kv_head, block, slot)


def attend(
    query: Float[Tensor, "batch head seq d_head"],
    slots: Slots,
    positions: Int[Tensor, "batch seq"],
    *,
    scaling: float | None,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch head seq d_head"]:
    """Attention outputs; a query that sees nothing (padding) gets zeros."""
    keys, values = slots.tensors[:2]
    _, heads, seq, _ = query.shape
    groups = heads // keys.shape[1]
    if seq == 1 and slots.full:  # decoding without padding: every slot is in the past
        return _grouped(query, keys, values, None, groups, scaling, soft_cap)
    as_many = seq == keys.shape[2] and slots.full and soft_cap is None
    # A prompt without padding; elsewhere older tokens may be as many as the padding now.
    if as_many and bool((slots.positions == positions[:, None]).all()):
        return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=groups > 1)
    blocks = []
    for start in range(0, seq, BLOCK):
        part = slice(start, start + BLOCK)
        mask = visible(slots, positions[:, part])  # (batch, kv_head or 1, block, slot)
        blocks.append(_grouped(query[:, :, part], keys, values, mask, groups, scaling, soft_cap))
    return torch.cat(blocks, 2) if len(blocks) > 1 else blocks[0]


def attend_in_blocks(
    query: Float[Tensor, "batch head 1 d_head"],
    parts: Sequence[Part],
    kv_heads: int,
    *,
    scaling: float | None,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch head 1 d_head"]:
    """What `attend` gives for one query that sees every token of `parts`, read a block at a time: keys, then values.

    In float32. Packed parts are never whole in memory: O(slot) numbers for the weights, and one block; on CUDA a kernel
    reads the codes themselves.
    """
    by_kernel = fused.attention(query, parts, kv_heads, scaling=scaling, soft_cap=soft_cap)
    if by_kernel is not None:
        return by_kernel
    batch, heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    packed = query.float().reshape(batch, kv_heads, heads // kv_heads, width) * scale
    logits = torch.cat([packed @ keys.float().transpose(2, 3) for part in parts for keys in part.blocks(0)], -1)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if all(part.even for part in parts):
        rest = logits.softmax(-1)
    else:
        filled = torch.cat([part.filled.expand(-1, kv_heads, -1) for part in parts], -1)[:, :, None]
        rest = logits.masked_fill(~filled, -torch.inf).softmax(-1).where(filled.any(-1, keepdim=True), 0.0)
    out = torch.zeros((), device=query.device)
    for values in (values for part in parts for values in part.blocks(1)):
        here, rest = rest[..., : values.shape[2]], rest[..., values.shape[2] :]
        out = out + here @ values.float()
    return out.reshape(batch, heads, 1, -1).to(query.dtype)


def visible(slots: Slots, positions: Int[Tensor, "batch seq"]) -> Tensor:
    """(batch, kv_head or 1, seq, slot): True where a query may look."""
    at = slots.positions[:, :, None, :]
    return (at >= 0) & (at <= positions[:, None, :, None])


def weights(
    query: Float[Tensor, "batch head seq d_head"],
    slots: Slots,
    positions: Int[Tensor, "batch seq"],
    scaling: float | None,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch head seq slot"]:
    """Attention weights in float32, for scorers: O(seq x slot) memory, so ask for few queries."""
    keys = slots.tensors[0]
    groups = query.shape[1] // keys.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = torch.matmul(query.float(), keys.float().repeat_interleave(groups, 1).transpose(2, 3)) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    mask = visible(slots, positions)
    mask = mask.repeat_interleave(groups, 1) if mask.shape[1] > 1 else mask
    return logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)


def _grouped(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    groups: int,
    scaling: float | None,
    cap: float | None,
) -> Tensor:
    """All query heads of a key/value head as rows of one product, so that no key is repeated."""
    batch, heads, seq, width = query.shape
    packed = query.reshape(batch, heads // groups, groups * seq, width)
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).repeat(1, 1, groups, 1)  # (batch, kv_head or 1, groups * seq, slot)
    if cap is None:
        out = scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    else:
        scale = width**-0.5 if scaling is None else scaling
        logits = cap * torch.tanh(packed @ keys.transpose(2, 3) * scale / cap)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        out = logits.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    if mask is not None:  # a query that sees nothing; any other NaN is the model's own
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
    return out.reshape(batch, heads, seq, values.shape[-1])
