"""Token attribution and GrAInS: completeness first, hand-built truths, the organism, then bad input."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench import Site, Steer, Subject, difference_in_means, random_direction
from workbench.corpora import code_styles
from workbench.methods.steering.attributed import TokenAttributionResult
from workbench.methods.steering.attribution import (
    answer_log_prob,
    attributed,
    blank_embedding,
    embedded,
    integrated_gradients,
    preference_score,
    read_preferences,
)
from workbench.methods.steering.grains import grains_direction, strongest
from workbench.organism.tiny import tiny_pair
from workbench.probes.token_attribution import TokenAttribution
from workbench.toggles.clustered import ClusteredSteer

SITE = Site(0, "resid_out")
FRAME = ("write", "code", "to", "and", "=")  # the words that all code prompts share
WORDS = (code_styles.FIRST_WORD["layout"], code_styles.FIRST_WORD["brace"])


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@pytest.fixture(scope="module")
def organism() -> Subject:
    return Subject.organism()


@pytest.fixture(scope="module")
def triples() -> list[tuple[str, str, str]]:
    return [(code_styles.prompt(*each, "layout"), *WORDS) for each in code_styles.combinations("held_out")[:4]]


@pytest.fixture(scope="module")
def path() -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a text of five tokens, and a baseline."""
    made = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return made[0], made[1], 0.2 * made[2]


def linear(weight: Tensor):
    return lambda points: (weight * points).sum((-1, -2))


def smooth(weight: Tensor):
    return lambda points: torch.tanh(0.3 * (weight * points).sum(-1)).sum(-1)


def test_a_linear_preference_is_attributed_exactly_in_one_step(path: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, start = path
    for rule in ("midpoint", "right"):
        found = integrated_gradients(linear(weight), x, start, steps=1, rule=rule)
        torch.testing.assert_close(found.scores, (weight * (x - start)).sum(-1), rtol=1e-12, atol=1e-12)
        assert abs(found.gap) < 1e-12


def test_scores_add_up_and_the_midpoint_rule_needs_far_fewer_steps(path: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, start = path
    gap = {
        (rule, steps): abs(integrated_gradients(smooth(weight), x, start, steps=steps, rule=rule).relative_gap)
        for rule in ("midpoint", "right")
        for steps in (20, 40)
    }
    assert gap["right", 20] < 0.01 and gap["midpoint", 20] < 1e-4  # measured 4e-3 and 1e-5
    assert gap["right", 40] == pytest.approx(gap["right", 20] / 2, rel=0.1)  # an error of first order
    assert gap["midpoint", 40] == pytest.approx(gap["midpoint", 20] / 4, rel=0.1)  # of second order


def test_how_many_points_share_a_forward_changes_nothing(path: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, x, start = path
    one, many = (integrated_gradients(smooth(weight), x, start, steps=20, at_once=size) for size in (1, 100))
    torch.testing.assert_close(one.scores, many.scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_an_answer_is_read_one_token_before_and_as_a_whole(family: str) -> None:
    """log p(answer | prompt) from embeddings equals the sum over the answer's tokens of the model's own predictions."""
    subject = Subject.tiny(family, verify=False)
    case = code_styles.combinations("held_out")[7]
    prompt, program = code_styles.prompt(*case), code_styles.program(*case, "layout")
    (pair,) = read_preferences(subject, [(prompt, program, WORDS[1])])
    assert len(pair.preferred) == len(program.split()) and len(pair.dispreferred) == 1
    (_, ids, log_probs) = next(iter(subject.predictions([f"{prompt} {program}"])))
    first = len(pair.prompt)
    expected = sum(float(log_probs[t - 1, ids[t]]) for t in range(first, len(ids)))
    with torch.no_grad():
        value = answer_log_prob(subject, embedded(subject, pair.prompt)[None], pair.preferred)
    assert float(value) == pytest.approx(expected, rel=1e-4)  # fp32


def test_parameters_keep_no_gradients_and_the_model_is_untouched(subject: Subject, triples: list) -> None:
    before = {name: (value.requires_grad, value.clone()) for name, value in subject.model.named_parameters()}
    list(attributed(subject, triples[:1], steps=4, most_steps=4))
    for name, value in subject.model.named_parameters():
        assert value.grad is None and value.requires_grad == before[name][0] and torch.equal(value, before[name][1])


def test_special_tokens_and_template_keep_a_score_of_zero_and_are_never_left_out(
    organism: Subject, triples: list
) -> None:
    for pair, found in attributed(organism, triples[:2], template=FRAME, steps=8, most_steps=8):
        words = organism.tokenizer.convert_ids_to_tokens(list(pair.prompt))
        held = [word in (*FRAME, "<bos>") for word in words]
        assert [not free for free in pair.free] == held
        assert (found.scores[torch.tensor(held)] == 0).all()
        for sign in (1, -1):
            assert not (strongest(sign * found.scores, torch.tensor(pair.free), 20) & torch.tensor(held)).any()


def test_a_special_token_that_is_written_out_is_held_too(organism: Subject) -> None:
    (pair,) = read_preferences(organism, [("<bos> write some code =", *WORDS)])
    assert pair.free[:3] == (False, False, True)


def test_strongest_takes_the_largest_positive_scores_in_order() -> None:
    scores = torch.tensor([0.5, -2.0, 3.0, 0.5, 1.0, 9.0])
    free = torch.tensor([True, True, True, True, True, False])
    assert strongest(scores, free, 3).tolist() == [True, False, True, False, True, False]
    assert strongest(-scores, free, 3).tolist() == [False, True, False, False, False, False], "only one speaks against"


def test_toggles_know_where_the_prompt_ends(subject: Subject, triples: list) -> None:
    """A push at generated tokens can't move the prediction of an answer's first token; one at the prompt does."""
    (pair,) = read_preferences(subject, triples[:1])
    score, x = preference_score(subject, pair), embedded(subject, pair.prompt)[None]
    push = torch.linspace(-1, 1, subject.anatomy.d_model)
    with torch.no_grad():
        plain = score(x)
        with subject.under(Steer(push, SITE, 5.0, "generated")):
            assert torch.equal(score(x), plain)
        with subject.under(Steer(push, SITE, 5.0, "last")):
            assert not torch.allclose(score(x), plain)
            assert subject.receipts[0].tokens == 4, "the prompt's last token and the answer's one, for two answers"


def test_a_toggle_that_reads_the_prompt_reads_it_without_the_answer(subject: Subject, triples: list) -> None:
    """The same as a plain forward over the prompt under that toggle, though the answer follows in attribution."""
    (pair,) = read_preferences(subject, triples[:1])
    with torch.no_grad(), subject.under(ClusteredSteer.examples(subject)[0]):
        score = float(preference_score(subject, pair)(embedded(subject, pair.prompt)[None]))
        ((_, _, log_probs),) = subject.predictions([triples[0][0]])
    expected = float(log_probs[-1, pair.preferred[0]] - log_probs[-1, pair.dispreferred[0]])
    assert score == pytest.approx(expected, rel=1e-4)  # fp32


def toy() -> tuple[Subject, Tensor]:
    """A model that prefers "def" as far as its prompt holds "swap", "function" as far as it holds "power".

    Uniform attention at layer 0 writes the mean of coordinate 0 along a known direction; nothing else is ever written.
    """
    model, tokenizer = cast(Any, tiny_pair("llama"))
    direction = torch.zeros(32)
    direction[16:] = torch.randn(16, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        first = model.model.layers[0].self_attn
        first.v_proj.weight[0, 0] = 1.0
        first.o_proj.weight[:, 0] = 10 * direction
        words = model.model.embed_tokens.weight
        words[:, 16:], words[:, 0] = 0.0, 0.0
        words[:, 1] += 1.0  # the mean embedding should not be near zero, where norms bend every path
        for word, say in (("swap", 3.0), ("power", -3.0)):
            words[tokenizer.convert_tokens_to_ids(word), 0] = say
        model.lm_head.weight.zero_()
        for word, sign in zip(WORDS, (1, -1), strict=True):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] = sign * direction
    return Subject(model, tokenizer, name="toy", verify=False), direction


@pytest.mark.parametrize(("read", "combine"), [("prompt", "mean"), ("answers", "pca")])
def test_the_direction_of_a_planted_preference_is_recovered(read: str, combine: str) -> None:
    made, direction = toy()
    prompts = ["swap x and power y", "add power and x swap m", "x y swap n power p", "power and swap m n"]
    triples = [(prompt, *WORDS) for prompt in prompts]
    for pair, found in attributed(made, triples):
        words = made.tokenizer.convert_ids_to_tokens(list(pair.prompt))
        assert words[int(found.scores.argmax())] == "swap" and words[int(found.scores.argmin())] == "power"
        assert found.relative_gap < 0.01
    found = grains_direction(made, triples, SITE, k=1, read=read, combine=combine)  # type: ignore[arg-type]
    assert found.cosine(direction) > 0.95  # measured 1.000, and on the right side
    assert found.site == SITE and found.model == made.fingerprint and found.data
    turned = grains_direction(made, [(p, b, a) for p, a, b in triples], SITE, k=1, read=read)  # type: ignore[arg-type]
    assert turned.cosine(found) < -0.95


def test_the_organism_s_preference_for_a_style_hangs_on_the_word_that_asks_for_it(
    organism: Subject, triples: list
) -> None:
    result = cast(TokenAttributionResult, TokenAttribution(template=FRAME).run(organism, triples))
    assert result.complete.all() and float(result.relative_gap.max()) < 0.01
    first = result.by_word().iloc[0]
    assert first["token"] == "layout" and first["low"] > 0.9 * result.change.mean()
    assert "'layout' carries" in result.finding and "complete to" in result.finding


def test_the_published_baseline_and_rule_are_not_complete_where_blocks_begin_with_a_norm(
    organism: Subject, triples: list
) -> None:
    """From the zero embedding with 20 steps nearly all of the preference is missed, and the result says so."""
    published = TokenAttribution(baseline="zero", rule="right", steps=20, most_steps=20)
    result = cast(TokenAttributionResult, published.run(organism, triples))
    assert (result.relative_gap > 0.2).all()  # measured .98 for all four
    assert "NOT complete: 4 of 4 prompts" in result.finding
    with pytest.raises(ValueError, match=r"with 20 steps integrated gradients miss .* of a preference"):
        grains_direction(organism, triples, SITE, replacement="zero", rule="right", steps=20, most_steps=20)


def test_steering_along_grains_moves_the_style_and_a_random_direction_does_not(
    organism: Subject, triples: list
) -> None:
    site, new = Site(3, "resid_out"), code_styles.combinations("held_out")[20:40]
    found = grains_direction(organism, triples, site, template=FRAME, k=1)
    mean = difference_in_means(
        organism,
        [code_styles.prompt(*each, "layout") for each in new],
        [code_styles.prompt(*each, "brace") for each in new],
        site,
    )
    push = found.unit() * mean.norm

    def layout_share() -> float:
        word = organism.tokenizer.convert_tokens_to_ids(WORDS[0])
        rows = organism.predictions([code_styles.prompt(*each) for each in new])
        return float(np.mean([float(log_probs[-1, word].exp()) for _, _, log_probs in rows]))

    plain = layout_share()
    with organism.under(Steer(push, site, 0.5, "last")):
        pushed = layout_share()
    with organism.under(Steer(random_direction(push), site, 0.5, "last")):
        control = layout_share()
    assert plain == pytest.approx(1 - code_styles.BRACE_SHARE, abs=0.06)
    assert pushed > plain + 0.25 and abs(control - plain) < 0.1  # measured .32, .80 and .32
    assert found.cosine(mean) > 0.4  # measured .62


def test_the_mean_embedding_is_the_mean_over_the_vocabulary(subject: Subject) -> None:
    table = cast(Tensor, subject.model.get_input_embeddings().weight)
    torch.testing.assert_close(blank_embedding(subject, "mean", chunk=7), table.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(blank_embedding(subject, "pad"), table[subject.pad_id])
    assert not blank_embedding(subject, "zero").any()


def test_half_precision_models_are_attributed_too(triples: list) -> None:
    half = Subject.organism(dtype=torch.bfloat16)
    ((_, found),) = attributed(half, triples[:1], template=FRAME, steps=16, most_steps=16)
    assert found.relative_gap < 0.05 and int(found.scores.argmax()) == 2  # measured .003


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "left"}, "got rule='left'"),
        ({"steps": 0}, "steps=0"),
        ({"baseline": "unk"}, "got 'unk' for a blank token"),
        ({"template": "write"}, r"expected a list of words or phrases: \['write'\]"),
        ({"template": ("write some code to swap x and y code =",)}, "is special or template"),
    ],
)
def test_impossible_settings_are_refused_in_words(subject: Subject, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(attributed(subject, [(code_styles.prompt("swap", ("x", "y")), *WORDS)], **settings))


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        ([], "expected triples"),
        ([("write some code =", "def")], "expected triples"),
        ([("write some code =", "def", "def")], "must be different answers"),
        ([("write some code =", "", "def")], "can't be told apart"),
        ([("write some code =", "zebra-crossing", "def")], "not in this model's vocabulary"),
    ],
)
def test_impossible_triples_are_refused_in_words(subject: Subject, triples: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_preferences(subject, triples)


@pytest.mark.parametrize("settings", [{"k": 0}, {"read": "end"}, {"combine": "median"}])
def test_impossible_ways_to_combine_are_refused_in_words(subject: Subject, triples: list, settings: dict) -> None:
    with pytest.raises(ValueError, match="grains_direction: got k="):
        grains_direction(subject, triples, SITE, **settings)
