"""How much few bits hurt one layer: its attention over a packed cache against its attention over the whole one.

e_o = mean over queries of |o_hat - o| / |o|, o the outputs of all heads; e_k = |K_hat - K| / |K| over packed tokens,
e_v likewise. A query at t sees packed what the cache would have packed by then, so layer by layer this is what reading
token by token gives. Source: KVTuner, Li et al., 2025 (arXiv 2502.04420); the streaming rule is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.cache.packed import Format, pack_keys, pack_values, unpack_keys, unpack_values
from workbench.methods.cache.bits import Pair, packed_tokens

MOST_LOGITS = 2**24  # (head, query, token) at once
MEASURES = ("e_o", "e_k", "e_v")


@dataclass(frozen=True)
class Layout:
    """How a cache is packed, whatever its bits: the other settings of `QuantizeKV`."""

    group: int = 32
    residual: int = 128
    sinks: int = 4

    def start(self, pairs: Sequence[Pair]) -> int:
        """The first query that sees something packed under every one of these pairs."""
        return self.sinks + self.residual + max((Format(*pair, self.group).unit for pair in pairs), default=1)


@torch.no_grad()
def local_errors(
    query: Float[Tensor, "head seq d_head"],
    keys: Float[Tensor, "kv_head seq d_head"],
    values: Float[Tensor, "kv_head seq d_value"],
    pairs: Sequence[Pair],
    layout: Layout,
    *,
    scaling: float | None = None,
    soft_cap: float | None = None,
) -> Float[np.ndarray, "pair measure"]:
    """(pair, 3) e_o, e_k and e_v of one layer on one text, over the queries that see something packed under every pair.

    Raises ValueError for a text so short that some pair packs nothing.
    """
    seq, start = query.shape[1], layout.start(pairs)
    if seq <= start:
        raise ValueError(
            f"local_errors: got a text of {seq} tokens, expected more than {start}: sinks, residual and one unit. "
            "Give longer texts, or set a smaller group or residual."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    packed = [_packed(keys, values, Format(*pair, layout.group), layout) for pair in pairs]
    sums = np.zeros(len(pairs))
    size = max(1, MOST_LOGITS // (query.shape[0] * seq))
    for first in range(start, seq, size):
        at = torch.arange(first, min(first + size, seq), device=query.device)
        asked = query[:, at].float() * scale
        exact = _attention(asked, keys, values, at, soft_cap, None)
        norm = exact.norm(dim=-1)
        for number, (pair, (k, v)) in enumerate(zip(pairs, packed, strict=True)):
            form = Format(*pair, layout.group)
            replaced = (k, v, layout.sinks, packed_tokens(at, form, layout.residual, layout.sinks))
            moved = (_attention(asked, keys, values, at, soft_cap, replaced) - exact).norm(dim=-1)
            sums[number] += float((moved / norm).where(norm > 0, 0.0).double().sum())
    e_k, e_v = ([_relative(whole, pair[i], layout.sinks) for pair in packed] for i, whole in enumerate((keys, values)))
    return np.stack([sums / (seq - start), e_k, e_v], axis=1)


def _packed(keys: Tensor, values: Tensor, form: Format, layout: Layout) -> tuple[Tensor, Tensor]:
    """Keys and values as they come back, of all tokens that the last query sees packed: (kv_head, token, width)."""
    count = packed_tokens(keys.shape[1] - 1, form, layout.residual, layout.sinks)
    part = slice(layout.sinks, layout.sinks + count)
    units = [tensor[:, part].unflatten(1, (-1, form.unit)).flatten(0, 1) for tensor in (keys, values)]
    k = unpack_keys(pack_keys(units[0], form), form, keys.dtype)
    v = unpack_values(pack_values(units[1], form), form, values.dtype)
    return k.reshape(keys.shape[0], count, keys.shape[2]), v.reshape(values.shape[0], count, values.shape[2])


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    at: Tensor,
    soft_cap: float | None,
    replaced: tuple[Tensor, Tensor, int, Tensor] | None,
) -> Float[Tensor, "query wide"]:
    """Causal attention in float32, all heads side by side; `replaced`: packed keys and values, from where, how many."""
    heads, seq = query.shape[0], keys.shape[1]
    groups = heads // keys.shape[0]
    token = torch.arange(seq, device=query.device)
    logits = query @ _repeated(keys, groups).transpose(1, 2)  # (head, query, token)
    is_packed = torch.zeros(len(at), seq, dtype=torch.bool, device=query.device)
    if replaced is not None:
        k, v, first, counts = replaced
        is_packed = (token >= first) & (token < first + counts[:, None])
        part = slice(first, first + k.shape[1])
        rounded = query @ _repeated(k, groups).transpose(1, 2)
        logits[:, :, part] = torch.where(is_packed[:, part], rounded, logits[:, :, part])
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    weight = logits.masked_fill(token > at[:, None], -torch.inf).softmax(-1)
    out = weight.masked_fill(is_packed, 0.0) @ _repeated(values, groups)
    if replaced is not None:
        out = out + weight[:, :, part].masked_fill(~is_packed[:, part], 0.0) @ _repeated(v, groups)
    return out.transpose(0, 1).flatten(1)


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    return tensor.float().repeat_interleave(groups, 0)


def _relative(whole: Tensor, packed: Tensor, first: int) -> float:
    before = whole[:, first : first + packed.shape[1]].double()
    norm = float(before.norm())
    return float((packed.double() - before).norm()) / norm if norm > 0 else 0.0
