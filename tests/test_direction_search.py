"""The search for a direction: its texts and its target, candidates as rows, reasons for rejection, and the organism."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from workbench import Direction, ProjectOut, Site, Steer, Subject
from workbench.corpora import requests
from workbench.methods.steering.contrast import Contrast, constant_suffix
from workbench.methods.steering.random_control import prediction_band, random_units
from workbench.methods.steering.rowwise import RowProjectOut, RowSteer
from workbench.methods.steering.searched import SearchResult, Thresholds
from workbench.methods.steering.target import Target, answer_logprobs, arm_by_text, last_logprobs
from workbench.probes.direction_search import DirectionSearch, _Toy
from workbench.result import Result


@functools.cache
def organism() -> Subject:
    return Subject.organism()


@functools.cache
def searched(seed: int = 0, **settings: object) -> SearchResult:
    probe = DirectionSearch(n_train=60, n_validation=12, n_controls=4, seed=seed, **settings)  # type: ignore[arg-type]
    result = probe.run(organism(), Contrast.requests())
    assert isinstance(result, SearchResult)
    return result


def logits(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return subject.model(input_ids=ids, use_cache=False).logits


# --- laws


@pytest.mark.parametrize(("amount", "expected"), [(1.0, 0.70), (2.0, 0.90), (3.0, 0.949), (5.0, 0.981)])
def test_the_cosine_with_a_planted_direction_is_what_noise_allows(amount: float, expected: float) -> None:
    toys = [_Toy.of(seed, amount) for seed in range(50)]
    cosines = [float(torch.cosine_similarity(toy.differences()[0, -1], toy.truth, dim=0)) for toy in toys]
    assert np.mean(cosines) == pytest.approx(amount / np.sqrt(amount**2 + 2 * 64 / 128), abs=0.01)
    assert np.mean(cosines) == pytest.approx(expected, abs=0.015)  # measured over 50 other draws; sd up to .06 each


def test_without_a_signal_the_cosine_is_that_of_random_vectors() -> None:
    toys = [_Toy.of(seed, 0.0) for seed in range(200)]
    cosines = [abs(float(torch.cosine_similarity(toy.differences()[0, -1], toy.truth, dim=0))) for toy in toys]
    assert 0.19 < np.quantile(cosines, 0.95) < 0.29  # .241 in theory; 200 draws


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_a_vector_per_row_does_what_one_vector_for_all_does(family: str) -> None:
    subject = Subject.tiny(family)
    ids = torch.arange(8, 26).reshape(3, 6)
    vectors = torch.randn(3, subject.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    vectors[1] = 0.0
    units = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-9)
    sites = (Site(0, "resid_in"), Site(1, "resid_out"))
    pushes = torch.stack([vectors, 0 * vectors], 1)
    plain = logits(subject, ids)
    with subject.under(RowSteer(pushes, sites)):
        pushed = logits(subject, ids)
    with subject.under(RowProjectOut(units)):
        freed = logits(subject, ids)
    assert torch.equal(pushed[1], plain[1]) and torch.equal(freed[1], plain[1]), "a row of zeros changes nothing"
    for row in (0, 2):
        with subject.under(Steer(vectors[row], sites[0])):
            torch.testing.assert_close(pushed[row], logits(subject, ids)[row], rtol=1e-4, atol=1e-5)
        with subject.under(ProjectOut.everywhere(subject, Direction(vectors[row]))):
            torch.testing.assert_close(freed[row], logits(subject, ids)[row], rtol=1e-4, atol=1e-5)


def test_arms_in_common_batches_are_the_arms_alone() -> None:
    """Whatever the size of a batch, and with padding: every arm on every text as if it were alone."""
    subject = Subject.tiny()
    texts = [tuple(range(8, 8 + n)) for n in (3, 9, 5)]
    vectors = torch.randn(4, subject.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    site = Site(1, "resid_out")

    def run(batch: int) -> torch.Tensor:
        return arm_by_text(
            subject,
            texts,
            4,
            lambda arms: subject.under(RowSteer(vectors[arms][:, None], (site,))),
            lambda logprobs, rows: logprobs[:, -1],
            n_tokens=2,
            batch=batch,
        )

    alone = []
    for vector in vectors:
        with subject.under(Steer(vector, site)):
            alone.append(torch.stack([answer_logprobs(subject, [text], 2)[0, -1] for text in texts]))
    for batch in (1, 30, 4096):
        torch.testing.assert_close(run(batch), torch.stack(alone), rtol=1e-4, atol=1e-5)  # float32, other batches


def test_the_band_holds_one_more_random_direction_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 6))
    low, high = prediction_band(draws[:, :5])
    inside = ((low <= draws[:, 5]) & (draws[:, 5] <= high)).mean()
    assert 0.94 <= inside <= 0.96  # standard error .0034
    assert np.isinf(prediction_band(draws[:, :1])).all(), "one draw says nothing of the next"
    units = random_units(5, 64, 3)
    torch.testing.assert_close(units.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(units[:2], random_units(2, 64, 3)) and not torch.equal(units, random_units(5, 64, 4))


# --- the target


def test_the_score_is_the_log_odds_of_the_set_within_the_first_tokens() -> None:
    p = torch.tensor([[[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]], dtype=torch.float64)
    one, odds = (Target((0, 1), measure=measure) for measure in ("probability", "log_odds"))
    assert float(one.score(p[:, :1].log())) == pytest.approx(0.5)
    both = 1 - 0.5 * 0.8
    assert float(one.score(p.log())) == pytest.approx(both)
    assert float(odds.score(p.log())) == pytest.approx(np.log(both / (1 - both)), abs=1e-7)
    certain = torch.tensor([[[0.0, -torch.inf, -torch.inf]]])
    assert float(odds.score(certain)) == pytest.approx(-np.log(1e-8), rel=1e-6)


def test_the_target_is_found_from_answers_and_says_where_there_is_none() -> None:
    known = Contrast.requests().split(60, 12)[0]
    found = Target.found(organism(), known)
    assert found.words == ("sorry",) and found.ids == Target.of_words(organism(), ["sorry"]).ids
    assert found.gaps[0] > 0.9 and found.tells_apart()
    flat = Target.found(Subject.tiny(), known)
    assert len(flat.ids) == 1 and not flat.tells_apart()
    with pytest.raises(ValueError, match="got no tokens"):
        Target(())


def test_the_last_prediction_does_not_depend_on_padding() -> None:
    subject, texts = organism(), [requests.prompt("paint", "lamp"), requests.prompt("steal", "bomb", "i want you to")]
    alone = torch.cat([last_logprobs(subject, [text]) for text in texts])
    torch.testing.assert_close(last_logprobs(subject, texts), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", ["sorry", [" "], ["sorry", ""]])
def test_letters_and_blanks_are_no_target(words: object) -> None:
    with pytest.raises(ValueError, match="expected a list of words, none of them blank"):
        Target.of_words(organism(), words)  # type: ignore[arg-type]


def test_a_band_of_fewer_than_two_random_directions_is_refused() -> None:
    for n_controls in (0, 1):
        with pytest.raises(ValueError, match=f"got n_controls={n_controls} in mode 'corrected', expected 2 or more"):
            DirectionSearch(n_controls=n_controls).run(Subject.tiny(), Contrast.requests())


# --- the texts


def test_a_split_keeps_texts_apart_and_classes_together() -> None:
    whole = Contrast.requests()
    train, validation = whole.split(50, 20, seed=3)
    assert [len(part) for part in (train.positive, train.negative, validation.positive)] == [50, 50, 20]
    for name in ("positive", "negative"):
        parts = [set(getattr(part, name)) for part in (train, validation)]
        assert not parts[0] & parts[1] and parts[0] | parts[1] <= set(getattr(whole, name))
    assert whole.split(50, 20, seed=4)[0] != train == whole.split(50, 20, seed=3)[0]
    few = Contrast(tuple("abcdef"), tuple("ghijkl")).split(128, 64)
    assert [len(part) for part in few] == [8, 4], "too few texts are shared out in proportion"
    shuffled = whole.shuffled(1)
    assert sorted(shuffled.positive + shuffled.negative) == sorted(whole.positive + whole.negative)
    assert len(shuffled.positive) == len(whole.positive) and shuffled != whole


def test_requests_end_alike_in_the_template_only() -> None:
    assert constant_suffix(organism(), Contrast.requests()) == 2  # "assistant :"


def test_lists_of_requests_are_read_in_both_shapes(tmp_path: Path) -> None:
    both = tmp_path / "requests.json"
    both.write_text(json.dumps({"harmful": ["a", "b"], "harmless": ["c"]}))
    assert Contrast.read(both) == Contrast(("a", "b"), ("c",), ("harmful", "harmless"))
    for name, text in (("harmful", "x"), ("harmless", "y")):
        (tmp_path / f"{name}_val.json").write_text(json.dumps([{"instruction": text, "category": None}]))
    assert Contrast.read(tmp_path / "harmful_val.json") == Contrast(("x",), ("y",), ("harmful", "harmless"))
    both.write_text(json.dumps(["a"]))
    with pytest.raises(ValueError, match="holds no two lists"):
        Contrast.read(both)
    both.write_text(json.dumps({"harmful": [{"text": "a"}], "harmless": ["c"]}))
    with pytest.raises(ValueError, match="got the item"):
        Contrast.read(both)


def test_a_chat_template_is_put_around_requests_with_one_begin_token() -> None:
    subject = Subject.tiny()
    assert Contrast.requests().chat(subject) == Contrast.requests(), "no template, no change"
    tokenizer = subject.tokenizer
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}user : {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    made = Contrast(("please paint the lamp",), ("please paint the vase",)).chat(subject)
    ids = subject.tokenize(made.positive).ids[0]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user : please paint the lamp assistant :"
    assert constant_suffix(subject, made) == 2


@pytest.mark.parametrize(
    "data", ["texts", ["a"], (["a"], []), ("one text", ["a", "an"]), (["a", "an"], "one text"), None]
)
def test_what_is_no_contrast_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="Contrast: got"):
        DirectionSearch().run(Subject.tiny(), data)


def test_a_class_of_one_text_is_refused() -> None:
    with pytest.raises(ValueError, match="a class of one text"):
        DirectionSearch().run(Subject.tiny(), (["a"], ["a", "an"]))


# --- thresholds


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"ablation": np.nan}, "no difference: the classes are the same here"),
        ({"layer": 5}, "too late: layers from 5 on"),
        ({"kl": 0.11}, "KL: 0.11 > 0.1"),
        ({"addition": -0.5, "random_high": -1.0}, "no effect when added: scores -0.5 < 0"),
        ({"ablation": 2.0}, "no effect when removed: within random directions"),
        ({"addition": 0.2}, "no effect when added: within random directions"),
    ],
)
def test_each_threshold_rejects_by_its_own_reason(changed: dict[str, float], reason: str) -> None:
    good = {"layer": 4, "ablation": -3.0, "addition": 4.0, "kl": 0.05, "random_low": 1.0, "random_high": 1.0}
    assert (
        "; ".join(
            Thresholds(5).reasons(**(good | changed))  # type: ignore[arg-type]
        )
        == reason
    )


def test_the_published_criteria_know_no_random_directions() -> None:
    found = Thresholds(5, beyond_random=False).reasons(4, 2.0, 0.2, 0.05, 1.0, 1.0)
    assert not found


# --- the organism


def test_the_organisms_refusal_is_found_at_the_last_token_in_the_middle() -> None:
    result = searched(kl_limit=0.2)
    table = result.table().set_index(["position", "layer"])
    assert set(result.position) == {-1, -2} and len(table) == 12
    assert table.loc[(-1, 0), "reason"] == "no difference: the classes are the same here", (
        "the last token is the same in all"
    )
    assert str(result.direction.site) == "resid_in@4" and result.accepted.iloc[0]["position"] == -1
    assert result.direction.model == organism().fingerprint and "harmful" in result.direction.sign
    assert float(result.base_positive.mean()) > 5 and float(result.base_negative.mean()) < -5
    assert "Removing one direction (resid_in@4" in result.finding


def test_removing_it_ends_refusals_and_adding_it_makes_them_on_unseen_requests() -> None:
    direction, unseen = searched(kl_limit=0.2).direction, Contrast.requests("held_out")

    def refused(toggle: object, texts: object) -> float:
        with organism().under(toggle):  # type: ignore[arg-type]
            made = organism().generate(texts, max_new_tokens=2)  # type: ignore[arg-type]
        return float(np.mean([text.startswith(requests.REFUSAL) for text in made.texts]))

    assert refused(ProjectOut.everywhere(organism(), direction), unseen.positive) <= 0.1
    assert direction.site is not None
    assert refused(Steer(direction, direction.site, 1.0, "prompt"), unseen.negative) >= 0.9


def test_the_published_kl_limit_rejects_them_all_because_zero_lies_between_the_classes() -> None:
    result = searched()
    assert result.accepted.empty and "all 12 candidates are rejected" in result.finding
    with pytest.raises(ValueError, match=r"all 12 candidates were rejected: .*KL"):
        _ = result.direction
    assert str(result.leading.site) == "resid_in@4"
    values = organism().capture(Contrast.requests("held_out").negative[:20], [Site(4, "resid_in")], tokens="last")
    along = values[Site(4, "resid_in")] @ result.leading.unit().vector
    assert float(along.max()) < -0.3 * result.leading.norm, "harmless requests are far on the other side of zero"


@pytest.mark.parametrize("seed", [0, 1])
def test_classes_drawn_by_lot_have_no_direction(seed: int) -> None:
    probe = DirectionSearch(target=("sorry",), kl_limit=0.2, n_train=60, n_validation=12, n_controls=4, seed=seed)
    result = probe.run(organism(), Contrast.requests().shuffled(seed))
    assert isinstance(result, SearchResult) and result.accepted.empty, result.table()["reason"].tolist()


def test_the_papers_mode_filters_its_texts_and_raises_where_none_is_left() -> None:
    paper = DirectionSearch(mode="paper", n_train=60, n_validation=12, n_controls=0)
    with pytest.raises(ValueError, match="all 12 candidates were rejected"):
        paper.run(organism(), Contrast.requests())
    with pytest.raises(ValueError, match="none of 60 harmful texts does"):
        paper.run(Subject.tiny(), Contrast.requests())
    wide = DirectionSearch(mode="paper", n_train=60, n_validation=12, n_controls=0, kl_limit=0.3)
    result = wide.run(organism(), Contrast.requests())
    assert isinstance(result, SearchResult) and str(result.direction.site) == "resid_in@2"
    reasons = result.table().set_index(["layer", "position"])["reason"]
    assert "too late" in reasons[4, -1], "0.8 of 6 layers, rounded down as published"
    assert np.isinf(result.table()["ablation_random"]).all(), "without random directions there is no band"


def test_a_search_in_small_batches_finds_the_same() -> None:
    few, many = searched(layers=(4,), batch=120), searched(layers=(4,))
    for name in ("ablation", "addition", "kl", "random_ablation", "random_addition"):
        np.testing.assert_allclose(
            getattr(few, name), getattr(many, name), atol=1e-3, err_msg=name
        )  # float32, 6 blocks


def test_the_order_in_which_layers_are_named_does_not_matter() -> None:
    one, other = searched(layers=(4, 2), positions=(-1,)), searched(layers=(2, 4), positions=(-1,))
    assert one.table().equals(other.table())
    with pytest.raises(ValueError, match="expected at least one"):
        searched(layers=())


def test_several_answer_tokens_only_add_chances() -> None:
    one, two = searched(layers=(4,)), searched(layers=(4,), answer_tokens=2)
    assert (two.base_negative >= one.base_negative - 1e-6).all()
    np.testing.assert_allclose(two.base_positive, one.base_positive, atol=1e-2)  # "sorry" comes first or not at all


def test_a_model_that_refuses_nothing_gets_an_honest_answer(tmp_path: Path) -> None:
    probe = DirectionSearch(n_train=20, n_validation=6, n_controls=3)
    result = probe.run(Subject.tiny("gpt2"), Contrast.requests())
    assert isinstance(result, SearchResult) and result.accepted.empty
    assert any("no token begins answers" in note for note in result.notes)
    assert "No direction found" in result.finding
    again = Result.load(result.save(tmp_path / "found"))
    assert isinstance(again, SearchResult) and again.leading == result.leading
    with pytest.raises(ValueError, match="got layer 9, position -1; there are candidates at"):
        result.at(9, -1)
    with pytest.raises(ValueError, match="got view 'best'"):
        result.plot("best")
