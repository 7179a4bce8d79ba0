"""Strengths by KL: the bracket, the search, the closest kept, targets out of reach, each sign apart, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from workbench import Site, Steer, Subject
from workbench import strength as module
from workbench.strength import log_probs_at, mean_kl, strength_for_kl

PROMPTS = ("long ago a", "one morning the")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny("llama")


@pytest.fixture(scope="module")
def make(subject: Subject) -> Any:
    vector = torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(3))
    return lambda s: Steer(vector, Site(1, "resid_out"), s)


def curve(monkeypatch: pytest.MonkeyPatch, subject: Subject, kl: Any) -> tuple[list[float], Any]:
    """Replace the model's answer by `kl(strength)`: (the strengths that are asked for, the maker of toggles)."""
    asked: list[float] = []
    vector = torch.ones(subject.anatomy.d_model)

    def make(strength: float) -> Steer:
        asked.append(strength)
        return Steer(vector, Site(0, "resid_out"), strength)

    monkeypatch.setattr(module, "mean_kl", lambda *_: kl(asked[-1]))
    monkeypatch.setattr(module, "log_probs_at", lambda *_: torch.zeros(1, 1, 1))
    return asked, make


@pytest.mark.filterwarnings("ignore:.*never")
@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_the_square_law_is_met_from_any_start(monkeypatch, subject, start):
    asked, make = curve(monkeypatch, subject, lambda s: 0.3 * s * s)
    found = strength_for_kl(subject, make, PROMPTS, 0.5, start=start, tolerance=0.01)
    assert found.reached and found.strength == pytest.approx(math.sqrt(0.5 / 0.3), rel=0.006)  # half of 1 % in s
    assert found.n_evaluations == len(asked) <= 20


@pytest.mark.filterwarnings("ignore:.*never")
def test_a_target_beyond_a_plateau_is_said_to_be_out_of_reach(monkeypatch, subject):
    _, make = curve(monkeypatch, subject, lambda s: 0.2 * (1 - math.exp(-s)))
    found = strength_for_kl(subject, make, PROMPTS, 0.5, limit=100.0)
    assert not found.reached and "out of reach" in found.note and found.kl == pytest.approx(0.2, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*never")
@pytest.mark.parametrize(("law", "words"), [(1e-9, "up to strength"), (1e9, "even at strength")])
def test_what_was_not_looked_for_far_enough_is_not_said_to_be_out_of_reach(monkeypatch, subject, law, words):
    _, make = curve(monkeypatch, subject, lambda s: law * s * s)
    found = strength_for_kl(subject, make, PROMPTS, 0.5, max_evaluations=2)
    assert not found.reached and found.note.startswith("not found in 2 evaluations") and words in found.note


@pytest.mark.filterwarnings("ignore:.*never")
def test_a_target_that_the_smallest_push_exceeds_is_said_to_be_out_of_reach(monkeypatch, subject):
    _, make = curve(monkeypatch, subject, lambda s: 0.7)
    found = strength_for_kl(subject, make, PROMPTS, 0.5, max_evaluations=60)
    assert not found.reached and found.note.startswith("out of reach: even at strength")


@pytest.mark.filterwarnings("ignore:.*never")
def test_across_a_jump_the_closest_strength_is_kept_and_the_miss_is_said(monkeypatch, subject):
    asked, make = curve(monkeypatch, subject, lambda s: 0.1 if s < 3 else 0.7)
    found = strength_for_kl(subject, make, PROMPTS, 0.5, max_evaluations=14)
    assert not found.reached and found.kl == 0.7 and len(asked) == 14 and "jumps" in found.note


@pytest.mark.filterwarnings("ignore:.*never")
def test_each_sign_has_a_strength_of_its_own(monkeypatch, subject):
    _, make = curve(monkeypatch, subject, lambda s: s * s if s > 0 else 4 * s * s)
    plus, minus = (strength_for_kl(subject, make, PROMPTS, 1.0, sign=sign, tolerance=0.01) for sign in (1, -1))
    assert plus.strength == pytest.approx(1.0, rel=0.01) and minus.strength == pytest.approx(-0.5, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*never")
def test_an_overflow_counts_as_too_strong(monkeypatch, subject):
    _, make = curve(monkeypatch, subject, lambda s: s * s if s < 10 else math.nan)
    assert strength_for_kl(subject, make, PROMPTS, 4.0, start=1000.0).reached


def test_on_a_model_the_kl_found_is_the_kl_there(subject, make):
    plain = log_probs_at(subject, PROMPTS)
    for sign in (1, -1):
        found = strength_for_kl(subject, make, PROMPTS, 0.02, sign=sign)
        assert found.reached and math.copysign(1, found.strength) == sign
        with subject.under(make(found.strength)):
            assert mean_kl(plain, log_probs_at(subject, PROMPTS)) == pytest.approx(found.kl, rel=1e-6)  # same numbers
    assert not subject.active


def test_log_probabilities_are_those_of_each_prompt_alone(subject):
    together = log_probs_at(subject, PROMPTS, (0, -1))
    alone = torch.cat([log_probs_at(subject, [prompt], (0, -1)) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)  # float32 forward, another padding
    assert together.shape[:2] == (2, 2) and torch.allclose(together.exp().sum(-1), torch.ones(2, 2).double())


def test_the_kl_is_zero_for_equals_positive_else_and_survives_impossible_tokens():
    p = torch.tensor([[[0.5, 0.5, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[[0.25, 0.5, 0.25]]], dtype=torch.float64)
    assert mean_kl(p.log(), p.log()) == 0.0
    assert mean_kl(p.log(), q.log()) == pytest.approx(0.5 * math.log(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_kl": 0.0}, "positive number of nats"),
        ({"target_kl": 1.0, "sign": 2}, "expected 1 or -1"),
        ({"target_kl": 1.0, "start": 2.0, "limit": 1.0}, "0 < start <= limit"),
        ({"target_kl": 1.0, "tolerance": 1.5}, "share of the target"),
    ],
)
def test_bad_input_is_refused_in_words(subject, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        strength_for_kl(subject, make, PROMPTS, **arguments)


def test_a_position_that_a_prompt_lacks_is_refused(subject, make):
    with pytest.raises(ValueError, match="has no position 40"):
        strength_for_kl(subject, make, PROMPTS, 0.1, positions=(40,))
    with pytest.raises(ValueError, match="got no positions"):
        strength_for_kl(subject, make, PROMPTS, 0.1, positions=())
