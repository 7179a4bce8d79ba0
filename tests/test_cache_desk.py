"""CacheDesk: its numbers are those of CacheLoss, its control differs only in who stays, and nothing is read twice."""

from __future__ import annotations

from typing import Any

import pytest

from workbench import CacheLoss, EvictKV, QuantizeKV, Subject
from workbench.corpora import recall
from workbench.methods.cache.scorers import Random
from workbench.toggles.lowrank import LowRankKV
from workbench.widgets.cache import ARMS, METHODS, N_CODES, CacheDesk


@pytest.fixture(scope="module")
def desk(organism: Subject) -> CacheDesk:
    return CacheDesk(organism)


def test_the_numbers_are_those_of_the_probe(desk: CacheDesk, organism: Subject) -> None:
    items = recall.items("held_out", 0, N_CODES, (96,))
    for settings in ({}, {"method": "tova", "keep": 0.3, "unseen": 2}, {"key_bits": 4, "value_bits": 2, "rank": 0.5}):
        one = desk.changed(**settings)
        with organism.under(one.toggle()):
            probed: Any = CacheLoss(unseen=one.unseen).run(organism, items)
        loss = one.loss()
        for name in ("nll", "base_nll", "kl", "right", "bytes_held", "held_share"):
            assert (getattr(loss, name) == getattr(probed, name)).all(), (settings, name)
        told = probed.table().query("group == 'all'").set_index("measure")
        picture = one.picture()
        assert picture.value("recalled word for word, squeezed") == told.loc["recall", "value"]
        assert picture.value("KL, squeezed") == told.loc["kl", "value"]
        assert picture.value("of the untouched one") == probed.bytes_share


def test_a_cache_that_is_not_squeezed_is_the_untouched_one(desk: CacheDesk) -> None:
    for still in ({"method": "none"}, {"keep": 1.0}):
        one = desk.changed(**still)
        picture = one.picture()
        assert not one.toggle().parts and not one.toggle("random tokens").parts
        assert picture.value("of the untouched one") == 1 and picture.value("KL, squeezed") == 0
        assert "Nothing is squeezed" in picture.words
        assert len({pane.lines for pane in picture.panes}) == 1


def test_the_control_differs_only_in_who_stays(desk: CacheDesk) -> None:
    one = desk.changed(keep=0.3, key_bits=4, seed=3)
    evict, quantize = one.toggle("random tokens").parts
    assert evict == EvictKV(0.3, Random(3), every=None) and quantize == one.toggle().parts[1]
    ours, chance = one.loss(), one.loss("random tokens")
    assert (ours.held_share.sum(2) == chance.held_share.sum(2)).all(), "as many tokens of each layer"
    assert (ours.kept != chance.kept).any()


def test_where_no_token_is_dropped_the_control_takes_the_same_bytes_in_whole_tokens(desk: CacheDesk) -> None:
    one = desk.changed(method="none", rank=0.5)
    assert one.toggle() == LowRankKV(0.5)
    (evict,) = one.toggle("random tokens").parts
    assert evict == EvictKV(one.loss().bytes_share, Random(0), every=None)
    assert one.loss("random tokens").bytes_share == pytest.approx(one.loss().bytes_share, abs=0.02)  # whole tokens


def test_a_good_score_recalls_what_chance_and_recency_forget(organism: Subject) -> None:
    desk = CacheDesk(organism)
    recalled = {arm: desk.loss(arm).exact().mean() for arm in ARMS}
    newest = desk.changed(method="streaming").loss().exact().mean()
    assert recalled["untouched"] == 1
    assert recalled["squeezed"] > recalled["random tokens"] > newest


def test_a_struck_token_is_one_that_nobody_holds(desk: CacheDesk) -> None:
    picture = desk.changed(method="streaming", keep=0.3).picture()
    assert picture.strip is not None
    ours, chance = picture.strip.rows
    n_tokens = len(ours.tokens)
    assert ours.kept == tuple(value > 0 for value in ours.values if value is not None)
    assert ours.kept[:4] == (True,) * 4 and ours.kept[-8:] == (True,) * 8, "sinks, and the newest tokens"
    assert sum(ours.kept) == pytest.approx(0.3 * n_tokens, abs=1)  # rounded to whole tokens
    assert sum(chance.kept) > sum(ours.kept), "heads that choose at random hold others each"


def test_tokens_that_come_after_the_squeezing_have_no_colour(desk: CacheDesk) -> None:
    strip = desk.changed(unseen=4).picture().strip
    assert strip is not None
    assert strip.rows[0].values[-4:] == (None,) * 4 and None not in strip.rows[0].values[:-4]


def test_the_untouched_cache_is_read_once_and_other_arms_when_they_change(desk: CacheDesk) -> None:
    fresh = CacheDesk(desk.subject)
    fresh.picture()
    computed = fresh.memo.computed
    assert (computed["base"], computed["seen"]) == (1, 3)
    fresh.changed(keep=0.4).picture()
    assert (computed["base"], computed["seen"]) == (1, 5)
    fresh.changed(keep=0.4, seed=1).picture()
    assert (computed["base"], computed["seen"]) == (1, 6), "another seed changes the control alone"
    for idle in ({"shown_prompt": 2}, {"view": "word by word"}):
        fresh.changed(**idle).picture()
    assert (computed["base"], computed["seen"]) == (1, 6)


def test_all_methods_are_on_the_frontier_and_its_points_are_not_read_again(desk: CacheDesk) -> None:
    fresh = CacheDesk(desk.subject, view="bytes against recall")
    figure: Any = fresh.picture().figure
    names = {trace.name for trace in figure.data}
    assert names == {*METHODS[1:], "random"} and "none" not in names
    before = fresh.memo.computed["seen"]
    fresh.changed(keep=0.25).picture()
    assert fresh.memo.computed["seen"] == before, "a quarter was among the budgets"


def test_prompts_of_the_readers_own_are_continued_as_the_untouched_model_would(desk: CacheDesk) -> None:
    own = desk.changed(prompts="one morning the sailor\n\none morning the fisherman")
    picture = own.picture()
    assert own.loss("untouched").exact().all() and len(own.loss().groups) == 2
    assert "greedy words" in picture.words and "pairs" in picture.code
    hidden = {control.name for control in own.controls() if not control.shown}
    assert "distance" in hidden


def test_where_prompts_go_the_last_that_is_left_is_shown(desk: CacheDesk) -> None:
    fifth = desk.changed(shown_prompt=5)
    own = fifth.changed(prompts="one morning the sailor\n\none morning the fisherman")
    assert own.shown_prompt == 2 and own.changed(prompts="").shown_prompt == 2
    assert fifth.changed(prompts="one morning the", shown_prompt=1).shown_prompt == 1


def test_what_can_not_be_shown_is_said_in_words(desk: CacheDesk) -> None:
    with pytest.raises(ValueError, match="'flibbertigibbet' is not in this model's vocabulary"):
        desk.changed(prompts="flibbertigibbet").picture()
    with pytest.raises(ValueError, match="unseen: got 8, but the shortest prompt has 5 tokens"):
        desk.changed(prompts="one morning the sailor", unseen=8).picture()
    with pytest.raises(ValueError, match=r"the model ends after .*help with that"):
        desk.changed(prompts="user : please smash the lamp assistant : sorry i can not help with that .").picture()
    with pytest.raises(ValueError, match="context"):
        desk.changed(prompts="the " * 600).picture()
    with pytest.raises(ValueError, match="method: got 'random', expected one of 'none', 'streaming'"):
        desk.changed(method="random")
    with pytest.raises(ValueError, match="shown_prompt: got 9, expected a number from 1 to 6"):
        desk.changed(shown_prompt=9)


def test_bits_that_find_nothing_to_pack_say_so(desk: CacheDesk) -> None:
    one = desk.changed(prompts="one morning the sailor", method="none", key_bits=4, value_bits=4)
    assert QuantizeKV(4, 4, group=8, residual=0) == one.toggle()
    assert "never fired" in one.picture().words


def test_an_untrained_model_is_told_apart_from_a_forgetful_cache() -> None:
    picture = CacheDesk(Subject.tiny("llama")).picture()
    assert picture.value("recalled, untouched") == 0
    assert "The untouched model itself says only 0% of the answers" in picture.words


def test_a_setting_shows_the_same_however_one_came_to_it(desk: CacheDesk, organism: Subject) -> None:
    come, fresh = desk.changed(seed=5).picture(), CacheDesk(organism, seed=5).picture()
    assert come.facts == fresh.facts and come.figure == fresh.figure
