"""Products of vectors with a vocabulary, tile by tile, and the k best so far: the products are never written.

A score and its row become one integer that orders as scores do, equal ones by the smaller row; the list of the best is
a tile of such integers, and a candidate replaces the smallest of them.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# (a jitted function takes more, and gives back other, than its Python text says)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = tl.constexpr(-(2**63))  # the key of no row; every number's is larger by far more than the places of a list
NAN = tl.constexpr(0x7FC00000)  # bits above those of every number


@triton.jit
def keys_of(score, row, valid):
    """int64: the score's order in the upper half, the row counted down in the lower."""
    score = tl.where(score == 0, 0.0, score)  # -0 and 0 are equal
    bits = tl.where(score == score, score.to(tl.int32, bitcast=True), NAN)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative numbers' bits grow the wrong way
    key = (order.to(tl.int64) << 32) | (0xFFFFFFFF - row.to(tl.int64))
    return tl.where(valid, key, LEAST)


@triton.jit
def inserted(best, keys):
    """The largest keys of both tiles, in `best`: one candidate of every vector at a time, while any has one left."""
    top, low = tl.max(keys, 1), tl.min(best, 1)  # [N]
    while tl.max((top > low).to(tl.int32)) > 0:
        best = tl.where((best == low[:, None]) & (top > low)[:, None], top[:, None], best)
        keys = tl.where(keys == top[:, None], LEAST, keys)
        top, low = tl.max(keys, 1), tl.min(best, 1)
    return best


@triton.jit
def stream(
    x, w, shift, allowed, scale, bias, out,
    n, vocab, width, x_row, x_column, w_row, w_column, tiles,
    K: tl.constexpr, SIGNS: tl.constexpr, SHIFT: tl.constexpr, ALLOWED: tl.constexpr, SCALE: tl.constexpr,
    BIAS: tl.constexpr, PLACES: tl.constexpr, N: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)  # [N]
    place = tl.arange(0, PLACES)[None, :].to(tl.int64)
    # Empty places differ, so that one at a time is the smallest; spare ones, beyond K, never are.
    best = tl.where(place < K, place + LEAST, 2**63 - 1) + tl.zeros([N, PLACES], tl.int64)
    worst = best
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(vocab, V))):
        row = (tile * V + tl.arange(0, V)).to(tl.int64)  # [V]
        score = tl.zeros([N, V], tl.float32)
        for start in range(0, width, D):
            d = start + tl.arange(0, D).to(tl.int64)
            a = tl.load(x + vector[:, None] * x_row + d[None, :] * x_column,
                        (vector < n)[:, None] & (d < width)[None, :], other=0.0)  # fmt: skip
            b = tl.load(w + row[None, :] * w_row + d[:, None] * w_column,
                        (row < vocab)[None, :] & (d < width)[:, None], other=0.0)  # fmt: skip
            score = tl.dot(a, b.to(a.dtype), score, input_precision="ieee")
        if SHIFT:
            score -= tl.load(shift + vector, vector < n, other=0.0)[:, None]
        if SCALE:
            score *= tl.load(scale + row, row < vocab, other=0.0)[None, :]
        if BIAS:
            score += tl.load(bias + row, row < vocab, other=0.0)[None, :]
        valid = (row < vocab)[None, :] & (vector < n)[:, None]
        if ALLOWED:
            valid &= (tl.load(allowed + row, row < vocab, other=0) != 0)[None, :]
        best = inserted(best, keys_of(score, row[None, :], valid))
        if SIGNS == 2:
            worst = inserted(worst, keys_of(-score, row[None, :], valid))
    at = (vector[:, None] * tl.num_programs(1) + tl.program_id(1)) * SIGNS * K + place  # [N, PLACES]
    here = (vector < n)[:, None] & (place < K)
    tl.store(out + at, best, here)
    if SIGNS == 2:
        tl.store(out + at + K, worst, here)


def pick_config(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(vectors, rows and width of a tile, warps): what spills no register on sm_90, with both signs and 64 answers."""
    return (32 if dtype == torch.float32 else 64), 64, 64, 8


def pick_splits(vectors: int, tiles: int, processors: int) -> int:
    """Parts of the vocabulary: enough for two programs per processor, and at least 4 tiles in each."""
    return max(1, min(triton.cdiv(2 * processors, vectors), tiles // 4))


def largest(
    x: Tensor,
    w: Tensor,
    k: int,
    *,
    negated: bool,
    allowed: Tensor | None,
    centre: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What `reference.largest` gives, up to the order of the sums in a product."""
    (n, width), vocab, signs = x.shape, len(w), 1 + negated
    vectors, rows, depth, warps = pick_config(x.dtype)
    tiles = triton.cdiv(vocab, rows)
    if splits is None:
        on_gpu = x.device.type == "cuda"
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if on_gpu else 1
        splits = pick_splits(triton.cdiv(n, vectors), tiles, processors)
    each = triton.cdiv(tiles, splits)
    out = torch.empty(n, splits, signs, k, dtype=torch.int64, device=x.device)
    shift = None if centre is None else x.float() @ centre.float()
    options = {"SHIFT": shift, "ALLOWED": allowed, "SCALE": scale, "BIAS": bias}
    given = [
        x if one is None else one.contiguous().view(torch.uint8) if name == "ALLOWED" else one.float().contiguous()
        for name, one in options.items()
    ]
    sizes = {name: one is not None for name, one in options.items()}
    with torch.cuda.device_of(x):  # a kernel starts on the current device, not on that of its tensors
        stream[(triton.cdiv(n, vectors), splits)](
            x, w, *given, out, n, vocab, width, *x.stride(), *w.stride(), each, K=k, SIGNS=signs, **sizes,
            PLACES=triton.next_power_of_2(k), N=vectors, V=rows, D=depth, num_warps=warps,
        )  # fmt: skip
    best = out.permute(2, 0, 1, 3).flatten(2).topk(k, dim=-1).values  # (sign, n, k): keys differ, so no ties
    return scores_of(best), 0xFFFFFFFF - (best & 0xFFFFFFFF)


def scores_of(keys: Tensor) -> Tensor:
    """The float32 scores of keys."""
    order = (keys >> 32).to(torch.int32)
    return torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
