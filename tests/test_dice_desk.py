"""DiceDesk: an edit of nothing, throws taken apart, shares that are the probe's, and what is not written again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from workbench import Counterfactual, Edit, Subject
from workbench.dice import Dice
from workbench.methods.counterfactual.agreement import END, equal_share, independent_agreement
from workbench.methods.counterfactual.throws import kept_share, throws
from workbench.toggle import Composed
from workbench.widgets.controls import Number
from workbench.widgets.dice import ARMS, BEFORE, FRESH, LUCK, N_TEXTS, SAME, DiceDesk


@pytest.fixture(scope="module")
def desk(organism: Subject) -> DiceDesk:
    return DiceDesk(organism)


@pytest.fixture(scope="module")
def push(desk: DiceDesk) -> DiceDesk:
    return desk.changed(edit="push", strength=1.0)


def test_an_edit_that_changes_nothing_keeps_every_text_and_fresh_dice_do_not(desk: DiceDesk) -> None:
    for still in (desk.changed(edited=desk.prompt), desk.changed(edit="push", strength=0.0)):
        shares = still.shares()
        assert shares[SAME] == (1.0, 1.0, 1.0) and shares[FRESH][2] < 0.7 and shares[LUCK][2] < 0.7
        assert "changes nothing" in still.picture().words
        assert still.toggle() == Composed()


def test_without_dice_fresh_ones_are_the_same(desk: DiceDesk) -> None:
    cold = desk.changed(temperature=0.0)
    texts, shares = cold.texts(), cold.shares()
    assert texts[SAME] == texts[FRESH] and shares[SAME] == shares[FRESH] and shares[LUCK][0] == 1.0
    assert "no dice" in cold.picture().words and "without dice" in cold.picture().figure.layout.title.text


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_chosen_token_has_the_largest_product_at_every_place(desk: DiceDesk, temperature: float) -> None:
    for one in (desk, desk.changed(edit="push", strength=1.0)):
        for throw in one.changed(temperature=temperature).throws():
            for text, products in enumerate(throw.products()):
                if throw.chosen[text] == END:
                    assert np.isnan(products).all()
                    continue
                # the texts were written one token at a time, here they are read whole: logits differ by rounding
                assert products[throw.ids == throw.chosen[text]] == pytest.approx(1.0, abs=1e-4)


def test_no_token_gives_way_to_one_that_the_edit_made_less_likely_in_comparison(desk: DiceDesk, push: DiceDesk) -> None:
    moved = 0
    for one in (desk, push, desk.changed(seed=2), push.changed(seed=2)):
        for throw in one.throws():
            old, new = (int(token) for token in throw.chosen[:2])
            if END not in (old, new) and old != new:
                gain = [throw.log_prob(1, token) - throw.log_prob(0, token) for token in (old, new)]
                assert gain[1] > gain[0] - 1e-4  # rounding, as above
                moved += 1
    assert moved > 3


def test_the_first_two_texts_have_the_same_luck_and_the_third_another(desk: DiceDesk) -> None:
    for throw in desk.throws():
        before, same, fresh = throw.luck
        assert (before == same).all() and not np.isclose(before, fresh).any()


def test_a_throw_is_told_as_it_was_planted() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    dice, rows, first = Dice(seed=4), (0, 0, 1), 9
    position = torch.tensor([first])
    ids = [tuple(dice.choose(x.log()[None], [row], position).tolist()) for x, row in zip((p, q, q), rows, strict=True)]
    (throw,) = throws([x.log()[None] for x in (p, q, q)], ids, dice, rows, first)
    assert [(int(token),) for token in throw.chosen] == ids and sorted(throw.ids) == [0, 1, 2]
    for token in range(3):
        assert [throw.log_prob(text, token) for text in range(3)] == pytest.approx(
            [float(x[token].log()) for x in (p, q, q)],
            abs=1e-6,  # float32 distributions
        )
    same, fresh, largest = throw.expected
    assert fresh == pytest.approx(independent_agreement(p.double().numpy(), q.double().numpy()), abs=1e-6)
    assert largest == pytest.approx(0.4, abs=1e-6) and fresh < same <= largest


def test_a_text_that_is_over_has_no_numbers() -> None:
    even = torch.zeros(2, 3).log_softmax(-1)
    one, two = throws([even, even[:1], even], [(0, 1), (2,), (1, 1)], Dice(temperature=0.0), (0, 0, 1), 0)
    assert two.chosen.tolist() == [1, END, 1] and np.isnan(two.products()[1]).all() and np.isnan(two.expected).all()
    assert not np.isnan(one.products()).any() and one.expected == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="got sampler 'rank', 1 predictions, 1 texts and 1 rows"):
        throws([even], [(0, 1)], Dice(sampler="rank"), [0], 0)


def test_the_share_kept_counts_tokens_that_stay_where_they_were() -> None:
    assert kept_share([(1, 2, 3, 4)], [(1, 2, 4, 3)])[0] == 0.5
    assert kept_share([(1, 2)], [(1, 2, 3, 4)])[0] == 0.5, "what only one of them has did not stay"
    mean, low, high = kept_share([(1,), (1,), (1,), (1,)], [(1,), (2,), (1,), (1,)])
    assert mean == 0.75 and low < mean < high


def test_texts_and_shares_are_those_of_the_probe(desk: DiceDesk, organism: Subject) -> None:
    probe = Counterfactual(("full",), (1.0,), N_TEXTS, desk.new_tokens, noise_follows="distance", seed=desk.seed)
    result: Any = probe.run(organism, [Edit(desk.prompt, desk.edited)])
    for arm, ids in zip(ARMS, (result.factual, result.counterfactual, result.interventional), strict=True):
        assert [tuple(int(token) for token in row if token != END) for row in ids] == list(desk.texts(N_TEXTS)[arm])
    shares = equal_share(result.factual, result.counterfactual)
    assert desk.shares()[SAME][0] == pytest.approx(shares.mean(), abs=1e-12)
    assert desk.throws()[0].expected == pytest.approx(tuple(result.expected[0]), abs=1e-5)  # float32 logits


def test_a_push_is_written_under_the_toggle_with_the_same_dice(push: DiceDesk, organism: Subject) -> None:
    start = [len(organism.tokenize([push.prompt]).ids[0])]
    with organism.under(push.toggle()):
        options = {"max_new_tokens": push.new_tokens, "dice": push.dice, "rows": [0], "throws_from": start}
        pushed = organism.generate([push.prompt], **options).ids
    assert pushed == push.texts()[SAME] != push.texts()[BEFORE]
    assert push.texts()[BEFORE] == push.changed(edit="words").texts()[BEFORE] and not organism.active


def test_where_the_edit_is_longer_each_token_takes_the_throw_at_its_distance(desk: DiceDesk, organism: Subject) -> None:
    longer = desk.changed(edited=desk.prompt + " dived alone")
    start = len(organism.tokenize([desk.prompt]).ids[0])
    options = {"max_new_tokens": desk.new_tokens, "dice": desk.dice, "rows": [0], "throws_from": [start]}
    assert organism.generate([longer.edited], **options).ids == longer.texts()[SAME]


def test_the_strip_strikes_what_did_not_stay_and_says_why(desk: DiceDesk) -> None:
    strip = desk.picture().strip
    assert strip is not None and [row.label for row in strip.rows] == [BEFORE, SAME, BEFORE, FRESH]
    before, same, fresh = (texts[0] for texts in desk.texts().values())
    for row, after in ((strip.rows[0], same), (strip.rows[2], fresh)):
        assert row.kept == (True, *(a == b for a, b in zip(before, after, strict=True)))
        assert all(("replaced by" in note) != kept for note, kept in zip(row.notes[1:], row.kept[1:], strict=True))
    assert len(strip.rows[1].tokens) == 1 + len(same) and strip.rows[1].tokens[0] == desk.edited


def test_a_token_of_the_strip_is_the_place_of_the_figure(desk: DiceDesk) -> None:
    assert desk.picture().picks == "place"
    third: Any = desk.changed(place=3).picture()
    assert third.figure.layout.title.text.startswith("Token 3") and third.strip is not None
    word = third.strip.rows[0].tokens[3]
    assert any(str(label).startswith(f"{word}<br>") for label in third.figure.data[0].x)


def test_every_token_that_can_be_written_can_be_taken_apart(desk: DiceDesk) -> None:
    most = next(
        control.high for control in desk.controls() if isinstance(control, Number) and control.name == "new_tokens"
    )
    assert desk.changed(new_tokens=most).changed(place=most).place == most


def test_a_slider_writes_again_only_what_it_changes(organism: Subject) -> None:
    desk = DiceDesk(organism, edit="push")
    desk.picture()
    for moved in (desk.changed(strength=0.7), desk.changed(layer=1), desk.changed(place=2)):
        moved.picture()
    assert (desk.memo.computed["before"], desk.memo.computed["after"], desk.memo.computed["direction"]) == (1, 3, 1)
    desk.changed(seed=5).picture()
    assert (desk.memo.computed["before"], desk.memo.computed["after"]) == (2, 4)


def test_what_cannot_be_shown_is_said_in_words(desk: DiceDesk) -> None:
    for settings, words in (
        ({"place": 32}, "ends after 12 tokens"),
        ({"edited": "  "}, "edited: got '  ', expected some words"),
        ({"prompt": "one qwertz"}, "not in this model's vocabulary"),
        ({"prompt": "one morning the sailor " * 400}, "context is 512"),
        ({"temperature": 2.5}, "expected a number from 0.0 to 2.0"),
        ({"edit": "pull"}, "expected one of 'words', 'push'"),
    ):
        with pytest.raises(ValueError, match=words):
            desk.changed(**settings).picture()
