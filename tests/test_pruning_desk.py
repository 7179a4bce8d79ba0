"""PruningDesk: its plans are those of kept scores, its losses those of `losses`, its control takes as many units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from workbench import Prune, PruningScores, Subject
from workbench.methods.pruning.curves import losses
from workbench.pruned.plan import Plan
from workbench.widgets.pruning import PruningDesk


@pytest.fixture(scope="module")
def desk(organism: Subject) -> PruningDesk:
    return PruningDesk(organism)


def by_layer(desk: PruningDesk, **shares: str) -> PruningDesk:
    return desk.changed(allocation="layer by layer", **shares)


def test_plans_are_those_of_the_kept_scores(desk: PruningDesk, organism: Subject) -> None:
    texts = desk._trial().calibration
    scores: Any = PruningScores("amp_out").run(organism, texts)
    for allocation in ("global", "uniform"):
        for keep in (0.8, 0.5):
            plan = desk.changed(allocation=allocation, keep=keep).plan()
            assert plan == scores.plan(keep=keep, allocation=allocation)
    assert by_layer(desk, neurons="1, 0.5, 1, 1, 1, 0.25").plan() == scores.plan(
        allocation={1: 0.5, 5: 0.75}, of="neurons"
    )


def test_losses_and_facts_are_those_that_the_library_finds(desk: PruningDesk, organism: Subject) -> None:
    trial = desk._trial()
    trial = type(trial)(trial.calibration, trial.held_out, {"facts": desk._items()})
    found = losses(organism, [desk.toggle(), desk.toggle("random units")], trial)
    table, picture = found.table(["pruned", "random units"], trial), desk.picture()
    for arm in ("pruned", "random units"):
        assert picture.value(f"loss added, {arm}") == pytest.approx(table.loc[arm].iloc[0], rel=1e-12)  # same sums
        assert picture.value(f"facts recalled, {arm}") == table.loc[arm, "facts"]


def test_keeping_everything_changes_nothing(desk: PruningDesk) -> None:
    for whole in (desk.changed(keep=1.0), by_layer(desk)):
        picture = whole.picture()
        assert picture.value("parameters kept") == 1
        assert picture.value("loss added, pruned") == picture.value("loss added, random units") == 0
        assert "Everything is kept" in picture.words


def test_the_control_takes_as_many_units_of_each_layer_and_others(desk: PruningDesk) -> None:
    for one in (desk, desk.changed(allocation="uniform"), by_layer(desk, heads="1, 0.5, 1, 1, 1, 1")):
        ours, chance = one.plan(), one.plan("random units")
        for family in ("heads", "kv_heads", "neurons"):
            counts = [[plan.kept(layer, family) for layer in range(6)] for plan in (ours, chance)]
            assert counts[0] == counts[1], family
    assert desk.plan() != desk.plan("random units") != desk.changed(seed=1).plan("random units")


def test_a_score_loses_less_than_chance(desk: PruningDesk) -> None:
    picture = desk.picture()
    assert picture.value("loss added, pruned") < picture.value("loss added, random units")
    assert picture.value("facts recalled, untouched") > 0.9


def test_sliders_move_one_layer_and_zero_switches_a_part_off(desk: PruningDesk) -> None:
    plan = by_layer(desk, heads="1, 0, 1, 1, 1, 0.1", neurons="1, 1, 0, 0.01, 1, 1").plan()
    shape = plan.shape
    assert [plan.kept(layer, "kv_heads") for layer in range(6)] == [2, 0, 2, 2, 2, 1], (
        "at least one unless switched off"
    )
    assert [plan.kept(layer, "neurons") for layer in range(6)] == [
        shape.d_mlp,
        shape.d_mlp,
        0,
        8,
        shape.d_mlp,
        shape.d_mlp,
    ]


def test_a_mask_and_a_slice_lose_the_same(desk: PruningDesk) -> None:
    one = by_layer(desk, heads="1, 0.5, 1, 1, 1, 1", neurons="1, 1, 0, 0.4, 1, 1")
    sliced, masked = one._judged("pruned"), one.changed(form="mask")._judged("pruned")
    assert np.allclose(sliced.nll, masked.nll, atol=1e-4)  # float32: sums in another order
    assert one.toggle() == Prune(one.plan()) and one.changed(form="mask").toggle() == Prune(one.plan(), "mask")


def test_scores_and_the_untouched_model_are_read_once(organism: Subject) -> None:
    desk = PruningDesk(organism)
    desk.picture()
    computed = desk.memo.computed
    assert (computed["scores"], computed["base"], computed["judged"]) == (1, 1, 2)
    desk.changed(keep=0.5).picture()
    assert (computed["scores"], computed["base"], computed["judged"]) == (1, 1, 4)
    desk.changed(keep=0.5, seed=1).picture()
    assert computed["judged"] == 5, "another seed changes the control alone"
    for view in ("loss by text", "scores"):
        desk.changed(keep=0.5, view=view).picture()
    assert (computed["scores"], computed["base"], computed["judged"]) == (1, 1, 5)
    desk.changed(criterion="magnitude").picture()
    assert (computed["scores"], computed["base"]) == (2, 1)


def test_time_is_taken_when_asked_for_and_kept(organism: Subject, desk: PruningDesk) -> None:
    assert not any("new token" in fact.measure for fact in desk.picture().facts)
    clocked = desk.changed(measure=True)
    facts = {fact.measure: fact for fact in clocked.picture().facts}
    for form in ("dense", "masked", "sliced"):
        fact = facts[f"per new token, {form} (quartiles)"]
        assert fact.unit == "ms" and fact.value > 0 and fact.low is not None
    clocked.picture()
    assert desk.memo.computed["timed"] == 1
    with pytest.raises(ValueError, match="a mask saves nothing"):
        clocked.changed(form="mask").picture()


def test_the_code_names_a_plan_that_gives_the_same(desk: PruningDesk, organism: Subject) -> None:
    for one in (desk, by_layer(desk, heads="1, 0.5, 1, 1, 1, 0", neurons="1, 0.5, 1, 1, 1, 1"), by_layer(desk)):
        line = one.picture().code.splitlines()[1]
        named = {"scores": one.scores(), "Plan": Plan, "subject": organism}
        assert eval(line.removeprefix("plan = "), named) == one.plan()


def test_one_layer_of_heads_is_not_like_another(desk: PruningDesk) -> None:
    lost = [
        by_layer(desk, heads=", ".join("0" if n == layer else "1" for n in range(6)))
        .picture()
        .value("loss added, pruned")
        for layer in (0, 5)
    ]
    assert lost[0] > 2 * lost[1], "without the first layer's attention nothing else works"


def test_texts_of_the_readers_own_judge(desk: PruningDesk) -> None:
    own = desk.changed(texts="one morning the sailor\n\nthe code is alpha beta gamma delta .", view="loss by text")
    figure: Any = own.picture().figure
    assert list(figure.data[0].x) == ["text 1", "text 2"]


def test_what_can_not_be_shown_is_said_in_words(desk: PruningDesk) -> None:
    for settings, words in (
        ({"keep": 0.1}, "at most .* can leave: each layer keeps one key/value head"),
        ({"texts": "flibbertigibbet or not"}, "'flibbertigibbet' is not in this model's vocabulary"),
        ({"allocation": "layer by layer", "view": "all budgets"}, "Set allocation to global or uniform"),
        ({"allocation": "layer by layer", "heads": "0, 0, 0, 0, 0, 0"}, "no block would attend any more"),
        ({"allocation": "layer by layer", "heads": "1, 1"}, "expected 6 numbers from 0"),
    ):
        with pytest.raises(ValueError, match=words):
            desk.changed(**settings).picture()


def test_a_model_without_neurons_pays_with_heads() -> None:
    desk = PruningDesk(Subject.tiny("mixtral"))
    picture = desk.picture()
    assert desk.plan().kept(0, "kv_heads") < desk.plan().total("kv_heads") or desk.plan().kept(1, "kv_heads") == 1
    assert "no neurons" in picture.words
    shown = {control.name for control in desk.changed(allocation="layer by layer").controls() if control.shown}
    assert "heads" in shown and "neurons" not in shown
