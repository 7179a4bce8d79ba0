"""kv_attention: one query per head against tokens held in few bits and tokens held whole, in one softmax.

out = softmax(q K^T scaling) V; see `reference` for the truth, `kernel` for how codes are never unpacked into memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench_kernels.dispatch import Impl, choose
from workbench_kernels.kv_attention import reference
from workbench_kernels.kv_attention.parts import PackedPart, Part, WholePart, check

__all__ = ["PackedPart", "WholePart", "kv_attention", "unserved"]

GROUPS = (16, 32, 64, 128)  # tokens of a tile: a power of two, and no fewer than a tensor core contracts
WIDEST = 256
TILE = 128 * 128  # numbers of one group of tokens: what the memory of a multiprocessor holds twice over


def kv_attention(
    query: Tensor,
    parts: Sequence[Part],
    *,
    scaling: float | None = None,
    soft_cap: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of one query per head over every token of every part.

    query      (batch, head, 1, d_head) float16, bfloat16 or float32, any strides; head h reads kv_head
               h // (heads / kv_heads)
    parts      any number of PackedPart and WholePart; their order changes nothing but the last bits
    scaling    of the logits; None for d_head^-1/2
    soft_cap   c of logits c tanh(logits / c); the reference serves it
    impl       "auto", "triton" or "reference": see `dispatch.choose`. Where `unserved` names a reason, "auto" is the
               reference, and "triton" an error

    Returns (batch, head, 1, width of a value) in the query's dtype; a segment without tokens gives zeros. For 16-bit
    queries packed numbers are multiplied in float16, as their steps are float16 (a bfloat16 query beyond 65504 gives
    NaN). Counts are trusted: reading them would wait for the device. Raises ValueError for parts that don't fit.
    """
    parts = list(parts)
    kv_heads, width = check(query, parts)
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    chosen = choose(impl, query, *(tensor for part in parts for tensor in part.tensors))
    reason = unserved(query, parts, soft_cap) if chosen == "triton" else None
    if reason and impl == "triton":
        raise ValueError(f"impl: got 'triton', but the kernel serves no {reason}. Pass impl='reference' or 'auto'.")
    if chosen == "reference" or reason:
        return reference.kv_attention(query, parts, kv_heads, scaling=scale, soft_cap=soft_cap)
    from workbench_kernels.kv_attention import kernel  # imports triton

    return kernel.kv_attention(query, parts, kv_heads, width, scaling=scale)


def unserved(query: Tensor, parts: Sequence[Part], soft_cap: float | None = None) -> str | None:
    """What of this the kernel doesn't serve, in words, or None."""
    if soft_cap is not None:
        return "soft cap"
    if torch.is_grad_enabled() and any(t.requires_grad for part in parts for t in (query, *part.tensors)):
        return "gradient: call it under torch.no_grad()"
    widest = max(query.shape[-1], *(part.width for part in parts))
    if widest > WIDEST:
        return f"width of {widest}: up to {WIDEST}"
    for part in parts:
        if isinstance(part, PackedPart) and part.group not in GROUPS:
            return f"group of {part.group}: one of {GROUPS}"
        if isinstance(part, PackedPart) and part.group * widest > TILE:
            return f"group of {part.group} at width {widest}: up to {TILE} numbers together"
    return None
