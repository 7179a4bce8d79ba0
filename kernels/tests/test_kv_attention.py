"""One query per head over packed and whole tokens: the kernel is the reference, be they empty, uneven or poisoned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from workbench_kernels.kv_attention import (
    PackedPart,
    WholePart,
    bench,
    kv_attention,
    parts,
    reference,
    unserved,
)

FLOATS = (torch.float32, torch.float16)  # Triton's interpreter multiplies bfloat16 wrongly: see the tests marked gpu
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of relative RMS; measured 5e-7, 8e-4


def packed_rows(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes (unit, token, width) as bytes, straight from the definition: token by token."""
    planes = 8 // bits
    rows = torch.zeros(codes.shape[0], codes.shape[1] // planes, codes.shape[2], dtype=torch.uint8)
    for token in range(codes.shape[1]):
        block, within = divmod(token, planes * group)
        plane, w = divmod(within, group)
        rows[:, block * group + w] |= codes[:, token] << plane * bits
    return rows


def packed_part(
    units: list[list[int]],
    width: int,
    key_bits: int,
    value_bits: int,
    group: int,
    dtype: torch.dtype,
    draw: torch.Generator,
    device: torch.device,
) -> PackedPart:
    """Random codes, steps and bases: keys and values of about unit size."""
    counts, unit = torch.tensor(units, dtype=torch.int32), group * 8 // min(key_bits, value_bits, 8)
    n, channels = int(counts.sum()), group if width % group == 0 else width

    def side(bits: int, steps: tuple[int, ...]) -> tuple[Tensor, ...]:
        if bits == 16:
            return (torch.randn(n, unit, width, generator=draw).to(dtype).to(device),)
        codes = torch.randint(0, 2**bits, (n, unit, width), generator=draw, dtype=torch.uint8)
        step = (torch.rand(n, *steps, generator=draw) * 6 / 2**bits).half()
        base = torch.randn(n, *steps, generator=draw).half() - 1.5
        return tuple(t.to(device) for t in (packed_rows(codes, bits, group), step, base))

    keys, values = side(key_bits, (unit // group, width)), side(value_bits, (unit, width // channels))
    return PackedPart(keys, values, counts.to(device), key_bits, value_bits, group)


def whole_part(
    batch: int, heads: int, slots: int, width: int, dtype: torch.dtype, draw: torch.Generator, device: torch.device
) -> WholePart:
    keys, values = (torch.randn(batch, heads, slots, width, generator=draw).to(dtype).to(device) for _ in range(2))
    return WholePart(keys, values)


def queries(
    batch: int, heads: int, width: int, dtype: torch.dtype, draw: torch.Generator, device: torch.device
) -> Tensor:
    return torch.randn(batch, heads, 1, width, generator=draw).to(dtype).to(device)


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    assert bool(torch.isfinite(found).all()), "NaN or infinity in the output"
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))


def in_float32(part: PackedPart | WholePart) -> PackedPart | WholePart:
    """The same numbers, so that the reference rounds nothing."""
    if isinstance(part, WholePart):
        return WholePart(part.keys.float(), part.values.float(), part.lengths)
    sides = (tuple(t.float() for t in side) if len(side) == 1 else side for side in (part.keys, part.values))
    return PackedPart(*sides, part.units, part.key_bits, part.value_bits, part.group)


def gap(query: Tensor, held: list, splits: int | None = None) -> float:
    """Relative RMS between kernel and reference; `splits` None takes the public function."""
    wanted = kv_attention(query.float(), [in_float32(part) for part in held], impl="reference")
    if splits is None:
        return relative_rms(kv_attention(query, held, impl="triton"), wanted)
    from workbench_kernels.kv_attention import kernel

    kv_heads, width = parts.check(query, held)
    scaling = query.shape[-1] ** -0.5
    return relative_rms(kernel.kv_attention(query, held, kv_heads, width, scaling=scaling, splits=splits), wanted)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that torch hands out is full of NaN, and so must stay what lies behind it."""
    empty, behind = torch.empty, []

    def nan(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made = empty(math.prod(size) + 256, dtype=dtype, device=device).fill_(float("nan"))
        behind.append(made[math.prod(size) :])
        return made[: math.prod(size)].view(size)

    monkeypatch.setattr(torch, "empty", nan)
    yield
    assert all(bool(memory.isnan().all()) for memory in behind), "a kernel wrote beyond its memory"


GRID = [  # bits, group, query heads of a kv head, width, units of each segment, whole tokens, splits
    (4, 4, 16, 1, 64, [[0, 0]], 5, 2),
    (4, 4, 32, 4, 64, [[3, 3]], 37, 3),
    (2, 2, 16, 7, 64, [[1, 3]], 0, 5),
    (4, 2, 16, 8, 80, [[3, 0]], 1, 1),
    (8, 4, 16, 4, 128, [[1, 1]], 5, 2),
    (8, 8, 32, 7, 80, [[3, 1]], 37, 1),
    (2, 4, 16, 20, 96, [[1]], 1, 3),
    (2, 8, 32, 8, 64, [[2]], 33, 2),
    (16, 4, 16, 4, 96, [[1, 2]], 5, 2),
    (2, 16, 16, 4, 64, [[1, 1]], 0, 2),
    (8, 8, 32, 16, 256, [[1]], 1, 1),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_kernel_is_the_reference(case: tuple, dtype: torch.dtype, device: torch.device, poisoned: None) -> None:
    key_bits, value_bits, group, heads, width, units, slots, splits = case
    draw = torch.Generator().manual_seed(GRID.index(case))
    packed = packed_part(units, width, key_bits, value_bits, group, dtype, draw, device)
    whole = whole_part(1, len(units[0]), slots, width, dtype, draw, device)
    query = queries(1, len(units[0]) * heads, width, dtype, draw, device)
    held = [whole, packed] if splits == 1 else [packed, whole]  # both must keep to their memory, and the last shows it
    assert gap(query, held, splits) < TOLERANCE[dtype]


def test_splits_and_the_order_of_parts_change_nothing(device: torch.device, poisoned: None) -> None:
    draw = torch.Generator().manual_seed(1)
    held = [
        whole_part(2, 2, 4, 64, torch.float32, draw, device),
        packed_part([[3, 0], [1, 2]], 64, 4, 4, 16, torch.float32, draw, device),
        packed_part([[0, 1], [0, 1]], 64, 2, 4, 16, torch.float32, draw, device),
        whole_part(2, 2, 37, 64, torch.float32, draw, device),
    ]
    query = queries(2, 6, 64, torch.float32, draw, device)
    for splits in (None, 1, 7):
        assert gap(query, held, splits) < TOLERANCE[torch.float32]
    assert gap(query, held[::-1]) < TOLERANCE[torch.float32]


def test_tokens_beyond_a_length_are_never_read_and_strides_change_nothing(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(2)
    seq_first = torch.randn(2, 50, 2, 2, 64, generator=draw).to(device)  # (keys or values, slot, batch, kv_head, width)
    keys, values = seq_first.permute(0, 2, 3, 1, 4)
    lengths = torch.tensor([[50, 33], [0, 1]], device=device)
    for segment in range(4):
        keys[segment // 2, segment % 2, int(lengths.flatten()[segment]) :] = float("nan")
        values[segment // 2, segment % 2, int(lengths.flatten()[segment]) :] = float("nan")
    query = queries(8, 2, 64, torch.float32, draw, device)[..., 0, :].transpose(0, 1)[:, :, None]  # (2, 8, 1, 64)
    held = [WholePart(keys, values, lengths), packed_part([[1, 0], [0, 1]], 64, 4, 4, 16, torch.float32, draw, device)]
    assert not query.is_contiguous()
    assert gap(query, held, 2) < TOLERANCE[torch.float32]
    wide = torch.randn(2, 2, 9, 128, generator=draw).to(device)
    every_other = [WholePart(wide[..., ::2], wide[..., 1::2])]
    assert gap(wide.transpose(1, 2)[:, :8, :1, ::2], every_other) < TOLERANCE[torch.float32]


def test_segments_end_to_end_are_what_they_are_in_slots(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(3)
    lengths = torch.tensor([[5, 0], [70, 2]], dtype=torch.int32, device=device)
    keys, values = (torch.randn(77, 32, generator=draw).to(device) for _ in range(2))
    query = queries(2, 4, 32, torch.float32, draw, device)
    filled = torch.arange(70, device=device) < lengths[..., None]
    spread = torch.full((2, 2, 2, 70, 32), float("nan"), device=device)
    spread[0, filled], spread[1, filled] = keys, values
    for splits in (1, 3):
        assert gap(query, [WholePart(keys, values, lengths)], splits) < TOLERANCE[torch.float32]
    ours = kv_attention(query, [WholePart(keys, values, lengths)], impl="reference")
    assert torch.equal(ours, kv_attention(query, [WholePart(*spread, lengths)], impl="reference"))
    assert bool((ours[0, 2:] == 0).all())  # a segment without tokens


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_held_gives_zeros(impl: str, device: torch.device, poisoned: None) -> None:
    draw = torch.Generator().manual_seed(4)
    held = [
        whole_part(1, 2, 0, 64, torch.float16, draw, device),
        packed_part([[0, 0]], 64, 4, 2, 16, torch.float16, draw, device),
    ]
    out = kv_attention(queries(1, 4, 64, torch.float16, draw, device), held, impl=impl)
    assert out.shape == (1, 4, 1, 64) and out.dtype == torch.float16 and bool((out == 0).all())
    nobody = [whole_part(0, 2, 3, 64, torch.float16, draw, device)]
    if impl == "triton":
        assert kv_attention(
            torch.zeros(0, 4, 1, 64, dtype=torch.float16, device=device), nobody, impl="triton"
        ).shape == (0, 4, 1, 64)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_in_a_token_is_never_hidden(impl: str, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(5)
    for part in ("keys", "values"):
        whole = whole_part(1, 2, 5, 32, torch.float32, draw, device)
        getattr(whole, part)[0, 1, 2, 3] = float("nan")
        out = kv_attention(queries(1, 4, 32, torch.float32, draw, device), [whole], impl=impl)
        assert bool(torch.isfinite(out[0, :2]).all())
        assert bool(out[0, 2:].isnan().any(-1).all())


def test_a_whole_tile_of_no_weight_is_passed_over(device: torch.device) -> None:
    """40 keys of minus infinity before 5 others: a running maximum that is still minus infinity."""
    draw = torch.Generator().manual_seed(11)
    whole = whole_part(1, 1, 45, 32, torch.float32, draw, device)
    query = queries(1, 16, 32, torch.float32, draw, device).abs()  # no row without a head: 0 x infinity would warn
    whole.keys[:, :, :40] = -torch.inf
    rest = WholePart(whole.keys[:, :, 40:], whole.values[:, :, 40:])
    found = kv_attention(query, [whole], impl="triton")
    assert relative_rms(found, kv_attention(query, [rest], impl="reference")) < TOLERANCE[torch.float32]


def test_one_head_or_row_never_changes_another(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(6)
    packed = packed_part([[1, 1], [1, 1]], 32, 4, 4, 16, torch.float32, draw, device)
    query = queries(2, 4, 32, torch.float32, draw, device)
    before = kv_attention(query, [packed], impl="triton")
    packed.keys[0][1] = 255  # row 0, kv_head 1
    packed.values[2][1] = 9.0
    changed = (kv_attention(query, [packed], impl="triton") != before).flatten(2).any(-1)
    assert changed.tolist() == [[False, False, True, True], [False] * 4]


def test_golden_bytes_hold_tokens_in_planes_and_units_have_the_bytes_of_the_formula() -> None:
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)[None, :, None]
    assert packed_rows(codes, 4, 2).flatten().tolist() == [0x31, 0x42]
    for bits in parts.BITS:
        codes = torch.randint(0, 2**bits, (2, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        rows = packed_rows(codes, bits, 8)
        assert torch.equal(reference.unpack(rows, bits, 8), codes)
        assert rows.nbytes == codes.numel() * bits // 8
    draw = torch.Generator().manual_seed(0)
    part = packed_part([[2, 1]], 64, 4, 2, 32, torch.float16, draw, torch.device("cpu"))
    assert part.unit == 128
    assert part.keys[0].nbytes == 3 * 128 * 64 * 4 // 8 and part.values[0].nbytes == 3 * 128 * 64 * 2 // 8


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_planted_heavy_hitter_gets_its_weight(impl: str, device: torch.device) -> None:
    """256 tokens, all keys 0 but one of logit 8: weight e^8 / (e^8 + 255) = 0.921198. Its value is 1, the others' 0."""
    codes = torch.zeros(4, 64, 64, dtype=torch.uint8)
    codes[2, 5, 0] = 1
    step = torch.full((4, 4, 64), 64.0).half()
    rows = packed_rows(codes, 4, 16).reshape(8, 16, 64)  # units of 32 tokens
    steps = step.reshape(8, 2, 64)
    values = torch.zeros(4, 64, 64, dtype=torch.uint8)
    values[2, 5] = 15
    value_rows = packed_rows(values, 4, 16).reshape(8, 16, 64)
    value_step = torch.full((8, 32, 4), 1 / 15).half()
    keys = tuple(t.to(device) for t in (rows, steps, torch.zeros_like(steps)))
    held = (value_rows, value_step, torch.zeros_like(value_step))
    part = PackedPart(keys, tuple(t.to(device) for t in held), torch.tensor([[8]], device=device), 4, 4, 16)
    query = torch.zeros(1, 1, 1, 64, device=device)
    query[..., 0] = 1.0
    out = kv_attention(query, [part], impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, 0.921198), rtol=3e-4, atol=0)  # 1/15 in float16


def test_every_code_and_bit_pair_is_read_exactly(device: torch.device) -> None:
    """Values are the codes themselves and all weights equal, so the output counts them: 0 to 255, in float16 too."""
    part = packed_part([[1]], 16, 8, 8, 16, torch.float16, torch.Generator().manual_seed(0), device)
    part.values[0].copy_(torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16))
    part.values[1].fill_(1.0)
    part.values[2].fill_(0.0)
    out = kv_attention(torch.zeros(1, 1, 1, 16, dtype=torch.float16, device=device), [part], impl="triton")
    assert out.flatten().tolist() == [120.0 + d for d in range(16)]


def test_many_tokens_of_small_weight_are_not_rounded_away_in_float16(device: torch.device) -> None:
    """Each of 64 has 2^-26 of the first one's weight, below what float16 holds, and the first one's value is 0."""
    keys, values = torch.zeros(1, 1, 65, 16), torch.full((1, 1, 65, 16), 20000.0)
    keys[..., 0, 0] = 26 / 1.4426950408889634
    values[..., 0, :] = 0.0
    query = torch.zeros(1, 1, 1, 16).half().to(device)
    query[..., 0] = 4.0
    held = [WholePart(keys.half().to(device), values.half().to(device))]
    wanted = kv_attention(query.float(), [in_float32(held[0])], impl="reference")
    assert float(wanted.min()) > 0.01
    assert relative_rms(kv_attention(query, held, impl="triton"), wanted) < TOLERANCE[torch.float16]


def test_cpu_tensors_take_the_reference_and_what_the_kernel_does_not_serve_is_named(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(7)
    query, whole = queries(1, 2, 32, torch.float32, draw, device), whole_part(1, 1, 9, 32, torch.float32, draw, device)
    exact = kv_attention(query, [whole], impl="reference")
    if device.type == "cpu":
        assert torch.equal(kv_attention(query, [whole]), exact)
    capped = kv_attention(query, [whole], soft_cap=0.1)
    assert not torch.allclose(capped, exact) and torch.equal(
        capped, kv_attention(query, [whole], soft_cap=0.1, impl="reference")
    )
    with pytest.raises(ValueError, match=r"serves no soft cap.*impl='reference'"):
        kv_attention(query, [whole], soft_cap=0.1, impl="triton")
    odd = packed_part([[1]], 32, 4, 4, 8, torch.float32, draw, device)
    with pytest.raises(ValueError, match=r"serves no group of 8: one of \(16, 32, 64, 128\)"):
        kv_attention(query, [odd], impl="triton")
    wide = whole_part(1, 1, 3, 512, torch.float32, draw, device)
    assert unserved(queries(1, 2, 512, torch.float32, draw, device), [wide]) == "width of 512: up to 256"
    with pytest.raises(ValueError, match="serves no gradient"):
        kv_attention(query.requires_grad_(), [whole], impl="triton")


def test_scaling_is_the_callers_or_the_root_of_the_width(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(8)
    query, whole = queries(1, 2, 64, torch.float32, draw, device), whole_part(1, 1, 9, 64, torch.float32, draw, device)
    for impl in ("reference", "triton"):
        default = kv_attention(query, [whole], impl=impl)
        assert torch.equal(default, kv_attention(query, [whole], scaling=0.125, impl=impl))
        even = kv_attention(query, [whole], scaling=0.0, impl=impl)
        torch.testing.assert_close(even, whole.values.mean(2, keepdim=True).expand_as(even))


def test_what_does_not_belong_together_is_refused_in_words() -> None:
    draw, cpu = torch.Generator().manual_seed(9), torch.device("cpu")
    query, whole = queries(1, 4, 32, torch.float32, draw, cpu), whole_part(1, 2, 3, 32, torch.float32, draw, cpu)
    packed = packed_part([[1, 1]], 32, 4, 4, 16, torch.float32, draw, cpu)

    def refused(match: str, held: list, q: Tensor = query) -> None:
        with pytest.raises(ValueError, match=match):
            kv_attention(q, held)

    refused("got no part", [])
    refused(r"query: got shape \(1, 4, 2, 32\), expected \(batch, head, 1, d_head\)", [whole], query.repeat(1, 1, 2, 1))
    refused("query: got torch.float64", [whole], query.double())
    refused("query: got 3 heads, expected a multiple of 2", [whole], query[:, :3])
    refused(
        r"parts\[0\].keys and values: got torch.float16 and .*, expected the query's torch.float32",
        [whole_part(1, 2, 3, 32, torch.float16, draw, cpu)],
    )
    refused(
        r"got \(kv_heads, value width\) \[\(1, 32\), \(2, 32\)\]",
        [whole, WholePart(whole.keys[:, :1], whole.values[:, :1])],
    )
    refused(r"parts\[0\].lengths: got None for tokens end to end", [WholePart(whole.keys[0, 0], whole.values[0, 0])])
    refused(r"parts\[0\].lengths: got torch.int64 \(2,\)", [WholePart(whole.keys, whole.values, torch.tensor([1, 2]))])
    refused(
        r"keys and values: got \(1, 2, 3, 32\) and \(1, 2, 2, 32\)", [WholePart(whole.keys, whole.values[:, :, :2])]
    )
    wrong = {"key_bits": 3, "group": 32, "units": torch.tensor([[1.0, 1.0]]), "keys": (), "value_bits": 8}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=r"parts\[0\].*got .*expected"):
            kv_attention(query, [replace(packed, **{name: value})])
    turned = (packed.keys[0].transpose(1, 2).contiguous().transpose(1, 2), *packed.keys[1:])
    refused("not contiguous, expected", [replace(packed, keys=turned)])


def test_a_longest_segment_that_is_told_balances_work_and_changes_no_result(device: torch.device) -> None:
    from workbench_kernels.kv_attention import kernel

    draw = torch.Generator().manual_seed(10)
    packed = packed_part([[0, 5]], 32, 8, 8, 16, torch.float32, draw, device)
    query = queries(1, 2, 32, torch.float32, draw, device)
    for longest in (None, 1, 5):
        told = replace(packed, longest=longest)
        assert gap(query, [told]) < TOLERANCE[torch.float32]
    few, many = (kernel.pick_config(items, 64, 8, 128, 32, 132).splits for items in (4, 2048))
    assert (few, many) == (1, 66)  # four programs for each of 132 multiprocessors


ON_GPU = [(4, 4, 64), (4, 4, 80), (4, 4, 128), (4, 4, 256), (2, 2, 128), (4, 2, 128), (8, 4, 128), (8, 8, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*ON_GPU, (16, 4, 128), (2, 16, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_long_caches_on_a_gpu_are_the_references(
    case: tuple[int, int, int], dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    key_bits, value_bits, width = case
    draw = torch.Generator().manual_seed(width)
    units = [[40, 0, 7, 33], [1, 2, 64, 3]]
    held = [
        whole_part(2, 4, 4, width, dtype, draw, device),
        packed_part(units, width, key_bits, value_bits, 32, dtype, draw, device),
        whole_part(2, 4, 301, width, dtype, draw, device),
    ]
    query = queries(2, 28, width, dtype, draw, device)
    for splits in (None, 1, 9):
        assert gap(query, held, splits) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_a_step_recorded_in_a_cuda_graph_is_the_step(device: torch.device) -> None:
    query, held = bench.cache(bench.Case(batch=2, tokens=4096, bits=4, group=32), device)
    replay = bench.graphed(lambda: kv_attention(query, held, impl="triton"))
    query.neg_()  # the recorded step reads what is there when it is replayed
    assert torch.equal(replay(), kv_attention(query, held, impl="triton"))


AHEAD = """
import json, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workbench_kernels.kv_attention import kernel

TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}
COMMON = dict(HEADS=4, KEY_WIDTH=128, VALUE_WIDTH=128, SEGMENTS=8, KEY_PAD=128)
FLOATS, COUNTS = dict(sums="*fp32", state="*fp32", scale="fp32"), dict(units="*i32", lengths="*i32")

def made(fn, fixed, pointers, capability, warps):
    types = {n: "constexpr" if n in fixed else (FLOATS | COUNTS | pointers).get(n, "i32") for n in fn.arg_names}
    even = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = ASTSource(fn, types, fixed, even)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    kind = pointers.get("query", "none")[1:]
    ptx = done.asm["ptx"]
    return [fn.__name__, kind, capability, ptx.count("mma.sync"), "tf32" in ptx, done.metadata.shared]

def packed(dtype, key_bits, value_bits, group, capability, warps):
    chosen = [TYPES[dtype] if bits == 16 or dtype == "fp32" else tl.float16 for bits in (key_bits, value_bits)]
    fixed = COMMON | dict(GROUP=group, CHANNELS=32, KEY_BITS=key_bits, VALUE_BITS=value_bits, GROUPS_PAD=4)
    fixed |= dict(CHANNELS_PAD=32, KEY_TYPE=chosen[0], VALUE_TYPE=chosen[1])
    pointers = {"query": "*" + dtype}
    for side, bits in (("key", key_bits), ("value", value_bits)):
        pointers |= {side + "_codes": "*" + dtype if bits == 16 else "*u8"}
        pointers |= {side + name: "*" + dtype if bits == 16 else "*fp16" for name in ("_step", "_base")}
    return made(kernel._packed_split, fixed, pointers, capability, warps)

def whole(dtype, capability):
    fixed = COMMON | dict(TOKENS=32, RAGGED=True, END_TO_END=False, VALUE_PAD=128, key_width=1, value_width=1)
    pointers = {name: "*" + dtype for name in ("query", "keys", "values")}
    return made(kernel._whole_split, fixed, pointers, capability, 2)

print(json.dumps([
    packed("fp16", 4, 4, 32, 90, 2), packed("bf16", 4, 2, 32, 90, 2), packed("fp16", 8, 8, 64, 80, 4),
    packed("bf16", 16, 4, 16, 80, 2), packed("fp32", 2, 2, 16, 90, 2), whole("bf16", 90), whole("fp32", 80),
    made(kernel._merge, dict(WIDTH=128, PADDED=128, BLOCK=16), {"out": "*bf16"}, 90, 4),
]))
"""


def test_kernels_compile_ahead_of_time_onto_tensor_cores(ahead_of_time: Any) -> None:
    """In a process of its own, with the interpreter off: what it never refuses, a compiler does."""
    for name, kind, capability, products, tf32, shared in ahead_of_time(AHEAD):
        assert not tf32, f"{name} for sm_{capability} rounds float32 to TF32"
        assert shared <= 80 * 1024, name  # bytes: two programs of a multiprocessor of an A100
        assert bool(products) == (kind in ("fp16", "bf16")), f"{name} {kind} for sm_{capability}: {products} mma"


def test_every_rival_of_the_bench_is_the_reference(device: torch.device) -> None:
    case = bench.Case(batch=1, tokens=128, bits=4, group=32, kv_heads=2, heads=2, width=64)
    query, held = bench.cache(case, device)
    exact = kv_attention(query.float(), [in_float32(part) for part in held], impl="reference")
    rivals = bench.rivals(query, held)
    assert len(rivals) == 4
    for name, (run, n_bytes) in rivals.items():
        assert relative_rms(run(), exact) < TOLERANCE[torch.float16], name
        whole = 2 * 2 * (128 + 132) * 64 * 2  # keys and values, heads, tokens, width, bytes
        assert n_bytes == whole if "sdpa float16" in name else n_bytes < whole
