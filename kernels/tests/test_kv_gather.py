"""Kept tokens end to end: the kernel moves what boolean indexing takes, bit for bit, and no row more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from workbench_kernels.kv_gather import Kept, kv_gather, reference

IMPLS = ["reference", "triton"]


def cache(batch: int, heads: int, slots: int, width: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Keys, values, positions (the same for all heads) and scores, each of another type and none of them whole."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, slots + 3, width, generator=draw).half().to(device)[:, :, 1:-2]
    values = torch.randn(batch, slots, width + 2, heads, generator=draw).to(device).permute(0, 3, 1, 2)[..., 2:]
    positions = torch.randint(9999, (batch, 1, slots), generator=draw, dtype=torch.int32).to(device)
    scores = torch.rand(batch, heads, slots, generator=draw).to(device)
    return keys, values, positions.expand(batch, heads, slots), scores


def mask(batch: int, heads: int, slots: int, share: float, device: torch.device, seed: int = 0) -> Tensor:
    return (torch.rand(batch, heads, slots, generator=torch.Generator().manual_seed(seed)) < share).to(device)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 37, 24), (1, 2, 300, 5)])
def test_what_is_kept_is_what_boolean_indexing_takes(
    shape: tuple[int, int, int, int], share: float, device: torch.device
) -> None:
    for seed in range(2):
        tensors, keep = cache(*shape, device, seed), mask(*shape[:3], share, device, seed)
        made = kv_gather(tensors, keep, impl="triton")
        assert same(made.tensors, tuple(tensor[keep] for tensor in tensors))
        assert torch.equal(made.counts, keep.sum(-1).int()) and int(made.total) == int(keep.sum())


def test_segments_end_to_end_are_cut_down_and_counted(device: torch.device) -> None:
    counts = torch.tensor([[5, 0, 40], [0, 17, 1]], device=device)
    keys = torch.randn(63, 12, device=device)
    positions = torch.arange(126, device=device)[::2]
    for keep in (torch.arange(63, device=device) % 3 == 0, torch.zeros(63, dtype=torch.bool, device=device)):
        made = kv_gather((keys, positions), keep, counts, impl="triton")
        assert same(made.tensors, (keys[keep], positions[keep]))
        split = torch.stack([part.sum() for part in keep.split(counts.flatten().tolist())]).reshape(2, 3).int()
        assert torch.equal(made.counts, split) and torch.equal(reference.kept_counts(keep, counts), split)
        assert same(made.checked().tensors, made.tensors)


def test_keeping_twice_is_keeping_what_both_keep(device: torch.device) -> None:
    tensors, keep = cache(2, 2, 40, 8, device), mask(2, 2, 40, 0.6, device)
    once = kv_gather(tensors, keep, impl="triton")
    again = torch.arange(int(once.total), device=device) % 2 == 0
    twice = kv_gather(once.tensors, again, once.counts, impl="triton")
    both = keep.clone()
    both[keep] = again
    assert same(twice.tensors, kv_gather(tensors, both, impl="reference").tensors)
    assert torch.equal(twice.counts, both.sum(-1).int())


@pytest.mark.parametrize("impl", IMPLS)
def test_slots_in_any_order_are_kept_in_the_order_of_the_cache(impl: str, device: torch.device) -> None:
    tensors = cache(2, 3, 50, 6, device)
    best = tensors[3].topk(11, -1).indices  # best first, not oldest first
    made = kv_gather(tensors, best, impl=impl)
    ordered = best.sort(-1).values
    assert torch.equal(made.tensors[0], tensors[0].gather(2, ordered[..., None].expand(-1, -1, -1, 6)).flatten(0, 2))
    assert torch.equal(made.tensors[3], tensors[3].gather(2, ordered).flatten())
    assert bool((made.counts == 11).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_given_buffers_are_filled_from_the_start_and_no_further(impl: str, device: torch.device) -> None:
    tensors, keep = cache(1, 2, 33, 7, device), mask(1, 2, 33, 0.5, device)
    total = int(keep.sum())
    out = (
        torch.full((total + 4, 7), torch.nan, dtype=torch.float16, device=device),
        torch.full((total + 4, 7), torch.nan, device=device),
        torch.full((total + 4,), -7, dtype=torch.int32, device=device),
        torch.full((total + 4,), torch.nan, device=device),
    )
    made = kv_gather(tensors, keep, out=out, impl=impl)
    assert made.tensors[0] is out[0] and same(made.checked().tensors, tuple(tensor[keep] for tensor in tensors))
    assert bool(out[0][total:].isnan().all()) and bool((out[2][total:] == -7).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_too_little_room_writes_nothing_beyond_it_and_is_refused(impl: str, device: torch.device) -> None:
    tensors, keep = cache(1, 2, 33, 7, device), mask(1, 2, 33, 0.5, device)
    total = int(keep.sum())
    backing = torch.full((total, 7), torch.nan, device=device)
    made = kv_gather(tensors[1:2], keep, out=(backing[: total - 3],), impl=impl)
    assert torch.equal(backing[: total - 3], tensors[1][keep][: total - 3]) and bool(backing[total - 3 :].isnan().all())
    with pytest.raises(ValueError, match=f"got {total} tokens to keep and room for {total - 3}"):
        made.checked()
    roomy = kv_gather(tensors, keep, room=total + 5, impl=impl)
    assert len(roomy.tensors[0]) == total + 5
    assert same(roomy.checked().tensors, tuple(tensor[keep] for tensor in tensors))


def test_numbers_are_moved_as_bits(device: torch.device) -> None:
    bits = torch.tensor(
        [0x7FC00001, 0x7F800001, -2147483648, 1, -4194303, 2139095040], dtype=torch.int32, device=device
    )
    odd = bits.view(torch.float32).reshape(1, 1, 6, 1)  # NaNs with a message, -0, the smallest number
    keep = torch.tensor([1, 1, 1, 1, 1, 0], device=device).bool().reshape(1, 1, 6)
    brain, flags = odd.view(torch.bfloat16), odd.view(torch.int32) > 0
    made = kv_gather((odd, brain, flags), keep, impl="triton")
    assert torch.equal(made.tensors[0].view(torch.int32).flatten(), bits[:5])
    assert torch.equal(made.tensors[1].view(torch.int32).flatten(), bits[:5])
    assert torch.equal(made.tensors[2], flags[keep])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_kept_is_not_the_sources_memory(impl: str, device: torch.device) -> None:
    keys = torch.randn(1, 1, 4, 3, device=device)
    made = kv_gather((keys,), torch.ones(1, 1, 4, dtype=torch.bool, device=device), impl=impl)
    before = made.tensors[0].clone()
    keys.zero_()
    assert torch.equal(made.tensors[0], before)
    assert made.tensors[0].untyped_storage().nbytes() == 4 * 3 * 4  # the bytes of what is kept, and no more
    assert made.total.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_nothing_to_keep_from_is_kept_as_nothing(impl: str, shape: tuple[int, int, int], device: torch.device) -> None:
    made = kv_gather(
        (torch.zeros(*shape, 4, device=device),), torch.ones(shape, dtype=torch.bool, device=device), impl=impl
    )
    assert made.tensors[0].shape == (0, 4) and made.counts.shape == shape[:2] and int(made.total) == 0


def test_what_does_not_fit_is_refused_in_words() -> None:
    keys, keep = torch.zeros(1, 2, 5, 4), torch.ones(1, 2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="got 0 tensors and room=None"):
        kv_gather((), keep)
    with pytest.raises(ValueError, match="a room of 0 or more only where there is no `out`"):
        kv_gather((keys,), keep, room=10, out=(torch.zeros(10, 4),))
    with pytest.raises(ValueError, match=r"tensor \(1, 1, 5\) with keep \(1, 2, 5\), .* Expand what all heads share"):
        kv_gather((keys, torch.zeros(1, 1, 5)), keep)
    with pytest.raises(ValueError, match=r"got keep \(10,\), expected \(batch, kv_head, slot\)"):
        kv_gather((keys,), keep.flatten())
    with pytest.raises(ValueError, match=r"got keep \(1, 2, 5\), expected \(token,\) with counts"):
        kv_gather((keys,), keep, torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got counts \(2,\) torch.float32, expected integers"):
        kv_gather((keys[0, 0],), keep[0, 0], torch.ones(2))
    with pytest.raises(ValueError, match=r"got keep \(1, 2, 5\) torch.float32, expected bool, or int64 slots"):
        kv_gather((keys,), keep.float())
    with pytest.raises(ValueError, match="got 2 tensors in out for 1"):
        kv_gather((keys,), keep, out=(torch.zeros(10, 4),) * 2)
    with pytest.raises(
        ValueError, match=r"got out \(10, 4\) torch.float16, expected \(10, 4\) torch.float32, contiguous"
    ):
        kv_gather((keys,), keep, out=(torch.zeros(10, 4).half(),))
    short = kv_gather((keys[0, 0],), keep[0, 0], torch.tensor([[3]]))
    with pytest.raises(ValueError, match="the segments hold 3 of 5 kept tokens"):
        short.checked()


@pytest.mark.gpu
def test_many_tokens_on_a_gpu_and_nothing_waits_where_room_is_known(device: torch.device) -> None:
    tensors, keep = cache(3, 8, 5000, 128, device), mask(3, 8, 5000, 0.3, device)
    total = int(keep.sum())
    kv_gather(tensors, keep, room=total, impl="triton")  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        made: Kept = kv_gather(tensors, keep, room=total, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(made.tensors, tuple(tensor[keep] for tensor in tensors))


AHEAD = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workbench_kernels.kv_gather import kernel

found = []
pointers = ("*i16", "*i16", "*i32", "*i32")  # keys, values, positions, scores
for capability in (80, 90):
    for rank, count in (("*i32", 4), ("*i64", 1)):
        types = {"sources": pointers[:count], "targets": pointers[:count]}
        types["strides"] = (("i32", "i32", "i32", "constexpr"),) * count  # a stride of 1 is a constant of the kernel
        types |= {"keep": "*u8", "rank": rank, "heads": "i32", "slots": "i32", "room": "i32"}
        types |= dict.fromkeys(("WIDTHS", "COLUMNS", "SLOTS"), "constexpr")
        widths = (128, 80, 1, 1)[:count]
        slots, warps = kernel.pick_config(widths)
        columns = tuple(triton.next_power_of_2(width) for width in widths)
        sizes = {"WIDTHS": widths, "COLUMNS": columns, "SLOTS": slots} | {(2, i, 3): 1 for i in range(count)}
        source = ASTSource(kernel.gather_slots, types, sizes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        found.append([capability, count, len(made.asm["cubin"])])
print(json.dumps(found))
"""


def test_kernels_compile_ahead_of_time(ahead_of_time: Any) -> None:
    assert [row[:2] for row in ahead_of_time(AHEAD)] == [[80, 4], [80, 1], [90, 4], [90, 1]]
