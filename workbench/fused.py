"""Where Triton kernels take over: packing, eviction, decode attention and read-outs of tensors on a CUDA device.

Each function gives what the plain PyTorch beside its caller gives, within the tolerance of `workbench_kernels`, or says
that it does not serve: on the CPU, for a dtype or a shape that no kernel knows. Nothing here is imported before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workbench.cache.layer import Part
    from workbench.cache.segments import Slots

# "auto": on CUDA. A test may say "triton", which runs on the CPU too where Triton's interpreter is switched on.
IMPL: Literal["auto", "triton", "reference"] = "auto"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(*tensors: Tensor) -> bool:
    """Whether a kernel answers for these tensors."""
    if IMPL == "reference" or (IMPL == "auto" and not tensors[0].is_cuda):
        return False
    from workbench_kernels.dispatch import choose

    return all(t.dtype in DTYPES or not t.is_floating_point() for t in tensors) and choose(IMPL, *tensors) == "triton"


def packed(x: Tensor, bits: int, of: Literal["keys", "values"], group: int) -> tuple[Tensor, ...]:
    """(codes, step, base) of x (unit, token, width), as `workbench.cache.packed` lays them out."""
    from workbench_kernels.kv_pack import kv_pack

    return tuple(kv_pack(x, bits, of, group=group, impl=IMPL))


def chosen(slots: Slots, keep: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(tensors (token, width), positions (token,), counts (batch, kv_head)) of the tokens where `keep` is true."""
    from workbench_kernels.kv_gather import kv_gather

    positions = slots.positions.to(torch.int32).expand_as(keep)
    kept = kv_gather((*slots.tensors, positions), keep, impl=IMPL).checked()
    return kept.tensors[:-1], kept.tensors[-1], kept.counts


def attention(
    query: Tensor, parts: Sequence[Part], kv_heads: int, *, scaling: float | None, soft_cap: float | None
) -> Tensor | None:
    """(batch, head, 1, d_head) one query per head over every token of `parts`; None where the kernel serves not all."""
    if not serves(query):
        return None
    from workbench_kernels.kv_attention import kv_attention, unserved

    held = [_part(part, query, kv_heads) for part in parts]
    if unserved(query, held, soft_cap) is not None:
        return None
    return kv_attention(query, held, scaling=scaling, impl=IMPL)


def top_tokens(
    vectors: Tensor, rows: Tensor, k: int, *, allowed: Tensor | None, negated: bool
) -> tuple[Tensor, Tensor] | None:
    """(scores, ids) of the k rows with the largest product with each vector; None where the kernel does not serve."""
    if not serves(vectors, rows):
        return None
    from workbench_kernels.neuron_topk import MOST, neuron_topk

    if k > MOST or vectors.dim() != 2 or (torch.is_grad_enabled() and vectors.requires_grad):
        return None
    allowed = None if allowed is None else allowed.to(vectors.device)
    scores, ids = neuron_topk(vectors, rows, k, allowed=allowed, negated=negated, impl=IMPL)
    return scores.to(vectors.dtype), ids


def _part(part: Any, query: Tensor, kv_heads: int) -> Any:
    """A part of a layer in the kernel's own terms, without a copy."""
    from workbench_kernels.kv_attention import PackedPart, WholePart

    from workbench.cache.packed import Packed
    from workbench.cache.segments import Frozen

    if isinstance(part, Packed):
        form = part.form
        return PackedPart(
            part.keys, part.values, part.units, form.key_bits, form.value_bits, form.group, longest=part.longest
        )
    if isinstance(part, Frozen):
        return WholePart(*part.tensors[:2], lengths=part.counts, longest=part.longest)
    keys, values = (buffer[:, :, : part.length] for buffer in part.buffers[:2])
    lengths = None if part.even else part.counts[:, None].expand(-1, kv_heads).to(torch.int32)
    return WholePart(keys, values, lengths=lengths, longest=part.length)
