"""Cache layers: equal to plain attention over what they hold, really smaller, refused in words where they can't go."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from by_hand import Hand, held, largest_gap, spied
from families import subject_of
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import Subject
from workbench.cache import accounts, cache_bytes
from workbench.cache.attention import attend, attend_in_blocks
from workbench.cache.held import held_bytes
from workbench.cache.layer import KVLayer
from workbench.cache.segments import Frozen, Recent, Slots, reordered
from workbench.toggle import Toggle
from workbench.toggles import Steer
from workbench.toggles.evict import EvictKV
from workbench.toggles.quantize import QuantizeKV

EVICT = EvictKV(0.5, "h2o", "adaptive", sinks=1, window=2, every=3)
PACK = QuantizeKV(4, 2, group=3, residual=3, sinks=1)  # units of 12 tokens; a group of two would be exact
TOGGLES = (
    EvictKV(0.4, "snapkv", "pyramid", sinks=1, window=2, every=2),
    EVICT,
    EvictKV(6, "random", sinks=0, window=1, every=None),
    PACK,
    QuantizeKV(8, 4, group=4, residual=0, sinks=0),
    EvictKV(0.7, "tova", "adaptive", sinks=1, window=2, every=4) | PACK,
)
FP32 = 3e-6  # float32 against float64, measured 5e-7; a key of the wrong token is wrong by 0.1 and more


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(8, 1000, (length,), generator=generator).tolist() for length in lengths]


def read_on(subject: Subject, ids: torch.Tensor, pieces: list[int], **options: Any) -> Any:
    """Bare forwards of these many tokens each, with one cache; the last output."""
    output: Any = None
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            past = None if output is None else output.past_key_values
            output = subject.model(input_ids=piece, past_key_values=past, use_cache=True, **options)
    return output


# Laws


@pytest.mark.parametrize("toggle", TOGGLES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_padded_generation_equals_softmax_over_the_history_masked_to_what_is_held(
    family: str, toggle: Toggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(family)
    with subject.under(toggle), spied(monkeypatch) as calls:
        subject.generate(prompts(21, 4, 33), max_new_tokens=9)
    layers = {id(call.layer) for call in calls}
    assert len(layers) == (1 if family == "gemma2" else 3)  # gemma2: every other layer slides
    longest = max(len(positions) for call in calls[-len(layers) :] for row in call.held for positions in row)
    assert longest == 40 if isinstance(toggle, QuantizeKV) else longest < 40
    assert largest_gap(calls) < FP32


@pytest.mark.parametrize("toggle", TOGGLES, ids=str)
def test_several_tokens_at_a_time_after_eviction_equal_softmax_too(
    toggle: Toggle, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of("qwen2")
    ids = torch.tensor(prompts(40, 40))
    with subject.under(toggle), spied(monkeypatch) as calls:
        read_on(subject, ids, [20, 4, 1, 1, 7, 1, 6])
    assert largest_gap(calls) < FP32


def test_the_reference_notices_a_token_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("llama")
    with subject.under(EVICT), spied(monkeypatch) as calls:
        subject.generate(prompts(21), max_new_tokens=3)
    calls[-1].held[0][0].pop(1)
    assert largest_gap(calls) > 1e-3


@pytest.mark.parametrize("toggle", TOGGLES, ids=str)
def test_held_positions_rise_and_none_comes_back(toggle: Toggle, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of("llama")
    with subject.under(toggle), spied(monkeypatch) as calls:
        subject.generate(prompts(21, 7), max_new_tokens=9)
    gone: dict[Any, set[int]] = {}
    for call in calls:
        for row, heads in enumerate(call.held):
            for head, positions in enumerate(heads):
                key = id(call.layer), row, head
                assert positions == sorted(set(positions)) and not gone.get(key, set()) & set(positions)
                newest = int(call.positions[row, -1])
                gone[key] = set(range(newest)) - set(positions)


def test_lengths_are_logical_whatever_was_dropped() -> None:
    subject = subject_of("llama")
    with subject.under(EVICT):
        cache = read_on(subject, torch.tensor(prompts(20)), [18, 1, 1]).past_key_values
        assert cache.get_seq_length() == 20 and cache.layers[0].get_mask_sizes(3) == (23, 0)
        assert cache.layers[0].get_max_length() == -1
        assert max(map(len, held(cache.layers[0])[0])) < 20


def test_toggles_that_compose_commute() -> None:
    subject, evict = subject_of("llama"), EvictKV(0.6, "snapkv", "adaptive", sinks=1, window=2, every=3)
    found = []
    for toggle in (evict | PACK, PACK | evict):
        with subject.under(toggle):
            output = read_on(subject, torch.tensor(prompts(30, 30)), [25, 1, 1, 1, 1, 1])
            found.append((output.logits, accounts(output.past_key_values)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("pair", [EVICT | EvictKV(0.3), PACK | QuantizeKV(2, 2)], ids=["evict", "quantize"])
def test_two_toggles_for_one_stage_are_refused(pair: Toggle) -> None:
    subject = subject_of("llama")
    with pytest.raises(ValueError, match=r"both claim 'kv\."), subject.under(pair):
        pass
    assert not subject.stages and subject.active == ()


def test_an_exception_inside_puts_everything_back() -> None:
    subject = subject_of("llama")
    config, trunk = subject.model.config, subject.model.get_submodule(subject.anatomy.trunk)
    before = config._attn_implementation, len(trunk._forward_pre_hooks), len(trunk._forward_hooks)
    for toggle in (EVICT, PACK, EVICT | PACK):
        with pytest.raises(RuntimeError, match="stop"), subject.under(toggle):
            assert config._attn_implementation != before[0]
            read_on(subject, torch.tensor(prompts(9)), [9])
            raise RuntimeError("stop")
        assert (config._attn_implementation, len(trunk._forward_pre_hooks), len(trunk._forward_hooks)) == before
        assert not subject.stages and subject.stages.select is subject.stages.store is None


def test_leaving_the_inner_of_two_toggles_leaves_the_outer_one_acting() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(40))
    with subject.under(EVICT):
        alone = read_on(subject, ids, [39, 1]).logits
        with subject.under(PACK):
            assert not torch.equal(read_on(subject, ids, [39, 1]).logits, alone)
        assert torch.equal(read_on(subject, ids, [39, 1]).logits, alone)


# Memory


def test_evicted_storage_is_gone() -> None:
    made = torch.randn(1, 2, 64, 8)
    whole, hand = Hand(), Hand(EvictKV(8, "key_norm", sinks=0, window=1))
    whole.feed(made, made.clone())
    grown: list[Any] = []
    append = hand.layer.recent.append

    def watched(*args: Any) -> None:
        append(*args)
        grown.extend(weakref.ref(buffer) for buffer in hand.layer.recent.buffers)

    hand.layer.recent.append = watched  # type: ignore[method-assign]
    hand.feed(made, made.clone())
    del watched, append
    assert grown and all(buffer() is None for buffer in grown), "something still holds the whole buffer"
    assert cache_bytes(whole) == 2 * 64 * 2 * 8 * 4 + 64 * 4 + 8  # positions int32, one count of 8 bytes
    assert cache_bytes(hand) == 2 * 8 * 2 * 8 * 4 + 2 * 8 * 4 + 2 * 4 + 8  # positions and counts per head, one count


def test_a_view_does_not_pass_for_memory_given_back() -> None:
    wide = torch.randn(100, 8)
    view = Frozen((wide[:10], wide[10:20]), torch.arange(10), torch.tensor([[10]]))
    own = Frozen((wide[:10].clone(), wide[10:20].clone()), torch.arange(10), torch.tensor([[10]]))
    rest = 10 * 8 + 4  # positions as they were given, one count
    assert held_bytes(view) == 100 * 8 * 4 + rest and held_bytes(own) == 20 * 8 * 4 + rest


@pytest.mark.parametrize("toggle", TOGGLES, ids=str)
def test_every_held_tensor_owns_its_storage_and_accounts_sum_to_the_byte(toggle: Toggle) -> None:
    subject = subject_of("gemma2")
    with subject.under(toggle):
        for pieces in ([1], [41], [40, 1], [20, *[1] * 20]):
            cache = read_on(subject, torch.tensor(prompts(41, 41))[:, : sum(pieces)], pieces).past_key_values
            rows = accounts(cache)
            assert sum(row["bytes"] for row in rows) == cache_bytes(cache)
            for layer in cache.layers:
                parts = [*layer.packed, *([layer.kept] if layer.kept else [])] if isinstance(layer, KVLayer) else []
                for part in parts:
                    tensors = [t for t in vars(part).values() if isinstance(t, torch.Tensor)]
                    tensors += [t for ts in vars(part).values() if isinstance(ts, tuple) for t in ts]
                    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_what_the_stages_hold_is_no_part_of_a_cache() -> None:
    hand = Hand(PACK)
    hand.feed(*torch.randn(2, 1, 2, 5, 4))
    before = cache_bytes(hand)
    hand.stages.receipts["store"].sums["moved"] = torch.zeros(1000)
    assert cache_bytes(hand) == before


def test_a_plain_cache_is_accounted_too() -> None:
    subject = subject_of("llama")
    cache = read_on(subject, torch.tensor(prompts(12)), [12]).past_key_values
    size = 2 * 8 * 12 * 4  # two heads of 8, float32
    assert accounts(cache) == [
        {"layer": layer, "part": part, "bytes": size, "numbers": size // 4}
        for layer in range(3)
        for part in ("keys", "values")
    ]


def test_room_for_tokens_to_come_is_called_idle_and_is_at_most_an_eighth() -> None:
    hand = Hand()
    for _ in range(200):
        hand.feed(*torch.randn(2, 1, 2, 1, 4))
    sizes = {row["part"]: row["bytes"] for row in hand.rows()}
    assert sizes["keys"] == sizes["values"] == 200 * 2 * 4 * 4
    assert 0 < sizes["idle"] <= (sizes["keys"] * 2 + 200 * 4) / 8 + 100  # one token and one count of rounding


def test_appends_copy_each_token_a_bounded_number_of_times() -> None:
    copied = []
    for length in (500, 4000):
        recent, moved = Recent(), 0
        one = torch.zeros(1, 1, 1, 2)
        for at in range(length):
            before = recent.positions.shape[-1]
            recent.append((one, one), torch.tensor([[at]]), torch.ones(1, 1, dtype=torch.bool))
            moved += at if recent.positions.shape[-1] != before else 0
        copied.append(moved / length)
    assert copied[1] < 1.2 * copied[0] < 12, copied  # 1 / (1.125 - 1) = 8 copies per token, whatever the length


# What transformers may ask


@pytest.mark.parametrize("toggle", [EvictKV(0.5, "tova", sinks=1, window=2, every=2), PACK], ids=str)
def test_beam_search_scores_are_those_of_its_own_text_read_alone(toggle: Toggle) -> None:
    subject = subject_of("llama")
    ids = torch.tensor(prompts(18))
    with subject.under(toggle), torch.no_grad():
        made = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            max_new_tokens=7,
            min_new_tokens=7,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for text, score in zip(made.sequences, made.sequences_scores, strict=True):
            new, total = text[18:].tolist(), 0.0
            output = read_on(subject, ids, [18])
            for token in new:
                total += float(output.logits[0, -1].double().log_softmax(-1)[token])
                output = subject.model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values)
            assert total == pytest.approx(float(score), abs=1e-4)  # fp32 sums of seven tokens


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_rows_may_be_reordered_repeated_and_dropped(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    real = torch.arange(20) >= torch.tensor([[0], [7], [13]])
    hand = Hand(EvictKV(0.8, "key_norm", "adaptive", sinks=1, window=1), QuantizeKV(4, 4, group=2, residual=1, sinks=1))
    hand.feed(*torch.randn(2, 3, 2, 20, 4), real=real)
    hand.feed(*torch.randn(2, 3, 2, 1, 4))
    before, slots = held(hand.layer), hand.layer.slots()
    hand.layer.reorder_cache(torch.tensor(order))
    assert held(hand.layer) == [before[row] for row in order]
    after = hand.layer.slots()
    for new, old in enumerate(order):
        for head in range(2):
            for a, b in zip(after.tensors, slots.tensors, strict=True):
                kept, was = after.positions[new, head] >= 0, slots.positions[old, head] >= 0
                assert torch.equal(a[new, head][kept], b[old, head][was])
    hand.counts = None if hand.counts is None else hand.counts[order]
    assert torch.isfinite(hand.feed(*torch.randn(2, len(order), 2, 1, 4))).all()


def test_rows_may_be_repeated_each() -> None:
    hand = Hand(PACK)
    hand.feed(*torch.randn(2, 2, 2, 20, 4))
    before = held(hand.layer)
    hand.layer.batch_repeat_interleave(2)
    assert held(hand.layer) == [before[0], before[0], before[1], before[1]]


def test_a_reset_layer_is_empty_and_usable() -> None:
    hand = Hand(PACK)
    made = torch.randn(2, 1, 2, 20, 4)
    first = hand.feed(*made)
    hand.layer.reset()
    hand.counts = None
    assert hand.layer.get_seq_length() == 0 and not hand.layer.parts
    assert torch.equal(hand.feed(*made), first)


@pytest.mark.parametrize(("ask", "words"), [("crop", "can't take back tokens"), ("offload", "offloading is not supp")])
def test_what_can_not_be_is_refused_in_words(ask: str, words: str) -> None:
    subject = subject_of("llama")
    with subject.under(EVICT):
        cache = read_on(subject, torch.tensor(prompts(9)), [9]).past_key_values
        with pytest.raises(ValueError, match=words):
            cache.crop(-1) if ask == "crop" else cache.offload(0)
        assert not cache.is_croppable and not cache.is_compileable


@pytest.mark.filterwarnings("ignore:.*never fired")
def test_a_cache_goes_on_only_where_it_was_made() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(12))
    plain = read_on(subject, ids, [12]).past_key_values
    one = torch.tensor([[9]])
    with subject.under(EVICT):
        ours = read_on(subject, ids, [12]).past_key_values
        with pytest.raises(ValueError, match="cache made under unknown conditions"):
            subject.model(input_ids=one, past_key_values=plain)
        with subject.untoggled(), pytest.raises(ValueError, match="which acts no more"):
            subject.model(input_ids=one, past_key_values=ours)
    with pytest.raises(ValueError, match=r"was made under .*, which acts no more"):
        subject.model(input_ids=one, past_key_values=ours)
    with subject.under(PACK), pytest.raises(ValueError, match="cache made under EvictKV"):
        subject.model(input_ids=one, past_key_values=ours)
    with (
        subject.under(PACK, adopt_cache=True),
        pytest.raises(ValueError, match="other key/value toggles than QuantizeKV"),
    ):
        subject.model(input_ids=one, past_key_values=ours)
    with (
        subject.under(EVICT, adopt_cache=True),
        pytest.raises(ValueError, match="filled without EvictKV"),
    ):
        subject.model(input_ids=one, past_key_values=plain)


def test_an_adopted_cache_goes_on_under_an_edit_on_top() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(12))
    push = Steer.examples(subject)[0]
    with subject.under(EVICT):
        ours = read_on(subject, ids, [12]).past_key_values
        with subject.under(push, adopt_cache=True), torch.no_grad():
            subject.model(input_ids=torch.tensor([[9]]), past_key_values=ours)
        assert ours.get_seq_length() == 13


def test_half_precision_models_read_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject.tiny("llama")
    subject.model.bfloat16()
    with subject.under(EVICT | PACK), spied(monkeypatch) as calls:
        subject.generate(prompts(21, 4), max_new_tokens=5)
        subject.generate(prompts(21), max_new_tokens=9)
    assert largest_gap(calls) < 0.03  # bfloat16 outputs of order one, measured 0.0085


# Segments


@given(st.lists(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4), max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_growing_buffer_holds_the_real_tokens_of_each_row_in_order(forwards: list[list[list[bool]]]) -> None:
    recent, expected, number = Recent(), [[], [], []], 0
    for columns in forwards:
        real = torch.tensor(columns).T  # (3 rows, seq)
        new = torch.arange(number, number + real.numel()).reshape(real.shape).float()
        number += real.numel()
        for row in range(3):
            expected[row] += new[row][real[row]].tolist()
        before = torch.tensor([len(row) for row in expected]) - real.sum(1)
        recent.append((new[:, None, :, None],), before[:, None] + real.cumsum(1) - 1, real)
    if forwards:
        slots = recent.slots()
        assert slots.full == (len({len(row) for row in expected}) == 1)
        for row in range(3):
            count = len(expected[row])
            assert slots.tensors[0][row, 0, :count, 0].tolist() == expected[row]
            assert slots.positions[row, 0].tolist() == [*range(count), *[-1] * (len(recent) - count)]


def ragged(seed: int = 0) -> tuple[Slots, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slots = Slots(
        tuple(torch.randn(2, 2, 2, 12, 4, generator=generator)), torch.arange(12).expand(2, 1, 12).contiguous(), True
    )
    return slots, torch.rand(2, 2, 12, generator=generator) > 0.4


def test_ragged_segments_hold_nothing_but_what_was_chosen() -> None:
    slots, keep = ragged()
    frozen, kept = Frozen.chosen(slots, keep), int(keep.sum())
    assert held_bytes(frozen) == kept * 4 * 4 * 2 + kept * 4 + 4 * 4  # keys and values, positions, counts per segment
    read = frozen.slots()
    for row in range(2):
        for head in range(2):
            count = int(keep[row, head].sum())
            assert torch.equal(read.tensors[1][row, head, :count], slots.tensors[1][row, head][keep[row, head]])
            assert read.positions[row, head].tolist() == [
                *keep[row, head].nonzero()[:, 0].tolist(),
                *[-1] * (frozen.longest - count),
            ]


def test_attention_over_ragged_segments_is_the_dense_one_masked() -> None:
    slots, keep = ragged(1)
    query, at = torch.randn(2, 4, 1, 4), torch.full((2, 1), 20)
    ours = attend(query, Frozen.chosen(slots, keep).slots(), at, scaling=None)
    keys, values = (t.repeat_interleave(2, 1) for t in slots.tensors)
    logits = (query @ keys.transpose(2, 3) / 2).masked_fill(~keep.repeat_interleave(2, 1)[:, :, None], -torch.inf)
    torch.testing.assert_close(ours, logits.softmax(-1) @ values, rtol=0, atol=1e-6)  # fp32


def test_older_tokens_as_many_as_the_padding_beside_them_are_no_prompt_without_padding() -> None:
    made, (padded, alone) = torch.randn(2, 1, 2, 6, 4), (Hand(), Hand())
    for hand in (padded, alone):
        hand.feed(*made[:, :, :, :2])
    expected = alone.feed(*made[:, :, :, 2:4])
    ours = padded.feed(*made[:, :, :, 2:], real=torch.tensor([[True, True, False, False]]))
    torch.testing.assert_close(ours[:, :, :2], expected, rtol=0, atol=1e-6)  # fp32


def test_nan_in_a_whole_token_is_never_hidden_while_others_are_packed() -> None:
    hand, made = Hand(PACK), torch.randn(2, 1, 2, 41, 4)
    made[0, 0, 1, 40, 2] = torch.nan
    hand.feed(*made[:, :, :, :40])
    query = torch.randn(1, 4, 1, 4)
    out = hand.feed(*made[:, :, :, 40:], query)
    assert hand.layer.packed and torch.isfinite(out[:, :2]).all() and out[:, 2:].isnan().all()


def test_nan_in_a_token_is_never_hidden_behind_a_soft_cap() -> None:
    slots, _ = ragged()
    slots.tensors[0][0, 1, 3, 2] = torch.nan
    out = attend(torch.randn(2, 2, 2, 4), slots, torch.tensor([[1, 5]]).expand(2, -1), scaling=None, soft_cap=2.0)
    assert out[0, 1, 1].isnan().all() and torch.isfinite(out[0, 0]).all() and torch.isfinite(out[1]).all()


@pytest.mark.parametrize("groups", [1, 4, 7])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_reading_in_blocks_is_reading_at_once(groups: int, soft_cap: float | None, tokens: int) -> None:
    hand = Hand(QuantizeKV(4, 2, group=4, residual=0, sinks=1))
    hand.feed(*torch.randn(2, 2, 3, tokens, 8))
    query, at = torch.randn(2, 3 * groups, 1, 8), torch.full((2, 1), 99)
    expected = attend(query, hand.layer.slots(), at, scaling=0.3, soft_cap=soft_cap)
    ours = attend_in_blocks(query, hand.layer.parts, 3, scaling=0.3, soft_cap=soft_cap)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)  # fp32


@pytest.mark.parametrize("bits", [(4, 2), (16, 4), (2, 16)], ids=str)
@pytest.mark.parametrize("evict", [False, True])
def test_reading_unequal_segments_in_blocks_is_reading_at_once(
    bits: tuple[int, int], evict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.cache.packed.SCRATCH_CPU", 400)  # a unit or two at a time
    real = torch.arange(120) >= torch.tensor([[0], [43], [117]])  # the last row has nothing to pack
    toggle = EvictKV(0.9, "key_norm", "adaptive", sinks=1, window=1)
    hand = Hand(*([toggle] if evict else []), QuantizeKV(*bits, group=2, residual=2, sinks=1))
    hand.feed(*torch.randn(2, 3, 2, 120, 8), real=real)
    hand.feed(*torch.randn(2, 3, 2, 1, 8))
    assert hand.layer.packed and not all(part.even for part in hand.layer.parts)
    query, at = torch.randn(3, 4, 1, 8), torch.full((3, 1), 999)
    expected = attend(query, hand.layer.slots(), at, scaling=None)
    assert len(list(hand.layer.packed[-1].blocks(1))) > 1
    ours = attend_in_blocks(query, hand.layer.parts, 2, scaling=None)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)  # fp32


def test_small_scratch_gives_the_same_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(QuantizeKV(4, 2, group=2, residual=0, sinks=0))
    hand.feed(*torch.randn(2, 2, 3, 80, 8))
    query = torch.randn(2, 3, 1, 8)
    expected = attend_in_blocks(query, hand.layer.parts, 3, scaling=None)
    monkeypatch.setattr("workbench.cache.packed.SCRATCH_CPU", 2 * 3 * 8 * 8 * 3)  # three units of eight tokens
    assert [block.shape[2] for block in hand.layer.packed[0].blocks(0)] == [24, 24, 24, 8]
    torch.testing.assert_close(
        attend_in_blocks(query, hand.layer.parts, 3, scaling=None), expected, rtol=0, atol=2e-6
    )  # fp32


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4), st.data())
@settings(max_examples=30, deadline=None)
def test_reordering_flat_segments_moves_whole_rows(counts: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=5))
    labels = [(row, head, i) for row, pair in enumerate(counts) for head, n in enumerate(pair) for i in range(n)]
    order, chosen = reordered(torch.tensor(counts), torch.tensor(rows))
    expected = [label for row in rows for label in labels if label[0] == row]
    assert [labels[i] for i in order.tolist()] == expected
    assert chosen.tolist() == [counts[row] for row in rows]


def go_on(subject: Subject, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of one token after another, with a cache that holds what comes before them."""
    with torch.no_grad():
        steps = [subject.model(input_ids=one, past_key_values=cache, use_cache=True).logits for one in ids.split(1, 1)]
    return torch.cat(steps, 1)


@pytest.mark.parametrize(
    "toggle", [QuantizeKV(4, 4, group=4, residual=8, sinks=1), EvictKV(16, "tova", every=50)], ids=str
)
def test_tokens_that_nothing_has_happened_since_are_taken_back_exactly(toggle: Toggle) -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(30))
    with subject.under(toggle):
        cache = read_on(subject, ids[:, :18], [18]).past_key_values
        held = [layer.slots().positions.clone() for layer in cache.layers]
        once = go_on(subject, ids[:, 18:21], cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 18
        assert all(torch.equal(layer.slots().positions, was) for layer, was in zip(cache.layers, held, strict=True))
        assert torch.equal(go_on(subject, ids[:, 18:21], cache), once)


def test_no_layer_is_cropped_where_one_can_not_be() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(30))
    with subject.under(QuantizeKV((16, 4, 4), (16, 4, 4), group=2, residual=0, sinks=0)):  # layer 0 packs nothing
        cache = read_on(subject, ids, [30]).past_key_values
        with pytest.raises(ValueError, match="dropped or packed is gone"):
            cache.crop(-4)
        assert [layer.get_seq_length() for layer in cache.layers] == [30] * 3


def test_tokens_that_running_scores_have_seen_are_not_taken_back() -> None:
    subject, ids = subject_of("llama"), torch.tensor(prompts(26))
    with subject.under(EvictKV(20, "h2o", every=50)):
        cache = read_on(subject, ids, [24, 1, 1]).past_key_values
        with pytest.raises(ValueError, match="in the scores of others"):
            cache.crop(-1)
