"""Attention that unpacks in registers: codes cross the memory bus once, and nothing unpacked ever does.

Every part is cut into splits; a program takes one split of one segment for all query heads of its key/value head and
leaves a running maximum, a sum of weights and a weighted sum of values in float32; `_merge` joins them.
Source: FlashDecoding (Dao et al., 2023), for the splits; KIVI, Liu et al., 2024 (arXiv 2402.02750), for the format.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from workbench_kernels.kv_attention.parts import WHOLE, PackedPart, Part, WholePart

ROWS = tl.constexpr(16)  # query heads of one program: the least that a tensor core takes
TOKENS = 32  # whole tokens read at once
COUNTS = ["kv_heads", "slots", "splits", "first", "least"]  # no program of their own for multiples of 16
LOG2_E = 1.4426950408889634
# Weights are kept 2^15 times too large (the factor cancels in the end): float16 then holds what is 2^-29 of the largest
# to full precision, and a hundred thousand tokens of small weight are not rounded away.
HEADROOM = tl.constexpr(15.0)


@triton.jit
def _weights(logits, top, total):
    """One step of the running softmax: weights of these tokens, how much the past shrinks, and the new state."""
    new = tl.maximum(top, tl.max(logits, 1))  # (ROWS,)
    safe = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
    weights = tl.exp2(logits - (safe - HEADROOM)[:, None])  # (ROWS, token)
    shrink = tl.exp2(top - safe)
    return weights, shrink, new, total * shrink + tl.sum(weights, 1)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # float32 would become TF32 without it


@triton.jit
def _before(counts, segment, SEGMENTS: tl.constexpr):
    """The sum of the counts of earlier segments: where this one begins."""
    index = tl.arange(0, SEGMENTS)
    return tl.sum(tl.load(counts + index, mask=index < segment, other=0).to(tl.int64))


@triton.jit
def _rows(
    query, batch_stride, head_stride, width_stride, segment, kv_heads,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The query heads of this segment and row block, (ROWS, PADDED), zeros beyond them."""
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    start = query + (segment // kv_heads).to(tl.int64) * batch_stride
    head = (segment % kv_heads) * HEADS + row
    at = start + head[:, None].to(tl.int64) * head_stride + d[None, :] * width_stride
    return tl.load(at, mask=(row < HEADS)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _leave(sums, state, acc, top, total, split, segment, column, live, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the partial result of the live rows: sums (split, row, WIDTH), state (split, row, 2)."""
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at = (split.to(tl.int64) * tl.num_programs(1) + segment) * HEADS + row
    tl.store(sums + at[:, None] * WIDTH + column[None, :], acc, mask=(row < HEADS)[:, None] & live[None, :])
    tl.store(state + at * 2, top, mask=row < HEADS)
    tl.store(state + at * 2 + 1, total, mask=row < HEADS)


@triton.jit
def _codes(rows, plane: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Numbers of one plane: codes of BITS from bytes, or what is whole."""
    if BITS == 16:
        return rows.to(TYPE)
    else:
        codes = (rows >> plane * BITS) & (1 << BITS) - 1
        if tl.float16 == TYPE:  # 1024 + code by its bits, exact to 2047: quicker than the conversion of an integer
            return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
        else:
            return codes.to(TYPE)


@triton.jit(do_not_specialize=[name for name in COUNTS if name != "slots"])
def _packed_split(
    query, sums, state, units, key_codes, key_step, key_base, value_codes, value_step, value_base,
    batch_stride, head_stride, width_stride, scale, kv_heads, splits, first, least,
    HEADS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, GROUP: tl.constexpr,
    CHANNELS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, SEGMENTS: tl.constexpr,
    KEY_PAD: tl.constexpr, GROUPS_PAD: tl.constexpr, CHANNELS_PAD: tl.constexpr,
    KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr,
):  # fmt: skip
    """One split of one segment's packed tokens. Plane j of a unit is GROUP tokens with one key step per channel."""
    KEY_PLANES: tl.constexpr = 8 // KEY_BITS if KEY_BITS < 16 else 1
    VALUE_PLANES: tl.constexpr = 8 // VALUE_BITS if VALUE_BITS < 16 else 1
    PLANES: tl.constexpr = KEY_PLANES if KEY_PLANES > VALUE_PLANES else VALUE_PLANES  # token groups of a unit
    N_GROUPS: tl.constexpr = VALUE_WIDTH // CHANNELS
    split, segment = tl.program_id(0), tl.program_id(1)
    q = _rows(query, batch_stride, head_stride, width_stride, segment, kv_heads, HEADS, KEY_WIDTH, KEY_PAD).to(KEY_TYPE)
    count = tl.load(units + segment)
    size = tl.maximum(tl.cdiv(count, splits), least)  # units of a program: only here is known what the segment has
    begin = _before(units, segment, SEGMENTS)
    w, d = tl.arange(0, GROUP), tl.arange(0, KEY_PAD)
    number, channel = tl.arange(0, GROUPS_PAD)[None, :, None], tl.arange(0, CHANNELS_PAD)[None, None, :]
    column = number * CHANNELS + channel  # of a value, (1, GROUPS_PAD, CHANNELS_PAD)
    live = (number < N_GROUPS) & (channel < CHANNELS)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, GROUPS_PAD * CHANNELS_PAD), tl.float32)
    for unit in range(begin + split * size, begin + tl.minimum((split + 1) * size, count)):
        for plane in tl.static_range(PLANES):
            group = unit * PLANES + plane  # of tokens, among all of this part
            if plane % KEY_PLANES == 0:  # the bytes of a block serve all its planes
                at = (group // KEY_PLANES * GROUP + w)[:, None] * KEY_WIDTH + d[None, :]
                key_rows = tl.load(key_codes + at, mask=d[None, :] < KEY_WIDTH, other=0)  # (GROUP, KEY_PAD)
            if plane % VALUE_PLANES == 0:
                at = (group // VALUE_PLANES * GROUP + w)[:, None, None] * VALUE_WIDTH + column
                value_rows = tl.load(value_codes + at, mask=live, other=0)  # (GROUP, GROUPS_PAD, CHANNELS_PAD)
            keys = _codes(key_rows, plane % KEY_PLANES, KEY_BITS, KEY_TYPE)
            values = _codes(value_rows, plane % VALUE_PLANES, VALUE_BITS, VALUE_TYPE)
            if KEY_BITS < 16:
                at = group * KEY_WIDTH + d
                step = tl.load(key_step + at, mask=d < KEY_WIDTH, other=0.0).to(KEY_TYPE)[None, :]
                base = tl.load(key_base + at, mask=d < KEY_WIDTH, other=0.0).to(KEY_TYPE)[None, :]
                keys = keys * step + base
            if VALUE_BITS < 16:
                at = (group * GROUP + w)[:, None, None] * N_GROUPS + number  # (GROUP, GROUPS_PAD, 1)
                step = tl.load(value_step + at, mask=number < N_GROUPS, other=0.0).to(VALUE_TYPE)
                base = tl.load(value_base + at, mask=number < N_GROUPS, other=0.0).to(VALUE_TYPE)
                values = values * step + base
            logits = _dot(q, tl.trans(keys)) * scale  # (ROWS, GROUP)
            weights, shrink, top, total = _weights(logits, top, total)
            values = tl.reshape(values, (GROUP, GROUPS_PAD * CHANNELS_PAD))
            acc = acc * shrink[:, None] + _dot(weights.to(VALUE_TYPE), values)
    flat = tl.arange(0, GROUPS_PAD * CHANNELS_PAD)
    number, channel = flat // CHANNELS_PAD, flat % CHANNELS_PAD
    live = (number < N_GROUPS) & (channel < CHANNELS)
    _leave(sums, state, acc, top, total, first + split, segment, number * CHANNELS + channel, live, HEADS, VALUE_WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def _whole_split(
    query, sums, state, lengths, keys, values, batch_stride, head_stride, width_stride,
    key_batch, key_head, key_slot, key_width, value_batch, value_head, value_slot, value_width,
    scale, kv_heads, slots, splits, first, least,
    HEADS: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    RAGGED: tl.constexpr, END_TO_END: tl.constexpr, SEGMENTS: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """One split of the whole tokens of one segment, TOKENS at a time."""
    split, segment = tl.program_id(0), tl.program_id(1)
    q = _rows(query, batch_stride, head_stride, width_stride, segment, kv_heads, HEADS, KEY_WIDTH, KEY_PAD)
    count = slots
    if RAGGED:
        count = tl.minimum(tl.load(lengths + segment), slots)
    batch, head = (segment // kv_heads).to(tl.int64), (segment % kv_heads).to(tl.int64)
    keys += batch * key_batch + head * key_head
    values += batch * value_batch + head * value_head
    if END_TO_END:
        begin = _before(lengths, segment, SEGMENTS)
        keys += begin * key_slot
        values += begin * value_slot
    size = tl.maximum(tl.cdiv(count, splits), least)
    stop = tl.minimum((split + 1) * size, count)
    d, c = tl.arange(0, KEY_PAD)[None, :], tl.arange(0, VALUE_PAD)[None, :]
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_PAD), tl.float32)
    for start in range(split * size, stop, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        k = tl.load(keys + token * key_slot + d * key_width, mask=(token < stop) & (d < KEY_WIDTH), other=0.0)
        v = tl.load(values + token * value_slot + c * value_width, mask=(token < stop) & (c < VALUE_WIDTH), other=0.0)
        logits = _dot(q, tl.trans(k)) * scale  # (ROWS, TOKENS)
        logits = tl.where((start + tl.arange(0, TOKENS) < stop)[None, :], logits, float("-inf"))
        weights, shrink, top, total = _weights(logits, top, total)
        acc = acc * shrink[:, None] + _dot(weights.to(v.dtype), v)
    c = tl.arange(0, VALUE_PAD)
    _leave(sums, state, acc, top, total, first + split, segment, c, c < VALUE_WIDTH, HEADS, VALUE_WIDTH)


@triton.jit(do_not_specialize=["splits"])
def _merge(sums, state, out, splits, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """All splits of one query head as one softmax; a head without tokens gets zeros."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, PADDED)
    top, total, acc = float("-inf"), 0.0, tl.zeros((PADDED,), tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        at = split.to(tl.int64) * rows + row
        tops = tl.load(state + at * 2, mask=split < splits, other=float("-inf"))
        totals = tl.load(state + at * 2 + 1, mask=split < splits, other=0.0)
        new = tl.maximum(top, tl.max(tops, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(tops - safe)  # 0 for a split without tokens
        mask = (weight > 0)[:, None] & (d < WIDTH)[None, :]
        part = tl.load(sums + at[:, None] * WIDTH + d[None, :], mask=mask, other=0.0)  # (BLOCK, PADDED)
        shrink = tl.exp2(top - safe)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        total = total * shrink + tl.sum(weight * totals, 0)
        top = new
    result = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))  # NaN stays NaN
    tl.store(out + row.to(tl.int64) * WIDTH + d, result.to(out.dtype.element_ty), mask=d < WIDTH)


@dataclass(frozen=True)
class Config:
    """How one part is cut and run: `splits` of a segment, of at least `least` units or tokens each."""

    splits: int
    least: int
    num_warps: int
    num_stages: int


def pick_config(items: int, tokens: int, programs: int, width: int, group: int, processors: int) -> Config:
    """The table: `items` of a segment with `tokens` in each, `programs` for every split. Not tuned on a GPU yet.

    Enough programs to fill every multiprocessor four times, each with 256 tokens or more. Two warps where a tile is
    small: fewer threads, fewer exchanges between them (counted in the compiled program: see README).
    """
    least = max(1, 256 // tokens)
    wanted = triton.cdiv(4 * processors, max(1, programs))
    splits = max(1, min(wanted, triton.cdiv(items, least)))
    small = width <= 128 and group <= 32
    return Config(splits, least, num_warps=2 if small else 4 if width <= 128 else 8, num_stages=3 if small else 2)


def kv_attention(
    query: Tensor, parts: Sequence[Part], kv_heads: int, width: int, *, scaling: float, splits: int | None = None
) -> Tensor:
    """What `reference.kv_attention` gives. `splits` overrides the table's, for tests and sweeps."""
    batch, heads = query.shape[:2]
    configs = [_config(query, part, kv_heads, splits) for part in parts]
    total = sum(config.splits for config in configs)
    sums = torch.empty(total, batch * heads, width, dtype=torch.float32, device=query.device)
    state = torch.empty(total, batch * heads, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, 1, width, dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    first = 0
    with torch.cuda.device_of(query):
        for part, config in zip(parts, configs, strict=True):
            rest = kv_heads, scaling * LOG2_E, sums, state, first, config
            if isinstance(part, PackedPart):
                _launch_packed(query, part, *rest)
            else:
                _launch_whole(query, part, *rest)
            first += config.splits
        _merge[(batch * heads,)](sums, state, out, total, WIDTH=width, PADDED=_padded(width), BLOCK=16, num_warps=4)
    return out


def _config(query: Tensor, part: Part, kv_heads: int, splits: int | None) -> Config:
    batch, heads, _, width = query.shape
    if isinstance(part, PackedPart):
        held, among, tokens, group = part.keys[0].shape[0], batch * kv_heads, part.unit, part.group
    else:
        held, among, tokens, group = part.keys.shape[-2], batch * kv_heads if part.end_to_end else 1, 1, TOKENS
    items = triton.cdiv(held, among) if part.longest is None else part.longest
    programs = batch * kv_heads * triton.cdiv(heads // kv_heads, ROWS.value)
    on_gpu = query.device.type == "cuda"
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if on_gpu else 4
    config = pick_config(items, tokens, programs, max(width, part.width), group, processors)
    return config if splits is None else replace(config, splits=splits, least=1)


def _launch_packed(
    query: Tensor, part: PackedPart, kv_heads: int, scale: float, sums: Tensor, state: Tensor, first: int, how: Config
) -> None:
    batch, heads, _, key_width = query.shape
    channels = part.width if part.value_bits == WHOLE else part.width // part.values[1].shape[2]
    keys, values = (side if len(side) == 3 else side * 3 for side in (part.keys, part.values))  # whole: never read
    _packed_split[(how.splits, batch * kv_heads, triton.cdiv(heads // kv_heads, ROWS.value))](
        query, sums, state, part.units.contiguous(), *keys, *values,
        query.stride(0), query.stride(1), query.stride(3), scale, kv_heads, how.splits, first, how.least,
        HEADS=heads // kv_heads, KEY_WIDTH=key_width, VALUE_WIDTH=part.width, GROUP=part.group, CHANNELS=channels,
        KEY_BITS=part.key_bits, VALUE_BITS=part.value_bits, SEGMENTS=triton.next_power_of_2(batch * kv_heads),
        KEY_PAD=_padded(key_width), GROUPS_PAD=triton.next_power_of_2(part.width // channels),
        CHANNELS_PAD=_padded(channels), KEY_TYPE=_type(query.dtype, part.key_bits),
        VALUE_TYPE=_type(query.dtype, part.value_bits),
        num_warps=how.num_warps, num_stages=how.num_stages,
    )  # fmt: skip


def _launch_whole(
    query: Tensor, part: WholePart, kv_heads: int, scale: float, sums: Tensor, state: Tensor, first: int, how: Config
) -> None:
    batch, heads, _, key_width = query.shape
    outer = (0, 0) if part.end_to_end else None  # strides of batch and head
    key_strides, value_strides = ((*(outer or t.stride()[:2]), *t.stride()[-2:]) for t in (part.keys, part.values))
    _whole_split[(how.splits, batch * kv_heads, triton.cdiv(heads // kv_heads, ROWS.value))](
        query, sums, state, query if part.lengths is None else part.lengths.contiguous(), part.keys, part.values,
        query.stride(0), query.stride(1), query.stride(3), *key_strides, *value_strides,
        scale, kv_heads, part.keys.shape[-2], how.splits, first, how.least,
        HEADS=heads // kv_heads, KEY_WIDTH=key_width, VALUE_WIDTH=part.width, TOKENS=TOKENS,
        RAGGED=part.lengths is not None, END_TO_END=part.end_to_end, SEGMENTS=triton.next_power_of_2(batch * kv_heads),
        KEY_PAD=_padded(key_width), VALUE_PAD=_padded(part.width), num_warps=how.num_warps, num_stages=how.num_stages,
    )  # fmt: skip


def _padded(width: int) -> int:
    """The block that holds `width` columns; tensor cores take 16 or more."""
    return max(16, triton.next_power_of_2(width))


def _type(dtype: torch.dtype, bits: int) -> tl.dtype:
    """Of the factors of a product: packed numbers are no finer than float16, whole ones keep their own type."""
    if bits != WHOLE and dtype != torch.float32:
        return tl.float16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
