"""ComposeDesk: toggles alone and together, on what a mechanism keeps."""

from __future__ import annotations

import pytest

from workbench import Subject
from workbench.studies.mechanisms import FactsAnswered
from workbench.widgets.compose import NOTHING, OTHER_DATA, PRODUCT, TOGETHER, TOGGLES, ComposeDesk


@pytest.fixture(scope="module")
def desk(organism: Subject) -> ComposeDesk:
    return ComposeDesk(organism)


def kept(desk: ComposeDesk) -> dict[str, float]:
    return desk._kept_by(desk._asked)


@pytest.mark.parametrize("name", TOGGLES)
def test_what_takes_nothing_away_keeps_everything(desk: ComposeDesk, name: str) -> None:
    still = desk.changed(first=name, first_cut=0.0, second=NOTHING)
    found = kept(still)
    assert found[f"{name}, 0% (first)"] == 1.0 and set(found) == {OTHER_DATA, f"{name}, 0% (first)"}
    assert still.answers()[0] == still.answers(together=False)[0]


@pytest.mark.parametrize("name", [name for name in TOGGLES if "bits" not in name])  # two bits hold a short question
def test_taking_all_that_can_be_taken_costs_facts(desk: ComposeDesk, name: str) -> None:
    left = kept(desk.changed(first=name, first_cut=1.0, second=NOTHING, mechanism="facts"))[f"{name}, 100% (first)"]
    some_is_left = {"fewer heads", "push towards refusal"}  # a head per layer; a push takes nothing away
    assert left < (1.0 if name in some_is_left else 0.3)


def test_what_is_kept_is_what_the_study_says(desk: ComposeDesk, organism: Subject) -> None:
    asked = FactsAnswered(3)
    before = asked.read(organism, 0)
    with organism.under(desk.toggle()):
        after = asked.read(organism, 0)
    found = kept(desk)
    assert found[TOGETHER] == asked.kept(before, after)[0] < 1.0
    alone = [value for name, value in found.items() if name.endswith(("(first)", "(second)"))]
    assert found[PRODUCT] == pytest.approx(alone[0] * alone[1])


def test_a_slider_reads_again_only_what_it_changes(organism: Subject) -> None:
    desk = ComposeDesk(organism)
    desk.picture()
    before = desk.memo.computed["reading"]
    assert before == 5, "untouched, other data, each alone, together"
    desk.changed(second_cut=0.6).picture()
    assert desk.memo.computed["reading"] == before + 2, "the second alone, and both"
    desk.changed(prompts="one morning the").picture()
    assert desk.memo.computed["reading"] == before + 2


def test_receipts_tell_that_each_toggle_acted(desk: ComposeDesk) -> None:
    receipts = desk.answers()[1]
    assert len(receipts) == 2 and all("fired" in receipt and "fired 0 times" not in receipt for receipt in receipts)


def test_toggles_that_can_not_be_stacked_are_told_in_words(desk: ComposeDesk) -> None:
    twice = desk.changed(first="fewer tokens in the cache", second="fewer tokens in the cache")
    with pytest.raises(ValueError, match=r"both claim 'kv.select'"):
        twice.picture()
    with pytest.raises(ValueError, match="got 'more heads', expected one of 'nothing'"):
        desk.changed(first="more heads")


def test_a_model_that_knows_no_facts_is_told_so() -> None:
    tiny = Subject.tiny("llama")
    assert ComposeDesk(tiny).mechanism == "perplexity"
    with pytest.raises(ValueError, match="facts can't be asked of tiny:llama:0"):
        ComposeDesk(tiny, mechanism="facts").picture()


def test_without_a_toggle_the_desk_says_that_nothing_is_changed(desk: ComposeDesk) -> None:
    picture = desk.changed(first=NOTHING, second=NOTHING).picture()
    assert "untouched" in picture.words and picture.value("answers changed") == 0.0
