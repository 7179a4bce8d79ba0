"""Bits per layer: laws of the knapsack, the profile against reading itself, worlds of known truth, plans, bad input."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from families import subject_of

from workbench.cache import KVLayer
from workbench.cache.held import accounts
from workbench.cache.packed import Format
from workbench.cache.recording import attention_seen, packable_layers
from workbench.methods.cache.bit_plans import BitSearchResult
from workbench.methods.cache.bit_profile import Layout, local_errors
from workbench.methods.cache.bit_world import brute_force, world
from workbench.methods.cache.bits import (
    PAIRS,
    BitPlan,
    clusters,
    held_bits,
    knapsack,
    packed_tokens,
    pareto,
    random_choice,
    said,
    search,
)
from workbench.probes.bit_search import BitSearch, errors_by_reading, search_bits, solved
from workbench.site import Site
from workbench.subject import Subject
from workbench.toggles.evict import EvictKV
from workbench.toggles.quantize import QuantizeKV

TOY = np.array([[0.01, 0.10, 0.50], [0.01, 0.02, 0.08], [0.00, 0.03, 0.30]])  # pairs (8,8), (4,4), (2,2)
TOY_COSTS = np.array([16, 8, 4])
NOMINAL = np.sum(PAIRS, axis=1)
SMALL = BitSearch(group=4, residual=3, sinks=1)  # the largest unit is 16 tokens: texts of more than 20


def ids(n_texts: int = 4, length: int = 48, seed: int = 0) -> list[list[int]]:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(8, 200, (n_texts, length), generator=made).tolist()


# --- laws of the search


@pytest.mark.parametrize(
    ("budget", "costs", "error"),
    [
        (12, (4, 4, 4), 0.88),
        (16, (8, 4, 4), 0.48),
        (20, (8, 4, 8), 0.21),
        (24, (8, 8, 8), 0.15),
        (28, (16, 4, 8), 0.12),
        (32, (16, 8, 8), 0.06),
        (36, (16, 8, 8), 0.06),
        (48, (16, 16, 16), 0.02),
    ],
)
def test_the_toy_problem_is_solved_at_every_budget(budget, costs, error):
    chosen = knapsack(TOY, TOY_COSTS, budget)
    assert tuple(TOY_COSTS[list(chosen)]) == costs
    assert math.isclose(TOY[range(3), chosen].sum(), error, rel_tol=1e-12)


def test_a_larger_budget_may_take_bits_from_a_layer():
    """What a search that only ever adds bits gets wrong."""
    before, after = (TOY_COSTS[list(knapsack(TOY, TOY_COSTS, budget))] for budget in (24, 28))
    assert after[1] < before[1]


@pytest.mark.parametrize("seed", range(8))
def test_the_search_is_as_good_as_trying_everything(seed):
    rng = np.random.default_rng(seed)
    errors, costs = rng.random((4, 5)), rng.integers(1, 9, (4, 5)) * 4
    for budget in range(int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum()) + 8, 7):
        chosen = knapsack(errors, costs, budget)
        assert costs[range(4), chosen].sum() <= budget
        exact = brute_force(errors, costs, budget)
        np.testing.assert_allclose(errors[range(4), chosen].sum(), exact, atol=1e-11)  # rounded at 2^-40 of the largest


@pytest.mark.parametrize("seed", range(4))
def test_pairs_that_are_never_worth_it_are_never_chosen(seed):
    rng = np.random.default_rng(seed)
    errors, costs = rng.random((5, 9)), np.broadcast_to(NOMINAL, (5, 9))
    kept = np.array([pareto(*row) for row in zip(errors, costs, strict=True)])
    for budget in range(20, 81, 5):
        assert kept[range(5), search(errors, costs, budget)].all()


def test_the_front_is_what_no_other_pair_beats():
    errors, costs = np.array([0.1, 0.2, 0.2, 0.3, 0.05]), np.array([8, 6, 6, 7, 12])
    assert pareto(errors, costs).tolist() == [True, True, False, False, True]  # of two equals the first
    rng = np.random.default_rng(0)
    errors, costs = rng.integers(0, 6, 40) / 5, rng.integers(1, 6, 40)
    beaten = [
        any(
            e <= errors[i] and c <= costs[i] and ((e, c) != (errors[i], costs[i]) or j < i)
            for j, (e, c) in enumerate(zip(errors, costs, strict=True))
            if j != i
        )
        for i in range(40)
    ]
    assert pareto(errors, costs).tolist() == [not one for one in beaten]


def test_equal_layers_get_equal_bits_and_ties_go_to_the_first_layers():
    errors = np.tile([0.01, 0.1, 0.5], (4, 1))
    assert knapsack(errors, TOY_COSTS, 32) == (1, 1, 1, 1)
    assert knapsack(errors, TOY_COSTS, 40) == (0, 1, 1, 1)
    assert knapsack(np.zeros((4, 3)), TOY_COSTS, 64) == (2, 2, 2, 2)  # no error anywhere: no bit is worth its cost


def test_layers_that_share_a_choice_get_the_same_pair():
    rng = np.random.default_rng(1)
    errors, groups = rng.random((6, 9)), np.array([0, 1, 0, 2, 1, 0])
    chosen = search(errors, NOMINAL, 48, groups)
    assert all(chosen[i] == chosen[j] for i in range(6) for j in range(6) if groups[i] == groups[j])
    alone = search(errors, NOMINAL, 48)
    assert errors[range(6), alone].sum() <= errors[range(6), chosen].sum()


def test_layers_with_curves_of_one_shape_are_one_group_whatever_their_size():
    curve, other = np.array([0.1, 0.2, 1.0]), np.array([0.1, 0.8, 1.0])
    errors = np.stack([other, curve, 5 * curve, 2 * other, curve])
    kept = np.ones((5, 3), dtype=bool)
    assert clusters(errors, kept, 0.05).tolist() == [0, 1, 1, 0, 1]
    kept[4, 1] = False  # another list of pairs is another group
    assert clusters(errors, kept, 0.05).tolist() == [0, 1, 1, 0, 2]
    assert clusters(errors, np.ones((5, 3), dtype=bool), 1.0).tolist() == [0] * 5
    assert clusters(errors[:1], kept[:1], 0.05).tolist() == [0]


def test_random_choices_keep_within_the_budget():
    rng, costs = np.random.default_rng(0), np.tile(NOMINAL, (6, 1))
    drawn = [random_choice(costs, 30, rng) for _ in range(50)]
    assert len(set(drawn)) > 20 and all(NOMINAL[list(chosen)].sum() <= 30 for chosen in drawn)
    with pytest.raises(ValueError, match="cheapest choice"):
        random_choice(costs, 23, rng)


@pytest.mark.parametrize(
    ("errors", "budget", "message"),
    [(TOY, 11, "cheapest choice costs 12"), (TOY - 1, 20, "negative"), (TOY * np.nan, 20, "non-finite")],
)
def test_a_problem_without_an_answer_is_refused(errors, budget, message):
    with pytest.raises(ValueError, match=message):
        knapsack(errors, TOY_COSTS, budget)


# --- the profile


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "opt"])
def test_the_profile_is_what_reading_with_one_packed_layer_gives(family):
    """Below the packed layer nothing changes, so its heads differ by the local error alone."""
    tiny = Subject.tiny(family)
    # In float64 keys of one forward and of many round to the same codes; float32 flips single codes (measured 1e-2).
    subject = Subject(tiny.model.double(), tiny.tokenizer, name=family, verify=False)
    probe = BitSearch(group=4, residual=3, sinks=1, pairs=((8, 8), (8, 2), (4, 8), (2, 4)))
    layers, text = packable_layers(subject), ids(1, 40)[0]
    slow = errors_by_reading(probe, subject, text, layers)[list(layers)]
    fast = probe._profile(subject, [text], layers)[0, list(layers), :, 0]
    np.testing.assert_allclose(fast, slow, rtol=2e-3)  # attention of the profile is in float32, measured 3e-4


def test_sliding_layers_are_left_alone():
    subject = subject_of("gemma2")
    layers = packable_layers(subject)
    assert layers == (1,)
    result = SMALL.run(subject, ids())
    assert isinstance(result, BitSearchResult) and result.layers == (1,)
    assert result.plan.pairs[0] == result.plan.pairs[2] == (16, 16)
    assert np.isnan(result.e_o[:, [0, 2]]).all() and "2 sliding-window" in result.notes[0]


def test_a_model_whose_attention_cannot_be_reached_keeps_every_layer_whole_and_says_why():
    result = SMALL.run(subject_of("falcon"), ids())
    assert isinstance(result, BitSearchResult)
    assert result.plan.pairs == ((16, 16),) * 3 and not result.kl.any()
    assert "computes attention in its own way" in result.finding


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])  # sdpa, eager, experts
def test_looking_at_attention_changes_nothing_and_leaves_nothing_behind(family):
    subject, seen = subject_of(family), []
    text = ids(1)
    before = subject.capture(text, [Site(2, "resid_out")], progress=False)[Site(2, "resid_out")]
    with pytest.raises(KeyError), attention_seen(subject, seen.append):
        during = subject.capture(text, [Site(2, "resid_out")], progress=False)[Site(2, "resid_out")]
        raise KeyError
    after = subject.capture(text, [Site(2, "resid_out")], progress=False)[Site(2, "resid_out")]
    assert torch.equal(before, during) and torch.equal(before, after)
    assert [read.layer for read in seen] == [0, 1, 2] and seen[0].keys.shape == (1, 2, 48, 8)
    with attention_seen(subject, seen.append), pytest.raises(ValueError, match="already"):
        attention_seen(subject, seen.append).__enter__()
    never, refused = pytest.warns(UserWarning, match="never fired"), pytest.raises(ValueError, match="EvictKV")
    with never, subject.under(EvictKV(0.5)), refused, attention_seen(subject, seen.append):
        pass


def test_errors_fall_with_bits_and_keys_of_many_bits_have_no_error_to_speak_of():
    tensors = world(0, outliers=False)[0]
    errors = local_errors(*tensors, PAIRS, Layout(8, 8, 2))
    grid = errors[:, 0].reshape(3, 3)  # rows: key bits 8, 4, 2; columns: value bits
    assert (np.diff(grid, axis=0) > 0).all() and (np.diff(grid, axis=1) > 0).all()
    e_k, e_v = errors[:, 1].reshape(3, 3), errors[:, 2].reshape(3, 3)
    assert (e_k[0] < 0.01).all() and (e_k[2] > 0.1).all() and (e_v[:, 0] < 0.01).all()


def test_whole_numbers_on_the_grid_have_no_error():
    """Values of 0 to 3 are their own 2-bit codes wherever a group holds both ends."""
    made = torch.Generator().manual_seed(0)
    keys, values = (torch.randint(0, 4, (2, 64, 8), generator=made).float() for _ in range(2))
    keys[:, ::4], keys[:, 1::4], values[..., ::4], values[..., 1::4] = 0, 3, 0, 3
    query = torch.randn(4, 64, 8, generator=made)
    errors = local_errors(query, keys, values, ((2, 2),), Layout(4, 3, 0))
    np.testing.assert_allclose(errors, 0.0, atol=1e-6)  # float32 attention; keys and values are exact
    assert errors[0, 1] == errors[0, 2] == 0.0


def test_a_layer_may_be_left_whole_and_a_side_too():
    tensors = world(0, outliers=False)[0]
    errors = local_errors(*tensors, ((16, 16), (16, 4), (4, 16), (4, 4)), Layout(8, 8, 2))
    assert not errors[0].any() and errors[1, 1] == errors[2, 2] == 0
    assert errors[1, 2] > 0 < errors[2, 1] and errors[3, 0] > max(errors[1, 0], errors[2, 0]) > 0
    probe = BitSearch(20.0, pairs=((16, 16), (8, 8), (4, 4)), group=8, residual=8, sinks=2, validate=False)
    plan = solved(world(0, outliers=False), probe).plan
    assert (16, 16) in plan.pairs and plan.mean_bits <= 20.0


def test_the_layer_with_outliers_among_its_keys_gets_the_most_key_bits():
    probe = BitSearch(group=8, residual=8, sinks=2, validate=False)
    result = solved(world(3, outliers=True), probe)
    keys = result.plan_pairs[0, :, 0]
    assert keys[0] > keys[1:].max()
    e_o = result.e_o[0, 0]
    assert 5 * e_o[PAIRS.index((8, 4))] < e_o[PAIRS.index((4, 8))]
    equal = solved(world(3, outliers=False), probe)
    assert len(set(equal.plan.pairs)) == 1


# --- plans as values


@pytest.mark.parametrize(
    ("pairs", "keys", "values", "mean"),  # how often each pair occurs in presets shipped with KVTuner
    [
        ({(2, 2): 4, (4, 4): 6, (4, 2): 20, (8, 4): 2}, 4.0, 2.5, 3.25),
        ({(8, 8): 1, (4, 4): 6, (2, 2): 9, (4, 2): 16}, 3.5625, 2.5625, 3.0625),
        ({(4, 8): 1, (4, 2): 15, (4, 4): 16}, 4.0, 3.1875, 3.59375),
        ({(4, 4): 9, (8, 4): 23}, 6.875, 4.0, 5.4375),
        ({(2, 2): 6, (4, 4): 4, (4, 2): 18, (4, 8): 4}, 3.625, 3.0, 3.3125),
        ({(4, 8): 2, (2, 4): 2, (4, 2): 28, (2, 2): 2, (4, 4): 2}, 3.7778, 2.5556, 3.1667),
        ({(8, 8): 1, (4, 2): 7, (8, 2): 3, (4, 4): 17}, 4.5714, 3.4286, 4.0),
        ({(8, 8): 6, (2, 2): 13, (4, 4): 9}, 3.9286, 3.9286, 3.9286),
    ],
)
def test_mean_bits_are_those_of_published_plans(pairs, keys, values, mean):
    plan = BitPlan(tuple(pair for pair, count in pairs.items() for _ in range(count)))
    found = np.mean(plan.key_bits), np.mean(plan.value_bits), plan.mean_bits
    np.testing.assert_allclose(found, (keys, values, mean), atol=5e-5)  # published with four digits


def test_a_plan_survives_its_file_and_acts(tmp_path):
    plan = BitPlan(((8, 4), (4, 2), (2, 2)))
    path = plan.save(tmp_path / "plan.yaml")
    assert BitPlan.load(path, 3) == BitPlan.load(path) == plan
    assert path.read_text().startswith("0:\n  nbits_key: 8\n  nbits_value: 4\n1:")
    forms = QuantizeKV(plan.key_bits, plan.value_bits).formats(3)
    assert forms == (Format(8, 4), Format(4, 2), Format(2, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: {nbits_key: 8, nbits_value: 4}\n0: {nbits_key: 2, nbits_value: 2}\n", r"\[0\] twice"),
        ("0: {nbits_key: 8, nbits_value: 4}\n2: {nbits_key: 2, nbits_value: 2}\n", r"\[1\] not at all"),
        ("0: {nbits_key: 8, nbits_value: 3}\n", "expected for each layer"),
        ("0: {nbits_key: 8}\n", "each once"),
        ("0: {nbits_key: 8, nbits_value: [4]}\n", "each once"),
        ("first: {nbits_key: 8, nbits_value: 4}\n", "whole number"),
        ("[1, 2", "no YAML"),
        ("", "no mapping"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        BitPlan.load(tmp_path / "plan.yaml")


def test_a_plan_for_another_model_is_refused(tmp_path):
    path = BitPlan(((8, 4), (4, 2), (2, 2))).save(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match="beyond the last layer"):
        BitPlan.load(path, 2)
    with pytest.raises(ValueError, match="not at all"):
        BitPlan.load(path, 4)
    with pytest.raises(ValueError, match="no layer"):
        BitPlan(())


@pytest.mark.parametrize("pair", [(2, 2), (4, 2), (8, 8), (16, 4)])
@pytest.mark.parametrize("length", [20, 57, 90])
def test_held_bits_are_what_a_cache_holds(pair, length):
    subject, layout = subject_of("llama"), {"group": 4, "residual": 3, "sinks": 1}
    with subject.under(QuantizeKV(*pair, **layout)):
        cache = subject.model(input_ids=torch.tensor(ids(1, length)), use_cache=True).past_key_values
        assert isinstance(cache.layers[0], KVLayer)
        rows = [row for row in accounts(cache) if row["layer"] == 0 and row["part"] not in ("index", "idle", "state")]
    assert held_bits(pair, length, (2, 8, 8), whole=32, **layout) == 8 * sum(row["bytes"] for row in rows)


def test_the_rule_of_what_is_packed_is_the_published_table():
    lengths = (3, 100, 132, 259, 260, 300, 388)
    assert [packed_tokens(t, Format(2, 2), 128, 4) for t in lengths] == [0, 0, 0, 0, 128, 128, 256]
    assert packed_tokens(torch.tensor(lengths), Format(2, 2), 128, 4).tolist() == [0, 0, 0, 0, 128, 128, 256]
    assert packed_tokens(1000, Format(16, 16), 128, 4) == 0


def test_plans_are_named_as_in_papers():
    assert [said(pair) for pair in ((4, 4), (8, 4), (16, 16))] == ["KV4", "K8V4", "-"]


# --- the probe


def test_reading_in_pieces_gives_the_divergences_of_reading_token_by_token(monkeypatch):
    subject = subject_of("llama")
    probe = BitSearch(group=4, residual=3, sinks=1)
    with pytest.warns(UserWarning, match="never fired"), subject.under(QuantizeKV(2, 2, 4, 3, 1)):
        with probe._in_pieces(subject):
            assert subject.stages.piece == 4
        assert subject.stages.piece == 1
    plans = [BitPlan(((2, 2), (4, 2), (8, 8))), BitPlan(((4, 4),) * 3)]
    fast, counts = probe._divergences(subject, ids(), plans)
    monkeypatch.setattr(math, "gcd", lambda *_: 1)
    slow, _ = probe._divergences(subject, ids(), plans)
    np.testing.assert_allclose(fast, slow, rtol=2e-2)  # single codes flip by float32 rounding, measured 2e-3
    assert (slow > 0).all() and counts.tolist() == [48 - 20] * 4


def test_the_answer_comes_with_its_neighbours_uniform_shuffled_and_random_plans():
    result = BitSearch(3.5, group=4, residual=3, sinks=1, sweep=(6.0,), n_random=3).run(subject_of("llama"), ids(6))
    assert isinstance(result, BitSearchResult)
    plans: Any = result.plans()
    searched, uniform = (plans[plans["kind"] == kind] for kind in ("searched", "uniform"))
    assert searched["cap"].iloc[0] == 3.5 and set(searched["cap"]) <= {3.5, 3.25, 3.75, 6.0}
    assert (searched["mean_bits"] <= searched["cap"]).all() and len(uniform) == 9
    shuffled = plans[plans["kind"] == "shuffled"]
    assert (shuffled["mean_bits"] == plans["mean_bits"][0]).all() and (
        shuffled["surrogate"] >= plans["surrogate"][0]
    ).all()
    assert (plans["low"] <= plans["kl"]).all() and (plans["kl"] <= plans["high"]).all() and (plans["n"] == 3).all()
    estimate, low, high = result.agreement()
    assert -1 <= low <= estimate <= high <= 1
    rival = result.rival()
    assert rival is not None and plans["kind"][rival] == "uniform" and plans["mean_bits"][rival] <= 3.5
    gain = plans["kl"][rival] - plans["kl"][0]
    np.testing.assert_allclose(result.gain()[0], gain, rtol=1e-9)
    assert result.chosen()["layer"].tolist() == [0, 1, 2]


def test_a_plan_within_accounted_bits_holds_no_more():
    subject, texts = subject_of("llama"), ids(4, 90)
    probe = BitSearch(16.0, budget="accounted", group=4, residual=3, sinks=1, validate=False)
    result = probe.run(subject, texts)
    assert isinstance(result, BitSearchResult)
    with subject.under(probe.toggle(result.plan)):
        cache = subject.model(input_ids=torch.tensor(texts[:1]), use_cache=True).past_key_values
        rows = [row for row in accounts(cache) if row["part"] not in ("index", "idle", "state")]
    numbers = sum(row["numbers"] for row in rows)
    np.testing.assert_allclose(8 * sum(row["bytes"] for row in rows) / numbers, result.accounted[0])
    assert result.accounted[0] <= 16.0 < result.accounted[0] + 3  # the next better pair of one layer costs so much


def test_a_search_runs_under_other_key_value_toggles():
    subject, probe = subject_of("llama"), BitSearch(group=4, residual=3, sinks=1, pairs=((4, 4),), n_random=0)
    with subject.under(EvictKV(24, "snapkv", sinks=1, window=2, every=1)):
        evicted = probe.run(subject, ids(2))
    plain = probe.run(subject, ids(2))
    assert isinstance(evicted, BitSearchResult) and isinstance(plain, BitSearchResult)
    assert np.isfinite(evicted.e_o).all() and np.isnan(evicted.e_k).all()
    assert not np.allclose(evicted.e_o, plain.e_o, rtol=0.01)
    never, refused = pytest.warns(UserWarning, match="never fired"), pytest.raises(ValueError, match="nominal")
    with never, subject.under(EvictKV(0.5)), refused:
        BitSearch(8.0, budget="accounted", group=4, residual=3, sinks=1).run(subject, ids(2))


def test_search_bits_gives_the_plan_of_the_probe():
    subject = subject_of("llama")
    settings: dict[str, Any] = {"group": 4, "residual": 3, "sinks": 1}
    plan = search_bits(subject, ids(), cap=3.5, **settings)
    result = BitSearch(3.5, validate=False, **settings).run(subject, ids())
    assert isinstance(result, BitSearchResult) and result.plan == plan and plan.mean_bits <= 3.5
    least = min(
        product(range(9), repeat=3), key=lambda c: (NOMINAL[list(c)].sum() > 21, result.e_o.mean(0)[range(3), c].sum())
    )
    assert tuple(PAIRS[p] for p in least) == plan.pairs


@pytest.mark.parametrize(
    ("probe", "data", "message"),
    [
        (SMALL, "one text", "every second one"),
        (SMALL, ids(1), "every second one"),
        (SMALL, ids(2, 20), "nothing would be packed"),
        (BitSearch(1.9, group=4, residual=3, sinks=1), ids(), "cheapest pairs cost 2.00"),
        (BitSearch(group=4, residual=3, sinks=1, weights=(1.0,)), ids(), "weights"),
    ],
)
def test_what_cannot_be_searched_is_refused(probe, data, message):
    with pytest.raises(ValueError, match=message):
        probe.run(subject_of("llama"), data)


@pytest.mark.parametrize("pairs", [(), ((3, 4),), ((8,),), ((8, 4, 2),), ("84",), [("8", "4")]])
def test_pairs_that_are_none_are_refused_when_the_probe_is_made(pairs):
    with pytest.raises(ValueError, match=r"BitSearch: got pairs=.*each 2, 4, 8 or 16"):
        BitSearch(pairs=pairs)


def test_pairs_may_be_lists():
    probe = BitSearch(pairs=[[8, 8], [4, 4]], group=8, residual=8, sinks=2, validate=False)
    assert probe.pairs == ((8, 8), (4, 4))
    assert solved(world(0, outliers=False), probe).plan.pairs == ((4, 4),) * 4


def test_a_profile_of_a_short_text_and_a_figure_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match="sinks, residual and one unit"):
        local_errors(*world(0, outliers=False)[0], PAIRS, Layout(64, 8, 2))
    result = solved(world(0, outliers=False), BitSearch(group=8, residual=8, sinks=2, validate=False))
    with pytest.raises(ValueError, match="plan, errors, profile"):
        result.plot("frontier")
