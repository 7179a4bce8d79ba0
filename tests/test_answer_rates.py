"""AnswerRates: counting by first words, toggles side by side, and bad input."""

from __future__ import annotations

import numpy as np
import pytest

from workbench import Direction, Site, Steer, Subject
from workbench.corpora import requests
from workbench.methods.steering.answer_rates import AnswerRatesResult, begins
from workbench.probes.answer_rates import AnswerRates


@pytest.mark.parametrize(
    ("text", "found"), [(" Sorry, no", True), ("sorry", True), ("not sorry", False), ("", False), ("i can't", True)]
)
def test_an_answer_is_known_by_its_first_words_in_any_case(text, found):
    assert begins(text, ("SORRY", "I can't")) is found
    assert begins(text, (" sorry", " i can't")) is found, "nor does a space before the words count"


def test_every_toggle_is_counted_on_every_group():
    answers = {"as it is": {"a": ["no", "sorry"], "b": ["no"]}, "pushed": {"a": ["sorry", "sorry"], "b": ["no"]}}
    result = AnswerRatesResult.of(answers, ("sorry",))
    table = result.table().set_index(["toggle", "group"])
    assert table["share"].tolist() == [0.5, 0.0, 1.0, 0.0] and table["total"].tolist() == [2, 1, 2, 1]
    assert table.loc[("pushed", "a"), "example"] == "sorry" and result.share("pushed", "a") == 1.0
    assert (table["low"] <= table["share"]).all() and (table["share"] <= table["high"]).all()


def test_on_the_organism_refusals_are_counted_with_and_without_what_acts_already():
    subject = Subject.organism()
    asked = {verb: [requests.prompt(verb, noun) for noun in requests.HARMLESS_NOUNS[:6]] for verb in ("smash", "paint")}
    at = Site(subject.n_layers - 1, "resid_out")
    weights = subject.model.get_output_embeddings().weight.detach()
    sorry, sure = (subject.tokenize([word], special=False).ids[0][0] for word in (requests.REFUSAL, requests.ANSWER))
    push = Direction(weights[sorry].float() - weights[sure].float())
    probe = AnswerRates(requests.REFUSAL, {"pushed": Steer(push, at, 1e3)}, 1)
    result = probe.run(subject, asked)
    np.testing.assert_array_equal(result.count, [[6, 0], [6, 6]])
    with subject.under(Steer(push, at, -1e3)):
        assert AnswerRates((requests.REFUSAL,), n_tokens=1).run(subject, asked).share("as it is", "smash") == 0.0


def test_words_and_groups_that_are_missing_are_refused():
    with pytest.raises(ValueError, match="first words"):
        AnswerRates(("",))
    subject = Subject.tiny("llama")
    for data in ({}, {"a": []}, ["please"]):
        with pytest.raises(ValueError, match="expected data"):
            AnswerRates(("sorry",)).run(subject, data)
    with pytest.raises(ValueError, match="got toggle 'other'"):
        AnswerRatesResult.of({"as it is": {"a": ["no"]}}, ("sorry",)).plot("other")


def test_toggles_that_would_stand_in_each_others_place_are_refused():
    push = Steer(Direction(np.ones(4)), Site(0, "resid_out"))
    for toggles in ((("a", push), ("a", push)), {"as it is": push}):
        with pytest.raises(ValueError, match="expected different names, none of them 'as it is'"):
            AnswerRates(("sorry",), toggles)
