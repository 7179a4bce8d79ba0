"""Any plan, any cache, any lengths: masks equal slices, codes come back, bytes are those that are held."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from by_hand import Hand, held
from families import subject_of
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import EvictKV, LayerPlan, Plan, Prune, QuantizeKV
from workbench.cache import cache_bytes
from workbench.cache.packing import BITS, dequantise, pack_planes, quantise, unpack_planes, words_of_channels
from workbench.methods.cache.scorers import SCORERS
from workbench.pruned.plan import Shape

# Plans

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.none() | st.integers(1, 12)).map(
    lambda n: Shape(n[0], 8, n[1] * n[2], n[1], 4, n[3])
)
INTEGERS = st.integers(-2, 12)
UNITS = st.none() | st.lists(INTEGERS, max_size=6)


@st.composite
def plans(draw: st.DrawFn, shape: Shape | None = None) -> Plan:
    """A plan that is sound: as many heads of each group that is kept."""
    shape = shape or draw(SHAPES)
    layers = {}
    for layer in draw(st.sets(st.integers(0, shape.n_layers - 1), max_size=shape.n_layers)):
        groups = draw(st.sets(st.integers(0, shape.n_kv_heads - 1)))
        size = draw(st.integers(1, shape.group))
        heads = tuple(
            g * shape.group + h for g in sorted(groups) for h in draw(st.permutations(range(shape.group)))[:size]
        )
        neurons = draw(st.none() | st.sets(st.integers(0, shape.d_mlp - 1))) if shape.d_mlp else None
        layers[layer] = LayerPlan(draw(st.sampled_from([None, heads])), None, neurons and tuple(neurons))
    dropped = draw(st.sets(st.integers(0, shape.n_layers - 1), max_size=shape.n_layers - 1))
    return Plan(shape, tuple(layers.items()), tuple(dropped), (("criterion", "drawn"),))


@given(plans())
def test_a_plan_survives_json_and_counts_what_it_keeps(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.origin == plan.origin and str(again) == str(plan) and hash(again) == hash(plan)
    for family in ("heads", "kv_heads", "neurons"):
        assert all(0 <= plan.kept(layer, family) <= plan.total(family) for layer in range(plan.shape.n_layers))
    assert plan & plan == plan and plan & Plan(plan.shape) == plan


@given(st.data(), SHAPES)
def test_two_plans_keep_together_what_both_keep(data: Any, shape: Shape) -> None:
    one, other = (data.draw(plans(shape)) for _ in range(2))
    try:
        both = one & other
    except ValueError as error:
        assert "unevenly" in str(error) or "all" in str(error)
        return
    for layer in set(range(shape.n_layers)) - set(both.dropped):
        for family in ("heads", "neurons"):
            a, b, kept = (getattr(plan.at(layer), family) for plan in (one, other, both))
            full = range(plan_total(shape, family))
            assert set(full if kept is None else kept) == set(full if a is None else a) & set(full if b is None else b)


def plan_total(shape: Shape, family: str) -> int:
    return Plan(shape).total(family)


@given(SHAPES, st.dictionaries(INTEGERS, st.tuples(UNITS, UNITS, UNITS), max_size=3), st.lists(INTEGERS, max_size=3))
def test_a_plan_is_sound_or_refused_in_words(shape: Shape, layers: dict[int, Any], dropped: list[int]) -> None:
    try:
        plan = Plan(shape, tuple((layer, LayerPlan(*units)) for layer, units in layers.items()), tuple(dropped))
    except ValueError as error:
        assert str(error).startswith("Plan: ")
        return
    for layer in range(shape.n_layers):
        if plan.kept(layer, "kv_heads"):
            assert plan.kept(layer, "heads") % plan.kept(layer, "kv_heads") == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["0", "x", "heads", "neurons", "n_layers"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["shape", "layers", "dropped", "origin", "shape"]), JSON, max_size=3), st.booleans()
)
def test_json_that_is_no_plan_is_refused_in_words(changes: dict[str, Any], known_format: bool) -> None:
    data = Plan(Shape(2, 8, 4, 2, 2, 6)).to_json() | changes | ({} if known_format else {"format": 7})
    try:
        Plan.from_json(data)
    except ValueError as error:
        assert str(error).startswith("Plan: ")
    else:
        assert known_format, "a format of another version is never read"


@settings(max_examples=12)
@given(st.data(), st.sampled_from(["llama", "gpt2", "qwen3"]))
def test_a_mask_is_the_same_function_as_its_slice(data: Any, family: str) -> None:
    subject = subject_of(family)
    plan = data.draw(plans(Shape.of(subject)))
    texts = [[5, 6, 7, 8, 9], [10, 11]]
    before = [p.clone() for _, _, p in sorted(subject.predictions(texts), key=lambda item: item[0])]
    found = []
    for form in ("mask", "slice"):
        with subject.under(Prune(plan, form)):
            found.append([p.clone() for _, _, p in sorted(subject.predictions(texts), key=lambda item: item[0])])
    for mask, cut in zip(*found, strict=True):
        torch.testing.assert_close(mask, cut, rtol=1e-4, atol=1e-4)  # float32: zeros left out of sums, measured 2e-6
    after = [p for _, _, p in sorted(subject.predictions(texts), key=lambda item: item[0])]
    assert all(map(torch.equal, before, after)), "whatever was cut is back"


# Packing

GROUPS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))


@given(st.sampled_from(BITS), GROUPS, st.floats(-4, 4), st.floats(-100, 100))
def test_a_number_comes_back_within_half_a_step(bits: int, shape: Any, scale: float, shift: float) -> None:
    a, b, group, seed = shape
    x = torch.randn(a, b, group, generator=torch.Generator().manual_seed(seed)) * 10**scale + shift
    codes, step, base = quantise(x, bits)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    error = (dequantise(codes, step, base, torch.float32) - x).abs()
    # Half a step; the minimum and the step are stored in float16, whose spacing is 2^-11 of the number or 2^-25.
    stored = 2**-11 * (base.float().abs() + (2**bits - 1) * step.float()) + 2**bits * 2**-25
    assert (error <= step.float() / 2 + 2 * stored + 1e-6).all()


@given(
    st.sampled_from(BITS),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 7),
    st.integers(0, 99),
)
def test_codes_come_back_from_their_planes(
    bits: int, units: int, blocks: int, many: int, group: int, seed: int
) -> None:
    tokens = many * group * 8 // bits
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (units, tokens, blocks), generator=generator).to(torch.uint8)
    rows = pack_planes(codes, bits, group)
    assert rows.numel() * 8 == codes.numel() * bits, "not a bit more than was promised"
    assert torch.equal(unpack_planes(rows, bits, group), codes)


@given(st.integers(-3, 20), st.integers(0, 12), st.integers(1, 5))
def test_bits_and_lengths_that_do_not_pack_are_refused_in_words(bits: int, tokens: int, group: int) -> None:
    codes = torch.zeros(1, tokens, 2, dtype=torch.uint8)
    for call in (lambda: pack_planes(codes, bits, group), lambda: words_of_channels(codes, bits)):
        try:
            call()
        except ValueError as error:
            assert "expected" in str(error)
        else:
            assert bits in BITS and tokens % (8 // bits) == 0


@given(st.sampled_from(BITS), st.lists(st.floats(width=32), min_size=1, max_size=6))
def test_numbers_that_would_poison_a_group_are_refused(bits: int, numbers: list[float]) -> None:
    x = torch.tensor([numbers])
    try:
        codes, step, base = quantise(x, bits)
    except ValueError as error:
        assert "expected finite numbers" in str(error)
        assert not bool((x.abs() < 3e4).all()), "what float16 holds is never refused"
    else:
        assert torch.isfinite(dequantise(codes, step, base, torch.float32)).all()


# Caches of any length

EVICT = st.builds(
    EvictKV,
    keep=st.floats(0.05, 1.0) | st.integers(15, 40),
    by=st.sampled_from(sorted(set(SCORERS) - {"expected_attention"})),  # that one needs a model's rotation
    schedule=st.sampled_from(["uniform", "pyramid", "adaptive"]),
    sinks=st.integers(0, 5),
    window=st.integers(1, 9),
    every=st.none() | st.integers(1, 9),
)
QUANTIZE = st.builds(
    QuantizeKV,
    key_bits=st.sampled_from([2, 4, 8, 16]),
    value_bits=st.sampled_from([2, 4, 8, 16]),
    group=st.integers(1, 9),
    residual=st.integers(0, 20),
    sinks=st.integers(0, 5),
)
TOGGLES = EVICT.map(lambda a: (a,)) | QUANTIZE.map(lambda b: (b,)) | st.tuples(EVICT, QUANTIZE)
PIECES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(TOGGLES, PIECES, st.integers(1, 3), st.integers(0, 99))
def test_a_cache_of_any_length_holds_tokens_in_order_and_accounts_for_every_byte(
    toggles: Any, pieces: list[int], batch: int, seed: int
) -> None:
    keys, values = torch.randn(2, batch, 2, sum(pieces), 8, generator=torch.Generator().manual_seed(seed))
    gaps = [(seed * (row + 1)) % pieces[0] for row in range(batch)]  # padding on the left of the prompt
    hand = Hand(*toggles)
    seen = 0
    try:
        for piece in pieces:
            real = torch.ones(batch, piece, dtype=torch.bool)
            for row, gap in enumerate(gaps if not seen else [0] * batch):
                real[row, :gap] = False
            out = hand.feed(keys[:, :, seen : seen + piece], values[:, :, seen : seen + piece], real=real)
            seen += piece
            assert all(torch.isfinite(out[row][..., :, :]).all() for row in range(batch))
    except ValueError as error:
        assert "Keep more" in str(error) or "expected" in str(error)
        return
    for row, heads in enumerate(held(hand.layer)):
        length = seen - gaps[row]
        for positions in heads:
            assert len(set(positions)) == len(positions) and set(positions) <= set(range(length))
            assert positions, "never nothing"
    assert hand.layer.get_seq_length() == seen
    assert sum(row["bytes"] for row in hand.rows()) == cache_bytes(hand)


SMALL = {"sinks": st.integers(0, 2), "window": st.integers(1, 3)}
BITS_AND_ROOM = {"key_bits": st.sampled_from(BITS), "value_bits": st.sampled_from(BITS), "residual": st.integers(0, 6)}
MODEL_TOGGLES = st.one_of(
    st.builds(EvictKV, keep=st.floats(0.2, 1.0), by=st.sampled_from(sorted(SCORERS)), every=st.integers(1, 4), **SMALL),
    st.builds(
        EvictKV, keep=st.integers(6, 12), by=st.sampled_from(["snapkv", "tova"]), chunk=st.integers(1, 9), **SMALL
    ),
    st.builds(QuantizeKV, group=st.integers(1, 5), sinks=st.integers(0, 2), **BITS_AND_ROOM),
)


@settings(max_examples=10)
@pytest.mark.filterwarnings("ignore:.*never fired")  # short texts fit into any budget
@given(
    MODEL_TOGGLES | st.tuples(MODEL_TOGGLES, MODEL_TOGGLES),
    st.lists(st.integers(1, 20), min_size=2, max_size=3),
    st.integers(1, 6),
)
def test_a_batch_writes_what_each_of_its_texts_would_alone(toggles: Any, lengths: list[int], new: int) -> None:
    subject = subject_of("llama")
    prompts = [[5 + (7 * row + at) % 60 for at in range(length)] for row, length in enumerate(lengths)]
    both = toggles if isinstance(toggles, tuple) else (toggles,)
    try:
        with subject.under(both[0] if len(both) == 1 else both[0] | both[1]):
            together = subject.generate(prompts, max_new_tokens=new)
            alone = [subject.generate([prompt], max_new_tokens=new) for prompt in prompts]
    except ValueError as error:
        assert any(word in str(error) for word in ("expected", "Keep more", "claim", "at most one", "Leave"))
        return
    assert [list(ids) for ids in together.ids] == [list(one.ids[0]) for one in alone]


@pytest.mark.parametrize("seen", [(1,), (1, 1, 1), (39,), (2, 39)])
def test_the_shortest_and_odd_lengths_are_read_too(seen: tuple[int, ...]) -> None:
    hand = Hand(EvictKV(0.5, sinks=0, window=1, every=1), QuantizeKV(2, 8, group=3, residual=0, sinks=0))
    keys = torch.randn(1, 2, sum(seen), 8, generator=torch.Generator().manual_seed(0))
    for part in keys.split(list(seen), 2):
        assert torch.isfinite(hand.feed(part, part.clone())).all()
