"""EvictKV: budgets are kept, scorers know what they claim to know, and a planted token survives or falls as it must."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from by_hand import Hand, held
from families import subject_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.cache.layer import View
from workbench.methods.cache.budgets import adaptive, best, budget, pyramid, ranks
from workbench.methods.cache.scorers import Random, h2o, key_norm, random, snapkv, streaming, tova
from workbench.step import Step
from workbench.toggles.evict import EvictKV

every_scorer = pytest.mark.parametrize("by", ["streaming", "h2o", "snapkv", "tova", "key_norm", "random"])


class Watcher:
    """A selector that drops nothing and shows what it was shown."""

    running = False

    def __init__(self) -> None:
        self.views: list[View] = []

    def keep(self, view: View) -> None:
        self.views.append(view)


class Running(Watcher):
    running = True


def views(keys: Tensor, query: Tensor, pieces: list[int], watcher: Watcher | None = None) -> list[View]:
    hand = Hand()
    hand.stages.select = watcher = watcher or Watcher()
    for k, q in zip(keys.split(pieces, 2), query.split(pieces, 2), strict=True):
        hand.feed(k, k.clone(), q)
    return watcher.views


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(tokens: int, at: int, heads: int = 2, width: int = 64) -> tuple[Tensor, Tensor]:
    """Keys of zero but for one that every query points at with logit 8, and the queries."""
    along = normal(width)
    along = along / along.norm()
    keys = torch.zeros(1, heads, tokens, width)
    keys[:, :, at] = 64 * along
    return keys, along.expand(1, 2 * heads, tokens, width).contiguous()


def kept_of(toggle: EvictKV, keys: Tensor, query: Tensor, **options: Any) -> list[list[int]]:
    """Per head, the positions left after a prompt in the first row."""
    hand = Hand(toggle, **options)
    hand.feed(keys, keys.clone(), query)
    return held(hand.layer)[0]


# Budgets


@given(st.floats(0.01, 1.0), st.integers(1, 5000))
def test_a_share_is_rounded_and_never_nothing(keep: float, tokens: int) -> None:
    assert budget(keep, torch.tensor([tokens])).tolist() == [max(1, round(keep * tokens))]


def test_shares_do_not_fall_into_the_float_trap() -> None:
    given_ = [(0.1, 10), (0.1, 100), (0.2, 20), (0.7, 10), (1.0, 7), (0.3, 1)]
    assert [int(budget(keep, torch.tensor([n]))) for keep, n in given_] == [1, 10, 4, 7, 7, 1]
    assert budget(5, torch.tensor([3, 5, 9])).tolist() == [3, 5, 5]


@given(st.integers(1, 60), st.integers(1, 3000), st.integers(1, 40), st.integers(1, 60))
def test_a_pyramid_conserves_the_budget(n: int, extra: int, n_layers: int, window: int) -> None:
    n = max(n, window)
    sizes = pyramid(n, n + extra, n_layers, window=window)
    assert sum(sizes) == n * n_layers and len(sizes) == n_layers
    assert window <= min(sizes) and max(sizes) <= n + extra
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(sizes))  # 1: rounding


@pytest.mark.parametrize(
    ("tokens", "n", "sizes"),
    [(1000, 500, [936, 645, 355, 64]), (8192, 2048, [3994, 2697, 1399, 102]), (8192, 1280, [2496, 1685, 875, 64])],
)
def test_the_pyramid_is_that_of_the_paper_where_it_is_defined(tokens: int, n: int, sizes: list[int]) -> None:
    assert pyramid(n, tokens, 4, window=64) == sizes


def test_below_its_window_the_pyramid_gets_flatter_and_never_silently_uniform() -> None:
    assert pyramid(1279, 8192, 4, window=64) == [2494, 1684, 874, 64]  # the published rule gives up here
    assert pyramid(64, 8192, 4, window=64) == [64] * 4
    assert pyramid(10, 10, 3) == [10] * 3 and pyramid(7, 100, 1) == [7]
    with pytest.raises(ValueError, match="window of 9 tokens and a budget of 8"):
        pyramid(8, 100, 4, window=9)


def test_heads_share_a_budget_as_in_the_paper() -> None:
    scores = torch.tensor([[[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]]])
    every, none = torch.ones(1, 2, 4, dtype=torch.bool), torch.zeros(1, 2, 4, dtype=torch.bool)
    kept = adaptive(scores, every, none, torch.tensor([4]), alpha=0.5)
    assert kept.int().tolist() == [[[1, 1, 1, 0], [0, 0, 0, 1]]]


@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0.0, 0.9))
@settings(max_examples=50, deadline=None)
def test_heads_together_keep_the_budget_and_each_its_floor(seed: int, n: int, alpha: float) -> None:
    scores = normal(3, 4, 12, seed=seed) * torch.tensor([1.0, 5, 0.1, 1])[:, None]
    every, none = torch.ones(3, 4, 12, dtype=torch.bool), torch.zeros(3, 4, 12, dtype=torch.bool)
    kept = adaptive(scores, every, none, torch.full((3,), 4 * n), alpha)
    assert kept.sum((1, 2)).tolist() == [4 * n] * 3
    assert int(kept.sum(-1).min()) >= math.floor(alpha * n)
    assert bool((scores.masked_fill(~kept, torch.inf).amin(-1) >= scores.masked_fill(kept, -torch.inf).amax(-1)).all())


def test_the_best_are_kept_forced_ones_first_and_ties_go_to_the_newer() -> None:
    scores = torch.tensor([[[1.0, 3.0, 3.0, 0.0, 2.0, 9.0]]])
    filled = torch.tensor([[[True] * 5 + [False]]])
    forced = torch.tensor([[[False, False, False, True, False, True]]])
    assert ranks(scores, filled, forced)[0, 0, :5].tolist() == [4, 2, 1, 0, 3]
    assert best(scores, filled, forced, torch.tensor([[2]])).int().tolist() == [[[0, 0, 1, 1, 0, 0]]]
    assert best(scores, filled, forced, torch.tensor([[9]])).int().tolist() == [[[1, 1, 1, 1, 1, 0]]]


@every_scorer
@pytest.mark.parametrize("schedule", ["uniform", "pyramid", "adaptive"])
def test_what_is_kept_is_what_was_asked(by: str, schedule: Any) -> None:
    tokens, n_layers = 61, 3
    keys, query = normal(2, 2, tokens, 8), normal(2, 4, tokens, 8, seed=1)
    total = 0
    for layer in range(n_layers):
        toggle = EvictKV(0.3, by, schedule, sinks=2, window=3)
        hand = Hand(toggle, layer=layer, n_layers=n_layers)
        hand.feed(keys, keys.clone(), query)
        for heads in held(hand.layer):
            assert all({0, 1, 58, 59, 60} <= set(positions) for positions in heads)
            total += sum(map(len, heads))
    assert total == 2 * 2 * n_layers * round(0.3 * tokens)


@every_scorer
def test_a_fixed_budget_and_a_clock_bound_the_peak(by: str) -> None:
    n, every = 12, 5
    hand = Hand(EvictKV(n, by, "uniform", sinks=1, window=2, every=every))
    keys, query = normal(1, 2, 70, 8), normal(1, 4, 70, 8, seed=1)
    hand.feed(keys[:, :, :30], keys[:, :, :30].clone(), query[:, :, :30])
    lengths = []
    for at in range(30, 70):
        piece = slice(at, at + 1)
        hand.feed(keys[:, :, piece], keys[:, :, piece].clone(), query[:, :, piece])
        lengths.append(max(map(len, held(hand.layer)[0])))
    assert max(lengths) == n + every - 1 and min(lengths) == n
    assert hand.layer.recent.positions.shape[1] <= every + 1, "the buffer must not grow with the text"


def test_after_the_prompt_only_means_that() -> None:
    hand, keys = Hand(EvictKV(4, "key_norm", sinks=0, window=1, every=None)), normal(1, 2, 30, 8)
    hand.feed(keys[:, :, :20], keys[:, :, :20].clone())
    for at in range(20, 30):
        hand.feed(keys[:, :, at : at + 1], keys[:, :, at : at + 1].clone())
    assert [len(positions) for positions in held(hand.layer)[0]] == [14, 14]


@every_scorer
def test_a_row_with_padding_keeps_what_it_would_keep_alone(by: str) -> None:
    keys, query = normal(2, 2, 40, 8), normal(2, 4, 40, 8, seed=1)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :17] = False
    for schedule in ("uniform", "pyramid", "adaptive"):
        toggle = EvictKV(0.4, by, schedule, sinks=1, window=2, every=3)
        together, alone = Hand(toggle, layer=1, n_layers=3), Hand(toggle, layer=1, n_layers=3)
        together.feed(keys, keys.clone(), query, real=real)
        alone.feed(keys[1:, :, 17:], keys[1:, :, 17:].clone(), query[1:, :, 17:])
        for turn in range(7):
            new, ask = normal(2, 2, 1, 8, seed=turn + 2), normal(2, 4, 1, 8, seed=turn + 50)
            assert held(together.layer)[1] == held(alone.layer)[0]
            together.feed(new, new.clone(), ask)
            alone.feed(new[1:], new[1:].clone(), ask[1:])


# Scorers


def test_streaming_keeps_the_first_and_the_last_in_every_head() -> None:
    keys = normal(1, 3, 20, 8)
    assert kept_of(EvictKV(10, "streaming", sinks=4, window=1), keys, keys) == [[0, 1, 2, 3, *range(14, 20)]] * 3
    assert torch.equal(streaming(views(keys, keys, [20])[0])[0, 0], torch.arange(20.0))


@pytest.mark.parametrize("pieces", [[4], [1, 1, 1, 1], [3, 1]], ids=str)
def test_h2o_on_uniform_attention_sums_the_harmonic_series(pieces: list[int]) -> None:
    found: list[Tensor] = []

    class Summing(Running):
        def keep(self, view: View) -> None:
            found.append(h2o(view))

    hand, zero = Hand(), torch.zeros(1, 2, 4, 8)
    hand.stages.select = Summing()
    for piece in zero.split(pieces, 2):
        hand.feed(piece, piece.clone(), torch.zeros(1, 4, piece.shape[2], 8))
    expected = torch.tensor([25 / 12, 13 / 12, 7 / 12, 3 / 12])
    torch.testing.assert_close(found[-1], expected.expand(1, 2, 4), rtol=1e-6, atol=0)


def test_h2o_in_blocks_is_h2o(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, query = normal(1, 2, 37, 8), normal(1, 4, 37, 8, seed=1)
    small, large = (views(keys, query, [37], Running())[0] for _ in range(2))
    at_once = h2o(large)
    monkeypatch.setattr("workbench.methods.cache.scorers.BLOCK", 5)
    torch.testing.assert_close(h2o(small), at_once, rtol=1e-5, atol=1e-6)  # fp32 sums


def test_tova_keeps_one_set_in_all_heads() -> None:
    keys, query = normal(1, 3, 40, 8), normal(1, 6, 40, 8, seed=1)
    first, *others = kept_of(EvictKV(10, "tova", sinks=0, window=1), keys, query)
    assert all(other == first for other in others)
    weights = (query[0, :, -1:] @ keys[0].repeat_interleave(2, 0).transpose(1, 2) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(tova(views(keys, query, [40])[0])[0, 0], weights.mean(0)[0], rtol=1e-5, atol=1e-7)


def test_snapkv_without_smoothing_is_the_mean_of_the_last_queries() -> None:
    keys, query = normal(1, 2, 30, 8), normal(1, 4, 30, 8, seed=1)
    logits = query[0] @ keys[0].repeat_interleave(2, 0).transpose(1, 2) / math.sqrt(8)
    logits = logits.masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -torch.inf)
    expected = logits.softmax(-1)[:, -6:].sum(1).unflatten(0, (2, 2)).mean(1)
    view = views(keys, query, [30])[0]
    torch.testing.assert_close(snapkv(view, window=6, kernel=1)[0], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(snapkv(view, window=6, kernel=5)[0], expected, rtol=1e-2)


def test_snapkv_smooths_a_spike_over_its_neighbourhood() -> None:
    keys, query = planted(60, 20)
    score = snapkv(views(keys, query, [60])[0], window=4, kernel=5)[0, 0]
    assert score.argsort(descending=True)[:5].sort().values.tolist() == [18, 19, 20, 21, 22]
    assert set(range(18, 23)) <= set(kept_of(EvictKV(9, "snapkv", sinks=0, window=4), keys, query)[0])


def test_key_norm_knows_lengths_alone() -> None:
    keys = normal(1, 2, 30, 8)
    score = key_norm(views(keys, keys, [30])[0])
    assert torch.equal(key_norm(views(keys * 8, keys, [30])[0]).argsort(), score.argsort())
    keys[:, :, 11] *= 0.01
    assert key_norm(views(keys, keys, [30])[0]).argmax(-1).tolist() == [[11, 11]]


def test_random_recalls_its_share_and_differs_by_seed_head_and_layer() -> None:
    tokens, n, needle, seeds = 50, 10, 23, 400
    keys = normal(1, 2, tokens, 4)
    recalled = []
    for seed in range(seeds // 2):
        kept = kept_of(EvictKV(n, Random(seed), sinks=0, window=1), keys, keys)
        recalled += [needle in positions for positions in kept]
    share = (n - 1) / (tokens - 1)  # the newest token is kept by force
    error = math.sqrt(share * (1 - share) / seeds)
    assert abs(sum(recalled) / seeds - share) < 3 * error
    view, later = (views(keys, keys, [tokens])[0] for _ in range(2))
    later.layer = 1
    assert torch.equal(random(view, 3), random(view, 3))
    orders = [random(view, 0)[0, 0], random(view, 1)[0, 0], random(view, 0)[0, 1], random(later, 0)[0, 0]]
    for a in range(4):
        for b in range(a):
            assert abs(float(torch.corrcoef(torch.stack([orders[a], orders[b]]))[0, 1])) < 0.45  # 3 / sqrt(50)


@pytest.mark.parametrize(("tokens", "weight"), [(256, 0.921198), (1024, 0.744503)])
def test_a_planted_heavy_hitter_has_its_weight_and_is_kept_by_those_who_look(tokens: int, weight: float) -> None:
    at = tokens // 3
    keys, query = planted(tokens, at)
    seen = views(keys, query, [tokens])[0].attention(1)
    torch.testing.assert_close(seen[0, :, 0, at], torch.full((4,), weight), rtol=0, atol=1e-6)
    for by in ("h2o", "snapkv", "tova"):
        for schedule in ("uniform", "adaptive"):
            toggle = EvictKV(24, by, schedule, sinks=4, window=8)
            assert all(at in positions for positions in kept_of(toggle, keys, query)), by
    for by in ("streaming", "key_norm"):  # the one looks at age, the other sees a long key
        assert all(at not in positions for positions in kept_of(EvictKV(24, by, sinks=4, window=8), keys, query))


def test_adaptive_heads_free_real_bytes() -> None:
    keys, query = planted(200, 60, heads=2)
    query[:, 2:] = normal(1, 2, 200, 64, seed=3)  # the second head's queries look elsewhere
    keys[:, 1] = normal(1, 200, 64, seed=4) * 3
    hand = Hand(EvictKV(20, "snapkv", "adaptive", sinks=1, window=2))
    hand.feed(keys, keys.clone(), query)
    first, second = (len(positions) for positions in held(hand.layer)[0])
    assert first + second == 40 and abs(first - second) > 5
    sizes = {row["part"]: row["bytes"] for row in hand.rows()}
    assert sizes == {"keys": 40 * 64 * 4, "values": 40 * 64 * 4, "index": 40 * 4 + 2 * 4 + 8}


def test_scores_of_a_view_are_of_what_may_still_be_dropped() -> None:
    keys, query = normal(1, 2, 20, 8), normal(1, 4, 20, 8, seed=1)
    view = views(keys, query, [15, 5])[1]
    assert view.attention(5).shape == (1, 4, 5, 20) and view.attention(slice(1, 3)).shape == (1, 4, 2, 20)
    torch.testing.assert_close(view.attention(3).sum(-1), torch.ones(1, 4, 3), rtol=0, atol=1e-5)
    assert (view.first, view.since, view.fixed.tolist()) == (False, 20, [[0, 0]])


def test_attention_of_a_view_goes_through_the_soft_cap_of_the_model() -> None:
    keys, query, watcher = 3 * normal(1, 2, 12, 8), 3 * normal(1, 4, 12, 8, seed=1), Watcher()
    hand = Hand()
    hand.stages.select = watcher
    hand.step = Step(torch.arange(12)[None], torch.ones(1, 12, dtype=torch.bool), torch.tensor([12]))
    hand.layer.update(keys, keys)
    hand.layer.attend(query, torch.nn.Module(), None, 2.0)
    logits = query[0, :, -1:] @ keys[0].repeat_interleave(2, 0).transpose(1, 2) / math.sqrt(8)
    expected = (2 * (logits / 2).tanh()).softmax(-1)
    torch.testing.assert_close(watcher.views[0].attention(1)[0], expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(logits.softmax(-1), expected, atol=0.05)


# The toggle


def test_one_token_is_not_all_tokens() -> None:
    subject = subject_of("llama")
    with subject.under(EvictKV(1, "streaming", sinks=0, window=1, every=1)):
        subject.generate([[5, 6, 7, 8]], max_new_tokens=3)
        assert subject.receipts[0].fired > 0
    with pytest.warns(UserWarning, match="never fired"), subject.under(EvictKV(1.0)):
        assert not subject.stages


def test_receipts_count_tokens_and_bytes_of_all_layers() -> None:
    subject = subject_of("gemma2")
    with subject.under(EvictKV(5, "key_norm", sinks=1, window=2)):
        subject.generate([list(range(10, 30))], max_new_tokens=1)
        receipt = subject.receipts[0]
    assert receipt.notes == ["2 sliding-window or recurrent layers left alone"]
    assert receipt.fired == 1 and receipt.tokens == 15
    whole, kept = 20 * 2 * 2 * 8 * 4 + 20 * 4 + 8, 5 * 2 * 2 * 8 * 4 + 5 * 2 * 4 + 2 * 4
    assert receipt.bytes_freed == whole - kept


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0.0}, "got keep=0.0"),
        ({"keep": 1.5}, "got keep=1.5"),
        ({"keep": 0}, "got keep=0,"),
        ({"keep": -3}, "got keep=-3"),
        ({"keep": True}, "got keep=True"),
        ({"keep": math.nan}, "got keep=nan"),
        ({"by": "age"}, "got by='age', expected one of streaming"),
        ({"schedule": "flat"}, "got schedule='flat'"),
        ({"sinks": -1}, "got sinks=-1"),
        ({"window": 0}, "window=0"),
        ({"every": 0}, "every=0"),
        ({"keep": 10, "sinks": 4, "window": 8}, "4 sinks and a window of 8 are more than keep=10"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EvictKV(**settings)
