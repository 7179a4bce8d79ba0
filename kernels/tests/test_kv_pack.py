"""Keys and values in few bits: the kernel's bytes are the reference's, whatever the strides, sizes and places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from workbench_kernels.kv_pack import Of, Pages, kv_pack, kv_unpack, new_pages, reference, refuse_bad

CASES = [(2, 16, 40), (4, 32, 64), (8, 5, 7)]  # bits, group, width: padded tiles, whole ones, odd ones
casts = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's


def numbers(units: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    drawn = torch.randn(units, tokens, width, generator=torch.Generator().manual_seed(seed))
    return (3 * drawn + 1).to(device, dtype)


def same(a: Pages, b: Pages) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize(("bits", "group", "width"), CASES)
def test_codes_steps_and_bases_are_the_references_bit_for_bit(
    of: Of, bits: int, group: int, width: int, device: torch.device
) -> None:
    for seed, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        x = numbers(2, 2 * group * 8 // bits, width, device, dtype, seed)
        made, theirs = kv_pack(x, bits, of, group=group, impl="triton"), reference.pack(x, bits, of, group)[0]
        assert same(made, theirs)
        for out in (torch.float32, torch.float16):
            back = kv_unpack(made, bits, of, group=group, dtype=out, impl="triton")
            assert torch.equal(back, reference.unpack(theirs, bits, of, group, out))


@pytest.mark.parametrize("of", ["keys", "values"])
def test_strides_of_the_input_change_nothing(of: Of, device: torch.device) -> None:
    x = numbers(3, 64, 24, device, torch.float32, 0)
    made = kv_pack(x, 4, of, impl="triton")
    wide = torch.full((24, 70, 6), torch.nan, device=device).permute(2, 1, 0)  # every stride another
    wide[::2, 3:67] = x
    assert same(kv_pack(wide[::2, 3:67], 4, of, impl="triton"), made)
    repeated = x[:1].expand(3, -1, -1)  # a stride of 0
    assert same(kv_pack(repeated, 4, of, impl="triton"), kv_pack(repeated.contiguous(), 4, of, impl="triton"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_golden_words_hold_the_planes(impl: str, device: torch.device) -> None:
    x = torch.tensor([[[0.0, 15.0, code] for code in (1, 2, 3, 4)]], device=device)  # step 1, base 0: codes as given
    rows, step, base = kv_pack(x, 4, "values", group=2, impl=impl)
    assert rows[0, :, 2].tolist() == [0x31, 0x42]
    assert step.tolist() == [[[1.0]] * 4] and base.tolist() == [[[0.0]] * 4]
    two = torch.tensor([[[0.0, 3.0, code] for code in (0, 0, 1, 1, 2, 2, 3, 3)]], device=device)
    assert kv_pack(two, 2, "values", group=2, impl=impl).rows[0, :, 2].tolist() == [0xE4, 0xE4]
    eight = torch.tensor([[[0.0], [1.0], [254.0], [255.0]]], device=device)
    assert kv_pack(eight, 8, "keys", group=4, impl=impl).rows.flatten().tolist() == [0, 1, 254, 255]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_halves_round_to_even_and_codes_are_clipped(impl: str, device: torch.device) -> None:
    ties = torch.tensor([[[0.0, 15.0, 0.5, 1.5, 2.5, 14.5, 13.5]]], device=device).expand(1, 4, 7)
    codes = reference.unplaned(kv_pack(ties, 4, "values", group=2, impl=impl).rows, 4, 2)[0, 0].tolist()
    assert codes == [0, 15, 0, 2, 2, 14, 14]
    far = torch.tensor(
        [[[1000.4], [1000.4 + 2e-4], [1000.4], [1000.4]]], device=device
    )  # the base is off by 1000 steps
    assert same(kv_pack(far, 8, "keys", group=4, impl=impl), reference.pack(far, 8, "keys", 4)[0])


@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_number_is_further_off_than_half_a_step(of: Of, bits: int, device: torch.device) -> None:
    x = numbers(1, 128, 32, device, torch.float32, bits)
    pages = kv_pack(x, bits, of, impl="triton")
    off = (kv_unpack(pages, bits, of, impl="triton") - x).abs()
    axis = 1 if of == "keys" else 2
    step, base = (part.float().repeat_interleave(32, axis) for part in pages[1:])
    bound = step / 2 + 2**-11 * (base.abs() + (2**bits - 1) * step)  # half a step, and step and base in float16
    assert bool((off <= bound + 1e-6).all()) and float(off.max()) > 0
    again = kv_pack(kv_unpack(pages, bits, of, impl="triton"), bits, of, impl="triton")
    assert torch.equal(again.base, pages.base)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_constant_groups_are_exact_and_numbers_on_the_grid_stay(impl: str, device: torch.device) -> None:
    x = torch.full((1, 64, 3), 2.5, device=device)
    x[:, :, 1] = 1e-9 * torch.arange(64, device=device)  # a range below float16's smallest number is no range
    x[:, :, 2] = torch.arange(64, device=device) % 16 * 0.25 - 1
    rows, step, _ = pages = kv_pack(x, 4, "keys", impl=impl)
    assert not rows[:, :, :2].any() and not step[:, :, :2].any()
    back = kv_unpack(pages, 4, "keys", impl=impl)
    assert torch.equal(back[:, :, 0], x[:, :, 0]) and torch.equal(back[:, :, 2], x[:, :, 2])
    assert float((back[:, :, 1] - x[:, :, 1]).abs().max()) < 1e-7
    coarse = torch.full((1, 64, 1), 40010.0, device=device)  # float16 has 40000 next: the base is 10 off, no code helps
    pages = kv_pack(coarse, 4, "keys", impl=impl)
    assert not pages.rows.any() and torch.equal(kv_unpack(pages, 4, "keys", impl=impl), coarse - 10)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("of", ["keys", "values"])
def test_units_are_written_where_they_belong_and_nowhere_else(impl: str, of: Of, device: torch.device) -> None:
    x = numbers(2, 64, 40, device, torch.float16, 1)
    pages = new_pages(5, 64, 40, 4, of, device=device)
    for tensor, poison in zip(pages, (0xFF, torch.nan, torch.nan), strict=True):
        tensor.fill_(poison)
    made = kv_pack(x, 4, of, out=pages, start=2, impl=impl)
    assert same(made, kv_pack(x, 4, of, impl="reference")) and made.rows.data_ptr() == pages.rows[2].data_ptr()
    for tensor in pages[1:]:
        assert tensor[:2].isnan().all() and tensor[4].isnan().all() and not tensor[2:4].isnan().any()
    assert bool((pages.rows[:2] == 0xFF).all()) and bool((pages.rows[4] == 0xFF).all())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_unit_of_every_head_goes_into_that_heads_own_buffer(impl: str, device: torch.device) -> None:
    x = numbers(2 * 3, 64, 40, device, torch.float16, 2)  # (row and head, token, width)
    room = new_pages(2 * 3 * 4, 64, 40, 4, "keys", device=device)
    heads = Pages(*(tensor.unflatten(0, (6, 4)) for tensor in room))  # (row and head, unit, ...)
    kv_pack(x, 4, "keys", out=Pages(*(tensor[:, 1] for tensor in heads)), impl=impl)
    assert same(Pages(*(tensor[:, 1] for tensor in heads)), kv_pack(x, 4, "keys", impl="reference"))
    assert torch.equal(
        kv_unpack(Pages(*(tensor[:, 1] for tensor in heads)), 4, "keys", impl=impl),
        kv_unpack(kv_pack(x, 4, "keys", impl="reference"), 4, "keys", impl="reference"),
    )


def test_one_unit_never_changes_another(device: torch.device) -> None:
    x = numbers(2, 32, 16, device, torch.float32, 3)
    other = x.clone()
    other[1] *= 7
    made, changed = (kv_pack(one, 8, "values", impl="triton") for one in (x, other))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(made, changed, strict=True))
    assert not torch.equal(made.step[1], changed.step[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_bytes_are_counted_to_the_byte(bits: int) -> None:
    rows, step, base = kv_pack(torch.zeros(3, 128, 64), bits, "keys")
    assert rows.nbytes == 3 * 128 * 64 * bits // 8 and step.nbytes == base.nbytes == 3 * 128 // 32 * 64 * 2


@casts
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, -70000.0, 3e7])
def test_what_would_poison_a_group_is_refused(impl: str, of: Of, wrong: float, device: torch.device) -> None:
    x = numbers(2, 32, 40, device, torch.float32, 4)
    x[1, 17, 33] = wrong
    with pytest.raises(ValueError, match=r"got NaN, infinity or a group beyond float16 \(65504\)"):
        kv_pack(x, 8, of, impl=impl)


@casts
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_one_flag_over_many_calls_is_checked_once_and_stays_set(impl: str, device: torch.device) -> None:
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    x = numbers(1, 32, 16, device, torch.float32, 5)
    kv_pack(x, 8, "keys", bad=bad, impl=impl)
    refuse_bad(bad)
    x[0, 3, 3] = torch.nan
    kv_pack(x, 8, "keys", bad=bad, impl=impl)
    kv_pack(x.nan_to_num(), 8, "keys", bad=bad, impl=impl)  # a good one does not clear it
    assert bad.tolist() == [1]
    with pytest.raises(ValueError, match="expected finite numbers"):
        refuse_bad(bad)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_unit_at_all_is_packed_and_unpacked(impl: str, device: torch.device) -> None:
    pages = kv_pack(torch.zeros(0, 64, 16, device=device), 4, "values", impl=impl)
    assert [tuple(part.shape) for part in pages] == [(0, 32, 16), (0, 64, 1), (0, 64, 1)]
    assert kv_unpack(pages, 4, "values", impl=impl).shape == (0, 64, 16)


def test_what_does_not_fit_is_refused_in_words() -> None:
    x = torch.zeros(2, 64, 16)
    with pytest.raises(ValueError, match=r"got 3 bits, expected one of 2, 4, 8"):
        kv_pack(x, 3, "keys")
    with pytest.raises(ValueError, match="got of='heads', expected one of keys, values"):
        kv_pack(x, 4, "heads")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got units of 64 tokens, expected a multiple of 4 planes x 32"):
        kv_pack(x, 2, "keys")
    with pytest.raises(ValueError, match=r"got \(64, 16\) torch.float32, expected \(unit, token, width\)"):
        kv_pack(x[0], 4, "keys")
    with pytest.raises(ValueError, match=r"torch.float64, expected .* float32, float16 or bfloat16"):
        kv_pack(x.double(), 4, "keys")
    with pytest.raises(ValueError, match="got start=1 without `out`"):
        kv_pack(x, 4, "keys", start=1)
    with pytest.raises(ValueError, match="got units 2 to 4 of pages with room for 3"):
        kv_pack(x, 4, "keys", out=new_pages(3, 64, 16, 4, "keys"), start=2)
    with pytest.raises(ValueError, match=r"expected \(units, 2, 16\) torch.float16. Make them with new_pages"):
        kv_pack(x, 4, "keys", out=new_pages(3, 64, 16, 4, "values"))
    turned = Pages(*(part.transpose(1, 2).contiguous().transpose(1, 2) for part in new_pages(2, 64, 16, 4, "keys")))
    with pytest.raises(ValueError, match="rows whose units are not contiguous"):
        kv_pack(x, 4, "keys", out=turned)
    with pytest.raises(ValueError, match=r"got bad \(\) torch.bool on cpu, expected int32 \(1,\)"):
        kv_pack(x, 4, "keys", bad=torch.tensor(False))
    with pytest.raises(ValueError, match=r"dtype torch.float64, expected .* and float32"):
        kv_unpack(kv_pack(x, 4, "keys"), 4, "keys", dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("of", ["keys", "values"])
def test_bfloat16_and_many_units_on_a_gpu_are_the_references(of: Of, device: torch.device) -> None:
    for bits in (2, 4, 8):
        x = numbers(700, 512 // bits, 128, device, torch.bfloat16, bits)
        made = kv_pack(x, bits, of, impl="triton")
        assert same(made, reference.pack(x, bits, of, 32)[0])
        assert same(Pages(*(part.cpu() for part in made)), reference.pack(x.cpu(), bits, of, 32)[0])
        back = kv_unpack(made, bits, of, dtype=torch.bfloat16, impl="triton")
        assert torch.equal(back, reference.unpack(made, bits, of, 32, torch.bfloat16))


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu_where_the_flag_is_the_callers(device: torch.device) -> None:
    x, bad = numbers(4, 64, 128, device, torch.float16, 0), torch.zeros(1, dtype=torch.int32, device=device)
    pages = kv_pack(x, 4, "keys", bad=bad, impl="triton")  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        kv_pack(x, 4, "keys", out=pages, bad=bad, impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    refuse_bad(bad)


AHEAD = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workbench_kernels.kv_pack import kernel

whole = ("tokens", "width", "x_unit", "x_token", "x_width", "rows_unit", "step_unit", "base_unit")
found = []
for capability in (80, 90):
    for bits, of, dtype in ((2, "keys", "fp16"), (4, "values", "bf16"), (8, "keys", "fp32"), (2, "values", "fp32")):
        span, columns, rows, warps = kernel.pick_config(of, 128, 32)
        sizes = dict(BITS=bits, GROUP=32, SPAN=span, KEYS=of == "keys", G=rows, W=columns)
        pages = {"rows": "*u8", "step": "*fp16", "base": "*fp16"}
        for fn, pointers in (
            (kernel.pack_block, {"x": "*" + dtype, **pages, "bad": "*i32"}),
            (kernel.unpack_block, {"out": "*" + dtype, **pages}),
        ):
            for fixed in ({}, {"x_width": 1})[: 1 + (bits == 4)]:  # a stride of 1 is a constant of the kernel
                types = {name: pointers.get(name, "i32" if name in whole else "constexpr") for name in fn.arg_names}
                fixed = {name: one for name, one in fixed.items() if name in types} | sizes
                types |= dict.fromkeys(fixed, "constexpr")
                made = triton.compile(
                    ASTSource(fn, types, fixed), target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
                )
                ptx = made.asm["ptx"]
                found.append([fn.__name__, capability, ptx.count("div.rn.f32"), ptx.count("div.full")])
print(json.dumps(found))
"""


def test_kernels_compile_ahead_of_time_with_exact_division(ahead_of_time: Any) -> None:
    found = ahead_of_time(AHEAD)
    assert {tuple(row[:2]) for row in found} == {(f"{way}_block", v) for way in ("pack", "unpack") for v in (80, 90)}
    assert all(exact > 0 for name, _, exact, _ in found if name == "pack_block")
    assert not any(approximate for *_, approximate in found)  # what `/` becomes: off by 2 in the last place
