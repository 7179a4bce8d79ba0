"""ConditionalSteer: gate scores and thresholds, one decision per row, the prompt read once, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench import Direction, Site, Steer, Subject
from workbench.corpora import requests
from workbench.methods.steering.gates import best_threshold, gate_quality, row_scores, three_parts
from workbench.reading import meets_first
from workbench.toggle import Toggle
from workbench.toggles.conditional import Condition, ConditionalSteer

WIDTH, ROWS = 64, 200
PROMPTS = ("wash the mirror", "please wash the lamp and the vase", "a bell")


def gaussian_classes(gap: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Values (2 n, width) of two classes that lie `gap` apart along a direction of norm 1, it, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(WIDTH, generator=generator)
    direction /= direction.norm()
    positive = torch.arange(2 * ROWS) < ROWS
    values = torch.randn(2 * ROWS, WIDTH, generator=generator) + gap * positive[:, None] * direction
    return values, direction, positive.numpy()


# --- scores and thresholds


@pytest.mark.parametrize(
    ("gap", "tanh", "cosine"), [(0, 0.67, 0.67), (2, 0.78, 0.86), (4, 0.97, 0.98), (6, 0.998, 1.0), (8, 1.0, 1.0)]
)
def test_best_f1_of_two_gaussian_classes_is_as_measured_before(gap, tanh, cosine):
    found = {"tanh": [], "cosine": []}
    for seed in range(10):
        values, direction, positive = gaussian_classes(gap, seed)
        for score, f1s in found.items():
            f1s.append(best_threshold(row_scores(values, direction, score).numpy(), positive, "above").f1)
    # Means of 10 draws against means of other draws: the sd of one is .02 at a gap of 2, less elsewhere.
    assert np.mean(found["cosine"]) == pytest.approx(cosine, abs=0.02)
    assert np.mean(found["tanh"]) == pytest.approx(tanh, abs=0.02)


def test_the_published_score_is_blind_to_the_sign_and_the_cosine_is_not():
    values, direction, _ = gaussian_classes(0.0, 0)
    near, far = values + 3 * direction, values - 3 * direction
    published = [float(row_scores(rows, direction, "tanh").mean()) for rows in (near, far)]
    signed = [float(row_scores(rows, direction, "cosine").mean()) for rows in (near, far)]
    assert published[0] == pytest.approx(0.35, abs=0.03) and published[1] == pytest.approx(0.35, abs=0.03)
    assert signed[0] > 0.25 and signed[1] < -0.25


def test_a_row_scores_the_same_in_any_company_and_at_any_scale():
    values, direction, _ = gaussian_classes(3.0, 1)
    scores = row_scores(values, direction)
    torch.testing.assert_close(row_scores(values.flip(0), 7 * direction).flip(0), scores)
    torch.testing.assert_close(row_scores(5 * values[3:4], direction), scores[3:4])
    assert float(row_scores(torch.zeros(1, WIDTH), direction)) == 0.0


def f1_of(opened: np.ndarray, positive: np.ndarray) -> float:
    return 2 * (opened & positive).sum() / (opened.sum() + positive.sum())


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12))
def test_no_threshold_has_a_better_f1_than_the_one_chosen(rows):
    scores, positive = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="rows of both classes"):
            best_threshold(scores, positive)
        return
    cuts = np.arange(-4, 4) + 0.5
    best = {"above": max(f1_of(scores > cut, positive) for cut in cuts)}
    best["below"] = max(f1_of(scores < cut, positive) for cut in cuts)
    for when in ("above", "below"):
        chosen = best_threshold(scores, positive, when)
        assert chosen.f1 == pytest.approx(best[when]) == pytest.approx(f1_of(chosen.opens(scores), positive))
    either = best_threshold(scores, positive)
    assert either.f1 == pytest.approx(max(best.values()))
    assert either.when == ("above" if best["above"] >= best["below"] else "below")
    assert gate_quality(scores, positive, either).f1 == pytest.approx(either.f1)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        best_threshold(np.array([0.1, np.nan]), np.array([True, False]))


def test_the_three_parts_share_no_row_and_miss_none():
    parts = three_parts(11, np.random.default_rng(0))
    assert sorted(np.concatenate(parts)) == list(range(11)) and all(len(part) for part in parts)
    with pytest.raises(ValueError, match="at least 4"):
        three_parts(3, np.random.default_rng(0))


# --- one decision per row


def split_condition(subject: Subject, prompts: Sequence[str], at: Site, tokens: str) -> tuple[Condition, list[bool]]:
    """A condition along a random direction that about half of the prompts meet, and which."""
    noise = torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(3))
    blank = Condition(Direction(noise), at, 0.0, tokens=tokens)
    scores = blank.scores(subject, prompts)
    low, high = np.sort(scores)[len(scores) // 2 - 1 :][:2]
    condition = replace(blank, threshold=float(low + high) / 2)
    return condition, (scores > condition.threshold).tolist()


def push(subject: Subject, layer: int = 1, positions: str = "all") -> Steer:
    return Steer(torch.linspace(-1, 1, subject.anatomy.d_model), Site(layer, "resid_out"), 4.0, positions)


def last_logits(subject: Subject, prompts: Sequence[str]) -> torch.Tensor:
    """(prompt, vocab) after the last token, in one padded batch."""
    made = subject.tokenize(prompts)
    (batch,) = subject._padded(made, [list(range(len(prompts)))])
    with torch.no_grad():
        return subject._forward(batch).logits[:, -1]


# The gate is read before the edited layer, at the same place, or after it: there the prompt runs twice.
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_only_the_rows_that_match_are_steered_and_the_others_stay_to_the_bit(layer, tokens):
    subject = Subject.tiny("llama")
    condition, match = split_condition(subject, PROMPTS, Site(layer, "resid_out"), tokens)
    assert any(match) and not all(match)
    plain = last_logits(subject, PROMPTS)
    with subject.under(push(subject)):
        steered = last_logits(subject, PROMPTS)
    with subject.under(ConditionalSteer(push(subject), condition)):
        found = last_logits(subject, PROMPTS)
        assert (subject.receipts[0].prompts, subject.receipts[0].prompts_acted) == (3, sum(match))
        assert f"acted on {sum(match)} of 3 prompts" in str(subject.receipts[0])
        permuted = last_logits(subject, PROMPTS[::-1])
    for row, matches in enumerate(match):
        assert torch.equal(found[row], (steered if matches else plain)[row])
    torch.testing.assert_close(permuted.flip(0), found)
    assert not torch.equal(steered, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "opt"])
@pytest.mark.parametrize("gate", [0, 2])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_cached_uncached_and_batched_generation_agree_where_only_some_rows_match(family, gate, positions):
    subject = Subject.tiny(family, verify=False)
    condition, match = split_condition(subject, PROMPTS, Site(gate, "resid_out"), "mean")
    steer = push(subject, 1, positions)
    plain = subject.generate(PROMPTS, max_new_tokens=5).ids
    with subject.under(steer):
        steered = subject.generate(PROMPTS, max_new_tokens=5).ids
    expected = tuple((steered if matches else plain)[row] for row, matches in enumerate(match))
    with subject.under(ConditionalSteer(steer, condition)):
        assert subject.generate(PROMPTS, max_new_tokens=5).ids == expected
        assert subject.generate(PROMPTS, max_new_tokens=5, use_cache=False).ids == expected
        assert tuple(subject.generate([prompt], max_new_tokens=5).ids[0] for prompt in PROMPTS) == expected


def beamed(subject: Subject) -> torch.Tensor:
    made = subject.tokenize(PROMPTS)
    (batch,) = subject._padded(made, [[0, 1, 2]])
    return subject.model.generate(
        batch.ids, attention_mask=batch.mask.long(), max_new_tokens=5, min_new_tokens=5, num_beams=3, do_sample=False
    )


@pytest.mark.parametrize("gate", [0, 2])
def test_the_beams_of_a_prompt_share_its_decision(gate):
    subject = Subject.tiny("llama")
    condition, match = split_condition(subject, PROMPTS, Site(gate, "resid_out"), "last")
    plain = beamed(subject)
    with subject.under(push(subject)):
        steered = beamed(subject)
    with subject.under(ConditionalSteer(push(subject), condition)):
        found = beamed(subject)
    assert not torch.equal(plain, steered)
    for row, matches in enumerate(match):
        assert torch.equal(found[row], (steered if matches else plain)[row])


# --- the pass that reads


def reading_late(subject: Subject, threshold: float = -2.0) -> ConditionalSteer:
    """Steers layer 0 by what stands at the last layer: the prompt runs twice. At -2 every row matches."""
    noise = torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(3))
    late = Site(subject.n_layers - 1, "resid_out")
    return ConditionalSteer(push(subject, 0), Condition(Direction(noise), late, threshold))


def test_which_sites_are_read_in_passing():
    assert meets_first(Site(1, "mlp_out"), Site(2, "resid_in")) and not meets_first(
        Site(2, "resid_in"), Site(1, "heads")
    )
    assert meets_first(Site(1, "resid_in"), Site(1, "heads")) and meets_first(Site(1, "heads"), Site(1, "resid_out"))
    assert meets_first(Site(1, "heads"), Site(1, "heads"))
    assert not meets_first(Site(1, "attn_out"), Site(1, "mlp_out")), "a parallel block runs both at once"


def test_captures_and_hooks_of_the_user_see_one_forward_only():
    subject, site = Subject.tiny("llama"), Site(0, "resid_out")
    with subject.under(push(subject, 0)):
        expected = subject.capture(PROMPTS, [site])[site]
    calls = []
    block = subject.model.get_submodule(f"{subject.anatomy.blocks}.1")
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    with subject.under(reading_late(subject)):
        assert torch.equal(subject.capture(PROMPTS, [site])[site], expected)
    handle.remove()
    assert len(calls) == 1


def test_an_nnsight_trace_sees_the_steered_forward():
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize(PROMPTS).ids[1]])
    found = []
    for toggle in (push(subject, 0), reading_late(subject)):
        with subject.under(toggle):
            with subject.nn.trace(ids):
                value = subject.nn.model.layers[1].output.save()
            found.append(value)
    assert torch.equal(*found)


def test_hidden_states_of_transformers_are_those_of_the_steered_forward():
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize(PROMPTS).ids[1]])
    with torch.no_grad():
        subject.model(input_ids=ids, output_hidden_states=True)  # transformers adds its hooks at the first request
    with torch.no_grad(), subject.under(push(subject, 0)):
        expected = subject.model(input_ids=ids, output_hidden_states=True).hidden_states
    with torch.no_grad(), subject.under(reading_late(subject)):
        found = subject.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_the_condition_reads_what_a_toggle_on_its_left_made_of_the_prompt():
    subject = Subject.tiny("llama")
    conditional = reading_late(subject)
    left = Steer(conditional.condition.direction, Site(0, "resid_out"), 50.0)
    condition = replace(
        conditional.condition, threshold=float(conditional.condition.scores(subject, PROMPTS).max()) + 0.05
    )
    conditional = replace(conditional, condition=condition)
    with subject.under(conditional):
        last_logits(subject, PROMPTS)
        assert subject.receipts[0].prompts_acted == 0
    with subject.under(left | conditional):
        last_logits(subject, PROMPTS)
        assert subject.receipts[1].prompts_acted == 3
        assert subject.receipts[0].fired == 1, "the reading pass is not counted"


def test_of_two_that_read_late_the_second_reads_what_the_first_did():
    subject = Subject.tiny("llama")
    first = reading_late(subject)
    with subject.under(first):
        seen = first.condition.scores(subject, PROMPTS)
    cut = float(np.sort(seen)[1:].mean())
    second = replace(first, condition=replace(first.condition, threshold=cut))
    with subject.under(first | second):
        last_logits(subject, PROMPTS)
        assert subject.receipts[1].prompts_acted == int((seen > cut).sum())


def test_lifting_the_toggle_between_two_steps_keeps_what_was_decided():
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize(PROMPTS).ids[1]])
    with torch.no_grad(), subject.under(reading_late(subject)):
        cache = subject.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with subject.untoggled():
            subject.model(input_ids=ids)
        lifted = subject.model(input_ids=ids[:, -1:], past_key_values=cache).logits
        cache = subject.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        assert torch.equal(subject.model(input_ids=ids[:, -1:], past_key_values=cache).logits, lifted)


def test_an_error_in_the_reading_pass_leaves_no_trace():
    subject = Subject.tiny("llama")
    plain = last_logits(subject, PROMPTS)
    hooks = [list(module._forward_hooks) for module in subject.model.modules()]
    with pytest.raises(IndexError), subject.under(reading_late(subject)):
        subject.model(input_ids=torch.tensor([[10**6]]))
    assert [list(module._forward_hooks) for module in subject.model.modules()] == hooks
    assert torch.equal(last_logits(subject, PROMPTS), plain)


# --- what is refused


def test_a_cache_whose_prompt_was_never_read_is_refused_even_if_adopted():
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize(PROMPTS).ids[1]])
    with torch.no_grad():
        cache = subject.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="never read"), subject.under(reading_late(subject), adopt_cache=True):
            subject.model(input_ids=ids[:, -1:], past_key_values=cache)


def test_rows_that_are_not_whole_prompts_are_refused():
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize(PROMPTS).ids[1]] * 3)
    with torch.no_grad(), subject.under(reading_late(subject)):
        cache = subject.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 2]))
        with pytest.raises(ValueError, match="got 2 rows, but the cache was made for 3"):
            subject.model(input_ids=ids[:2, -1:], past_key_values=cache)


def test_a_prompt_in_pieces_is_refused():
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize(PROMPTS).ids[1]])
    with torch.no_grad(), subject.under(reading_late(subject)), subject._stack.watch.prompts(torch.tensor([7])):
        with pytest.raises(ValueError, match="Bring each prompt whole"):
            subject.model(input_ids=ids[:, :3])
        subject.model(input_ids=ids)


def test_a_mask_made_for_a_cache_of_fixed_size_is_refused():
    subject = Subject.tiny("llama")
    ids = torch.tensor([subject.tokenize(PROMPTS).ids[1]])
    mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    with torch.no_grad(), pytest.raises(ValueError, match="growing cache"), subject.under(reading_late(subject)):
        subject.model(input_ids=ids, attention_mask=mask)


def test_wrong_settings_are_refused_in_words():
    subject, noise = Subject.tiny("llama"), Direction(torch.ones(5))
    with pytest.raises(ValueError, match="tokens='first'"):
        Condition(noise, Site(0, "resid_out"), 0.0, tokens="first")
    with (
        pytest.raises(ValueError, match="direction has 5 dims"),
        subject.under(ConditionalSteer(push(subject), Condition(noise, Site(0, "resid_out"), 0.0))),
    ):
        pass
    with (
        pytest.raises(ValueError, match="got no Steer"),
        subject.under(ConditionalSteer((), Condition(noise, Site(0, "resid_out"), 0.0))),
    ):
        pass


# --- a condition is a value, and is fitted


def test_a_fitted_condition_survives_json_with_its_centre():
    subject = Subject.tiny("llama")
    direction = Direction(torch.linspace(0, 1, subject.anatomy.d_model))
    condition = Condition(direction, Site(0, "resid_out"), 0.1, "below", "mean", centre=2 * direction)
    toggle = ConditionalSteer(push(subject), condition)
    again = Toggle.from_json(json.loads(json.dumps(toggle.to_json())))
    assert again == toggle and again.condition.centre == condition.centre


def test_on_the_organism_a_condition_tells_harmful_requests_on_rows_it_never_saw():
    subject = Subject.organism()
    prompts = {
        form: [i.prompt for i in requests.items("held_out") if i.form == form] for form in ("harmful", "harmless")
    }
    layers = [Site(layer, "resid_out") for layer in (0, 3)]
    condition, table = Condition.fit(subject, prompts["harmful"][:60], prompts["harmless"][:60], layers)
    held = table[(table["split"] == "held out") & table["chosen"]].iloc[0]
    assert condition.at.layer == held["layer"] and held["f1"] > 0.95 and held["auc"] > 0.98
    other = Condition.fit(subject, prompts["harmful"][:60], prompts["harmless"][:60], layers)[0]
    assert other == condition
    scores = condition.scores(subject, prompts["harmful"][60:])
    assert condition.opens(scores).mean() > 0.9
