"""Packing: exact for every length, within half a step, and never across heads, rows, tokens or channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import rounded
from hypothesis import given
from hypothesis import strategies as st

from workbench.cache.packed import Format, pack_keys, pack_values, unpack_keys, unpack_values
from workbench.cache.packing import (
    BITS,
    dequantise,
    pack_planes,
    quantise,
    unpack_planes,
    words_of_channels,
)

every_width = pytest.mark.parametrize("bits", BITS)


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def there_and_back(x: torch.Tensor, bits: int) -> torch.Tensor:
    return dequantise(*quantise(x, bits), torch.float32)


# Laws


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_packing_is_exact_for_every_size(bits: int, units: int, group: int, width: int, seed: int) -> None:
    tokens = group * 8 // bits * 3
    made = torch.randint(2**bits, (units, tokens, width), generator=torch.Generator().manual_seed(seed))
    codes = made.to(torch.uint8)
    rows = pack_planes(codes, bits, group)
    assert rows.shape == (units, tokens * bits // 8, width) and rows.dtype == torch.uint8
    assert torch.equal(unpack_planes(rows, bits, group), codes)


@every_width
@pytest.mark.parametrize("offset", [0.0, 5.0, 300.0])
def test_the_error_is_at_most_half_a_step_and_the_rounding_of_what_is_stored(bits: int, offset: float) -> None:
    x = normal(500, 32, offset=offset)
    codes, step, base = quantise(x, bits)
    error = (dequantise(codes, step, base, torch.float32).double() - x.double()).abs()
    low, top = x.amin(-1, keepdim=True).double().abs(), (2**bits - 1) * step.double()
    bound = step.double() / 2 + 2**-11 * (low + top)  # float16 minimum and step: relative 2^-11 each
    assert bool((error <= bound * (1 + 1e-5)).all()), float((error / bound).max())


@every_width
def test_against_the_stored_step_the_error_is_half_a_step_where_nothing_is_clipped(bits: int) -> None:
    x = normal(500, 64, offset=5.0)
    codes, step, base = quantise(x, bits)
    inside = (codes > 0) & (codes < 2**bits - 1)
    error = (dequantise(codes, step, base, torch.float32) - x).abs() / step.float()
    assert float(error[inside].max()) < 0.5002  # codes from unrounded steps would give 0.662 at 8 bits


@every_width
def test_what_is_on_the_grid_is_exact_and_rounding_again_changes_nothing(bits: int) -> None:
    grid = torch.arange(2**bits).float().repeat(3, 1)[:, torch.randperm(2**bits)] * 0.5 - 4
    assert torch.equal(there_and_back(grid, bits), grid)
    once = there_and_back(normal(50, 32), bits)
    torch.testing.assert_close(there_and_back(once, bits), once, rtol=0, atol=2e-3)  # float16 base moves by 2^-11


@every_width
def test_more_bits_never_hurt(bits: int) -> None:
    x = normal(50, 32)
    errors = [float((there_and_back(x, b) - x).square().mean()) for b in BITS]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[1] > 100 * errors[2]


@every_width
def test_it_is_what_a_simple_quantiser_gives(bits: int) -> None:
    x = normal(200, 32, offset=1.0)
    np.testing.assert_allclose(there_and_back(x, bits).double().numpy(), rounded(x.numpy(), bits), rtol=0, atol=1e-6)


@every_width
def test_the_error_of_a_logit_is_bounded_by_the_query(bits: int) -> None:
    keys, query = normal(1, 64, 16), normal(16, seed=1)
    form = Format(bits, bits, 32)
    whole = keys[:, : form.unit] if form.unit <= 64 else normal(1, form.unit, 16)
    packed = pack_keys(whole, form)
    gap = ((unpack_keys(packed, form, torch.float32) - whole) @ query).abs()
    step = packed[1].float().repeat_interleave(32, 1)
    assert bool((gap <= (query.abs() * step / 2).sum(-1) * 1.05 + 1e-4).all())  # 5 %: float16 minima


@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize("value_bits", BITS)
def test_no_group_ever_crosses_tokens_channels_or_units(key_bits: int, value_bits: int) -> None:
    form = Format(key_bits, value_bits, 4)
    x = normal(3, form.unit, 8)
    keys = unpack_keys(pack_keys(x, form), form, torch.float32)
    values = unpack_values(pack_values(x, form), form, torch.float32)
    loud = x.clone()
    loud[1, 0, 0] = 100.0
    changed = (unpack_keys(pack_keys(loud, form), form, torch.float32) != keys).nonzero().tolist()
    assert all(unit == 1 and token < 4 and channel == 0 for unit, token, channel in changed) and changed
    changed = (unpack_values(pack_values(loud, form), form, torch.float32) != values).nonzero().tolist()
    assert all(unit == 1 and token == 0 and channel < 4 for unit, token, channel in changed) and changed


# Truths


def test_words_are_those_of_the_literature() -> None:
    def words(codes: list[int], bits: int) -> list[int]:
        return words_of_channels(torch.tensor(codes, dtype=torch.uint8), bits).tolist()

    assert words(list(range(16)), 4) == [0x76543210, -19088744]  # 0xFEDCBA98 as int32
    assert words([0, 1, 2, 3] * 4, 2) == [-454761244]  # 0xE4E4E4E4
    assert words([0, 1, 254, 255], 8) == [-130816]  # 0xFFFE0100


def test_a_byte_holds_tokens_one_group_apart() -> None:
    codes = torch.arange(8, dtype=torch.uint8).reshape(1, 8, 1)  # 4 bits, group 4: tokens w and w + 4 share a byte
    assert pack_planes(codes, 4, 4).flatten().tolist() == [0x40, 0x51, 0x62, 0x73]
    codes = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).reshape(1, 4, 1)
    assert pack_planes(codes, 2, 1).flatten().tolist() == [0b11100100]


@every_width
@pytest.mark.parametrize("value", [0.0, 3.0, -0.1])
def test_a_constant_group_has_codes_zero_and_keeps_its_minimum(bits: int, value: float) -> None:
    codes, step, base = quantise(torch.full((2, 32), value), bits)
    assert not codes.any() and not step.any() and torch.equal(base, torch.full((2, 1), value).half())
    assert torch.equal(there_and_back(torch.full((2, 32), value), bits), base.float().expand(2, 32))


@every_width
def test_a_range_below_float16_is_a_constant_group(bits: int) -> None:
    x = torch.tensor([[1.0, 1.0 + 1e-8, 1.0 - 6e-8, 1.0]])
    assert torch.isfinite(there_and_back(x, bits)).all()
    torch.testing.assert_close(there_and_back(x, bits), x, rtol=2**-10, atol=0)


def test_an_outlier_channel_spoils_others_only_where_groups_run_across_channels() -> None:
    x = normal(1, 256, 64)
    x[:, :, 5] *= 30
    others = [channel for channel in range(32) if channel != 5]  # of the same group of 32
    for bits, per_channel, per_token in ((2, 0.39, 1.88), (4, 0.078, 0.66)):  # kv_quantize, section 6
        form = Format(bits, bits, 32)
        errors = []
        for back in (
            unpack_keys(pack_keys(x, form), form, torch.float32),
            unpack_values(pack_values(x, form), form, torch.float32),
        ):
            gap = (back - x)[..., others]
            errors.append(float(gap.norm() / x[..., others].norm()))
        assert errors[1] > 3 * errors[0]
        assert errors == pytest.approx([per_channel, per_token], rel=0.1)  # another seed's noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_more_only(dtype: torch.dtype) -> None:
    form, x = Format(8, 8, 16), normal(2, 16, 16)
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        packed = pack(x.to(dtype), form)
        back = unpack(packed, form, dtype)
        assert back.dtype == dtype and torch.equal(back, unpack(packed, form, torch.float32).to(dtype))


def test_sixteen_bits_leave_a_tensor_alone() -> None:
    x = normal(2, 64, 8)
    form = Format(16, 4, 32)
    assert unpack_keys(pack_keys(x, form), form, torch.float32) is x
    assert form.unit == 64 and Format(16, 16, 32).unit == 32 and Format(2, 8, 32).unit == 128


def test_values_narrower_than_a_group_are_one_group() -> None:
    form, x = Format(4, 4, 32), normal(2, 64, 24)
    rows, step, _ = pack_values(x, form)
    assert step.shape == (2, 64, 1) and rows.shape == (2, 32, 24)
    torch.testing.assert_close(unpack_values((rows, step, _), form, torch.float32), x, rtol=0, atol=0.3)


# Bad input


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e6])
def test_what_would_poison_a_group_is_refused(value: float) -> None:
    x = normal(4, 8)
    x[2, 3] = value
    with pytest.raises(ValueError, match="NaN, infinity or a value beyond 65504"):
        quantise(x, 4)


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_other_bits_are_refused(bits: int) -> None:
    for call in (
        lambda: quantise(normal(1, 4), bits),
        lambda: pack_planes(torch.zeros(1, 8, 1, dtype=torch.uint8), bits, 1),
        lambda: unpack_planes(torch.zeros(1, 8, 1, dtype=torch.uint8), bits, 1),
        lambda: words_of_channels(torch.zeros(32, dtype=torch.uint8), bits),
    ):
        with pytest.raises(ValueError, match=f"got {bits} bits, expected one of"):
            call()


def test_lengths_that_do_not_fill_a_unit_are_refused() -> None:
    with pytest.raises(ValueError, match="got 6 tokens, expected a multiple of 2 planes x 4"):
        pack_planes(torch.zeros(1, 6, 1, dtype=torch.uint8), 4, 4)
    with pytest.raises(ValueError, match="got 3 codes, expected a multiple of 8"):
        words_of_channels(torch.zeros(3, dtype=torch.uint8), 4)
