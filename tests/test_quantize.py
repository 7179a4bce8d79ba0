"""QuantizeKV: a state that is a function of the tokens alone, bytes by the formula, and no token packed twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from by_hand import Hand, held, packed, rounded_keys, rounded_values
from families import subject_of, texts

from workbench.cache import cache_bytes, packing
from workbench.cache.packed import Format
from workbench.toggles import Steer
from workbench.toggles.evict import EvictKV
from workbench.toggles.quantize import QuantizeKV

SMALL = QuantizeKV(4, 4, group=4, residual=8, sinks=2)  # units of 8 tokens
KIVI = QuantizeKV(2, 2)  # units of 128 tokens


def tokens(seq: int, *, batch: int = 1, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seq)
    return torch.randn(2, batch, heads, seq, width, generator=generator).to(dtype)


def parts(seen: int, sinks: int, residual: int, unit: int) -> tuple[int, int, int]:
    """(sinks, packed, residual) of that many tokens: the rule, as the specification writes it."""
    first = min(sinks, seen)
    inside = unit * (max(0, seen - sinks - residual) // unit)
    return first, inside, seen - first - inside


# Laws


@pytest.mark.parametrize("seen", [1, 3, 7, 8, 9, 10, 16, 17, 18, 19, 26, 34, 50])  # around R, 2R and full units
@pytest.mark.parametrize("step", [1, 3])
def test_read_one_by_one_or_at_once_the_state_is_the_same(seen: int, step: int) -> None:
    keys, values = tokens(seen, batch=2)
    once, slowly = Hand(SMALL), Hand(SMALL)
    once.feed(keys, values)
    for k, v in zip(keys.split(step, 2), values.split(step, 2), strict=True):
        slowly.feed(k, v)
    assert packed(once.layer) == packed(slowly.layer) and held(once.layer) == held(slowly.layer)
    for a, b in zip(once.layer.slots().tensors, slowly.layer.slots().tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seen", [3, 100, 132, 259, 260, 300, 388])
def test_the_parts_follow_the_rule(seen: int) -> None:
    expected = {3: (3, 0, 0), 100: (4, 0, 96), 132: (4, 0, 128), 259: (4, 0, 255)}
    expected |= {260: (4, 128, 128), 300: (4, 128, 168), 388: (4, 256, 128)}
    first, inside, rest = parts(seen, 4, 128, 128)
    assert (first, inside, rest) == expected[seen]
    hand = Hand(KIVI)
    hand.feed(*tokens(seen))
    assert packed(hand.layer) == [[list(range(first, first + inside))] * 2]
    assert held(hand.layer) == [[list(range(seen))] * 2]


@pytest.mark.parametrize("form", [Format(2, 2, 4), Format(4, 8, 4), Format(16, 2, 4), Format(8, 16, 4)], ids=str)
def test_what_is_read_back_is_what_a_simple_quantiser_gives(form: Format) -> None:
    toggle = QuantizeKV(form.key_bits, form.value_bits, group=form.group, residual=3, sinks=1)
    hand, (keys, values) = Hand(toggle), tokens(77, batch=2)
    hand.feed(keys, values)
    inside = packed(hand.layer)[0][0]
    back = hand.layer.slots()
    order = back.positions[0, 0].argsort()
    for row in range(2):
        for head in range(2):
            for got, given, rule in zip(back.tensors, (keys, values), (rounded_keys, rounded_values), strict=True):
                expected = given[row, head].double().numpy().copy()
                expected[inside] = rule(expected[inside], form)
                np.testing.assert_allclose(got[row, head][order].double().numpy(), expected, rtol=0, atol=2e-6)


def test_each_token_is_packed_once_and_the_prompt_attends_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = packing.quantise

    def spy(x: torch.Tensor, bits: int) -> Any:
        seen.append(x.flatten())
        return original(x, bits)

    monkeypatch.setattr("workbench.cache.packed.quantise", spy)
    hand, (keys, values) = Hand(QuantizeKV(4, 4, group=2, residual=4, sinks=1)), tokens(90)
    exact = Hand().feed(keys[:, :, :40], values[:, :, :40])
    assert torch.equal(hand.feed(keys[:, :, :40], values[:, :, :40]), exact)
    for at in range(40, 90):
        hand.feed(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    numbers = torch.cat(seen)
    assert len(numbers.unique()) == len(numbers) == 2 * 2 * 8 * len(packed(hand.layer)[0][0])


def test_no_head_or_row_leaks_into_another() -> None:
    keys, values = tokens(60, batch=2)
    quiet, loud = Hand(SMALL), Hand(SMALL)
    quiet.feed(keys, values)
    for tensor in (keys, values):
        tensor[1], tensor[0, 1] = tensor[1] * 50, tensor[0, 1] * 50
    loud.feed(keys, values)
    for a, b in zip(quiet.layer.slots().tensors, loud.layer.slots().tensors, strict=True):
        assert torch.equal(a[0, 0], b[0, 0]) and not torch.equal(a[0, 1], b[0, 1])


def test_a_padded_row_is_packed_as_it_would_be_alone() -> None:
    keys, values = tokens(60, batch=2)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[1, :23] = False
    together, alone = Hand(SMALL), Hand(SMALL)
    together.feed(keys, values, real=real)
    alone.feed(keys[1:, :, 23:], values[1:, :, 23:])
    assert packed(together.layer)[1] == packed(alone.layer)[0] and held(together.layer)[1] == held(alone.layer)[0]
    a, b = together.layer.slots(), alone.layer.slots()
    for ours, theirs in zip(a.tensors, b.tensors, strict=True):
        order = [[at.tolist().index(p) for p in range(37)] for at in (a.positions[1, 0], b.positions[0, 0])]
        assert torch.equal(ours[1][:, order[0]], theirs[0][:, order[1]])


def test_more_bits_never_raise_the_error_of_the_attention() -> None:
    keys, values = tokens(80)
    query = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(1))
    errors = []
    for bits in (2, 4, 8, 16):
        hand = Hand(*([QuantizeKV(bits, bits, group=4, residual=0, sinks=0)] if bits < 16 else []))
        hand.feed(keys[:, :, :79], values[:, :, :79])
        out = hand.feed(keys[:, :, 79:], values[:, :, 79:], query)
        errors.append(out)
    gaps = [float((out - errors[-1]).norm() / errors[-1].norm()) for out in errors]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 3 * gaps[1] > 9 * gaps[2] and gaps[3] == 0


def test_what_eviction_keeps_does_not_depend_on_packing_and_only_survivors_are_packed() -> None:
    keys, values = tokens(120)
    evict = EvictKV(0.5, "snapkv", "adaptive", sinks=2, window=4, every=None)
    alone, both = Hand(evict), Hand(evict, SMALL)
    for hand in (alone, both):
        hand.feed(keys, values)
    assert held(alone.layer) == held(both.layer)
    back = both.layer.slots()
    for head in range(2):
        survivors, inside = held(alone.layer)[0][head], packed(both.layer)[0][head]
        count = parts(len(survivors), 2, 8, 8)[1]
        assert inside == survivors[2 : 2 + count]
        where = [back.positions[0, head].tolist().index(p) for p in inside]
        expected = rounded_keys(keys[0, head][inside].double().numpy(), Format(4, 4, 4))
        np.testing.assert_allclose(back.tensors[0][0, head][where].double().numpy(), expected, rtol=0, atol=2e-6)


def test_a_budget_counts_packed_tokens_too() -> None:
    hand = Hand(EvictKV(0.5, "tova", sinks=2, window=4, every=4), QuantizeKV(4, 4, group=2, residual=8, sinks=2))
    keys, values = tokens(200)
    hand.feed(keys[:, :, :80], values[:, :, :80])
    for at in range(80, 200):
        hand.feed(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        assert all(len(positions) <= (at + 1) / 2 + 5 for positions in held(hand.layer)[0])
    assert len(packed(hand.layer)[0][0]) > 40


# Truths


@pytest.mark.parametrize(
    ("seen", "codes", "meta", "rest"), [(300, 4096, 2048, 86016), (388, 8192, 4096, 65536)], ids=["300", "388"]
)
def test_bytes_follow_the_formula_to_the_byte(seen: int, codes: int, meta: int, rest: int) -> None:
    hand = Hand(KIVI)
    hand.feed(*tokens(seen, width=64, dtype=torch.float16))
    sizes = {row["part"]: row["bytes"] for row in hand.rows()}
    assert sizes["codes_k"] == sizes["codes_v"] == codes
    assert sizes["scale"] == sizes["zero"] == meta  # of keys and values together
    assert sizes["sinks"] == 2048 and sizes["keys"] + sizes["values"] == rest
    named = 2 * codes + 2 * meta + 2048 + rest
    assert named == {300: 100352, 388: 92160}[seen]
    bookkeeping = 4 * 2 * seen + 4 * 2 * 3 + 8  # a position per token and head, counts of three parts, one of the row
    assert sizes["index"] == bookkeeping and sizes["state"] == 2 * 8  # sinks taken, per head
    assert cache_bytes(hand) == named + bookkeeping + 16 and "idle" not in sizes


@pytest.mark.parametrize(("bits", "nominal", "real"), [(2, 2, 3), (4, 4, 5), (8, 8, 9)])
def test_bits_per_number_are_as_asked_and_with_steps_and_minima_as_tabulated(
    bits: int, nominal: int, real: int
) -> None:
    hand = Hand(QuantizeKV(bits, bits, group=32, residual=0, sinks=0))
    hand.feed(*tokens(512, width=64))
    rows = {row["part"]: row for row in hand.rows()}
    numbers = rows["codes_k"]["numbers"] + rows["codes_v"]["numbers"]
    assert numbers == 2 * 2 * 512 * 64
    assert 8 * (rows["codes_k"]["bytes"] + rows["codes_v"]["bytes"]) == nominal * numbers
    stored = sum(rows[part]["bytes"] for part in ("codes_k", "codes_v", "scale", "zero"))
    assert 8 * stored == real * numbers  # bits + (16 + 16) / 32


def test_each_layer_may_have_bits_of_its_own() -> None:
    subject = subject_of("llama")
    ids = torch.tensor([subject.tokenize(texts()).ids[0] * 6])
    toggle = QuantizeKV((2, 16, 16), (16, 16, 4), group=2, residual=1, sinks=0)
    with subject.under(toggle), torch.no_grad():
        cache = subject.model(input_ids=ids, use_cache=True).past_key_values
        from workbench.cache import accounts

        found = [{row["part"] for row in accounts(cache) if row["layer"] == layer} for layer in range(3)]
    assert "codes_k" in found[0] and "codes_v" not in found[0]
    assert not {"codes_k", "codes_v"} & found[1]
    assert "codes_v" in found[2] and "codes_k" not in found[2]


def test_the_receipt_tells_tokens_and_bytes() -> None:
    hand = Hand(KIVI)
    hand.feed(*tokens(300, width=64))
    receipt = hand.stages.receipts["store"]
    assert (receipt.fired, receipt.tokens) == (1, 128)
    plain = Hand()
    plain.feed(*tokens(300, width=64))
    bookkeeping = (
        8 + 2 * 8
    )  # a count of the emptied buffer and the sinks taken per head stay, in no part that holds tokens
    assert receipt.bytes_freed == cache_bytes(plain) - cache_bytes(hand) + bookkeeping


def test_sixteen_bits_install_nothing() -> None:
    subject = subject_of("llama")
    with pytest.warns(UserWarning, match="never fired"), subject.under(QuantizeKV(16, 16)):
        assert not subject.stages


def test_a_few_parts_hold_many_units() -> None:
    hand, one = Hand(QuantizeKV(8, 8, group=2, residual=0, sinks=0)), torch.randn(1, 2, 1, 4)
    for _ in range(300):
        hand.feed(one, one)
    assert len(hand.layer.packed) <= 9 and len(packed(hand.layer)[0][0]) == 300  # log2 of 150 units


# Together with edits


@pytest.mark.parametrize("rule", ["all", "prompt", "generated", "last", [0, 3]], ids=str)
def test_an_edit_under_a_cache_toggle_keeps_its_positions(rule: Any) -> None:
    subject = subject_of("llama")
    push = Steer.examples(subject)[0]
    steer = Steer(push.direction, push.at, push.strength, positions=rule)
    toggle = QuantizeKV(8, 8, group=2, residual=2, sinks=1)
    with subject.under(steer | toggle):
        batched = subject.generate(texts(), max_new_tokens=4)
        fired = subject.receipts[0].tokens
        assert [subject.generate([text], max_new_tokens=4).ids[0] for text in texts()] == list(batched.ids)
        assert subject.receipts[0].tokens == 2 * fired
    with subject.under(steer):
        subject.generate(texts(), max_new_tokens=4)
        assert subject.receipts[0].tokens == fired


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"key_bits": 3}, "got key_bits=3, expected 2, 4, 8 or 16"),
        ({"value_bits": (4, 5)}, r"got value_bits=\(4, 5\), expected 2, 4, 8 or 16"),
        ({"key_bits": ()}, "got key_bits"),
        ({"group": 0}, "got group=0, expected at least 1"),
        ({"residual": -1}, "got residual=-1, expected at least 0"),
        ({"sinks": -1}, "got sinks=-1, expected at least 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"QuantizeKV: {words}"):
        QuantizeKV(**settings)


def test_a_plan_for_another_depth_is_refused() -> None:
    subject = subject_of("llama")
    with (
        pytest.raises(ValueError, match="got 2 key_bits, expected one per layer, 3"),
        subject.under(QuantizeKV((4, 2))),
    ):
        pass
    assert not subject.stages


def test_a_broken_model_is_refused_in_words() -> None:
    hand, (keys, values) = Hand(SMALL), tokens(40)
    keys[0, 1, 5, 3] = torch.nan
    with pytest.raises(ValueError, match="got NaN, infinity"):
        hand.feed(keys, values)
