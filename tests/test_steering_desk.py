"""SteeringDesk: what it pushes and how far, its control, numbers as the library gives them, what is not asked twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workbench import Direction, Site, Steer, Subject, difference_in_means, steering_map
from workbench.corpora import requests
from workbench.methods.steering.side_effects import mean_residual_norm
from workbench.methods.steering.target import last_logprobs
from workbench.strength import mean_kl
from workbench.widgets import material
from workbench.widgets.steering import ARMS, STRENGTHS, SteeringDesk


@pytest.fixture(scope="module")
def desk(organism: Subject) -> SteeringDesk:
    return SteeringDesk(organism)


def test_the_push_is_a_difference_of_means_as_long_as_so_many_mean_residual_norms(
    desk: SteeringDesk, organism: Subject
) -> None:
    items = requests.items("train")
    groups = [[item.prompt for item in items if item.form == form][:48] for form in ("harmful", "harmless")]
    wanted = difference_in_means(organism, groups[0], groups[1], Site(3, "resid_out"))
    for layer, strength in ((3, 0.5), (1, -1.0)):
        push: Any = desk.changed(layer=layer, strength=strength).toggle()
        assert torch.equal(push.direction.vector, wanted.vector) and push.at == Site(layer, "resid_out")
        unit = float(mean_residual_norm(organism, material.texts(organism), (push.at,))[0])
        assert push.strength * push.direction.norm == pytest.approx(strength * unit)


def test_the_control_is_as_long_and_points_elsewhere(desk: SteeringDesk) -> None:
    other: Any = desk.changed(seed=1).toggle("random direction")
    push: Any = desk.toggle()
    chance: Any = desk.toggle("random direction")
    assert chance.strength * chance.direction.norm == pytest.approx(push.strength * push.direction.norm)
    assert (chance.at, chance.positions) == (push.at, push.positions) and chance.direction != other.direction
    cosine = push.direction.vector @ chance.direction.vector / (push.direction.norm * chance.direction.norm)
    assert abs(float(cosine)) < 0.4  # of 128 dimensions: 4.5 standard errors


def test_answers_and_numbers_are_those_of_the_toggle_by_hand(desk: SteeringDesk, organism: Subject) -> None:
    one = desk.changed(strength=1.0)
    prompts, picture = one.prompts.splitlines(), one.picture()
    plain = last_logprobs(organism, prompts).double()
    with organism.under(one.toggle()):
        written, pushed = organism.generate(prompts, max_new_tokens=10), last_logprobs(organism, prompts).double()
    assert one.answers().texts == written.texts and not organism.active
    assert picture.value("next token moved, pushed") == pytest.approx(mean_kl(plain, pushed), rel=1e-4)  # float32
    assert picture.value("next token moved, pushed") > 2 * picture.value("next token moved, random direction")
    assert [pane.title for pane in picture.panes] == list(ARMS)


def test_a_push_of_nothing_changes_nothing(desk: SteeringDesk) -> None:
    picture = desk.changed(strength=0.0).picture()
    assert len({pane.lines for pane in picture.panes}) == 1 and "nothing is pushed" in picture.words
    for arm in ARMS[1:]:
        assert picture.value(f"next token moved, {arm}") == picture.value(f"other texts moved, {arm}") == 0.0


def test_the_map_is_the_probes(desk: SteeringDesk, organism: Subject) -> None:
    contrast = material.contrasts()["refusal"]()
    found: Any = desk.changed(view="layer by strength")._mapped()
    direction = difference_in_means(organism, *contrast, Site(3, "resid_out"), name="refusal")
    again: Any = steering_map(
        organism, direction, strengths=STRENGTHS, prompts=desk.prompts.splitlines(), texts=material.texts(organism),
        target=desk._target(), positions="prompt", n_controls=3, n_written=0, kind="resid_out",
    )  # fmt: skip
    assert found.table().equals(again.table())


def test_a_slider_asks_the_model_again_only_for_what_it_changes(organism: Subject) -> None:
    desk = SteeringDesk(organism)
    desk.picture()
    computed = desk.memo.computed
    assert (computed["direction"], computed["answers"], computed["kl"], computed["norm"]) == (1, 3, 3, 1)
    desk.changed(seed=1).picture()
    assert (computed["answers"], computed["kl"]) == (4, 4), "another seed changes the control alone"
    desk.changed(shown_prompt=2).picture()
    assert (computed["direction"], computed["answers"], computed["kl"], computed["norm"]) == (1, 4, 4, 1)


def test_a_direction_of_the_callers_own_is_pushed_where_it_was_found(organism: Subject) -> None:
    own = Direction(torch.ones(organism.anatomy.d_model), Site(2, "mlp_out"), None, "mine")
    desk = SteeringDesk(organism, direction="mine", directions={"mine": own}, layer=4)
    assert isinstance(desk.toggle(), Steer) and desk.toggle().at == Site(4, "mlp_out")
    with pytest.raises(ValueError, match=r"what the push is for\. Set `target`"):
        desk.changed(view="side effects").picture()


def test_where_prompts_go_the_last_that_is_left_is_shown(desk: SteeringDesk) -> None:
    third = desk.changed(shown_prompt=3)
    assert third.changed(prompts="one morning the sailor\n\none morning the fisherman").shown_prompt == 2
    assert third.changed(prompts="").shown_prompt == 3, "three that the desk itself has"


def test_what_can_not_be_shown_is_said_in_words(desk: SteeringDesk) -> None:
    for settings, words in (
        ({"layer": 6}, "layer: got 6, expected a number from 0 to 5"),
        ({"shown_prompt": 4}, "shown_prompt: got 4, expected a number from 1 to 3"),
        ({"positions": "first"}, "expected one of 'all', 'prompt'"),
        ({"prompts": "one qwertz"}, "not in this model's vocabulary"),
        ({"view": "side effects", "positions": "generated"}, "nothing is generated yet"),
    ):
        with pytest.raises(ValueError, match=words):
            desk.changed(**settings).picture()
