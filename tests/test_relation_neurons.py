"""Relation neurons: average precision against its definition, facts and splits, a network built by hand, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from workbench.corpora import relations as corpus
from workbench.methods.relations import responses as reading
from workbench.methods.relations.average_precision import (
    PrecisionNull,
    average_precision,
    average_precision_reference,
    chance_level,
    two_sided_precision,
)
from workbench.methods.relations.facts import Facts, Prompt, ask, project_facts, read_lre
from workbench.methods.relations.lesions import Lesions, switch_off
from workbench.methods.relations.relational import RelationNeuronsResult
from workbench.methods.relations.responses import Layout, layer_responses
from workbench.methods.relations.selectivity import fields, ranks
from workbench.probes.deactivation import Deactivation
from workbench.probes.relation_neurons import RelationNeurons
from workbench.site import Site
from workbench.subject import Subject
from workbench.toggles import Clamp

KINDS_OF_SCORES = ("distinct", "rounded", "mostly zero", "constant", "tiny and huge")


def scores(kind: str, n_neurons: int = 70, n_prompts: int = 90, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(n_neurons, n_prompts))
    if kind == "rounded":
        values = np.round(values, 1)  # makes -0.0 too
    if kind == "mostly zero":
        values = np.maximum(values - 1, -0.0)
    if kind == "constant":
        values = np.full_like(values, -2.5)
    if kind == "tiny and huge":
        values = values * 10.0 ** np.random.default_rng(1).integers(-44, 38, values.shape)  # subnormal to almost 3e38
    return values.astype(np.float32)


def labels(n_prompts: int = 90, n_relations: int = 4, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(0, n_relations, n_prompts)
    drawn[:n_relations] = np.arange(n_relations)
    return drawn


# --- average precision


@pytest.mark.parametrize("kind", KINDS_OF_SCORES)
def test_it_is_scikit_learns_and_the_definition_for_all_relations_at_once(kind):
    values, relation = scores(kind), labels()
    expected = [[average_precision_score(relation == r, row) for r in range(4)] for row in values.astype(np.float64)]
    slow = [[average_precision_reference(row, relation == r) for r in range(4)] for row in values]
    np.testing.assert_allclose(average_precision(values, relation), expected, atol=1e-12)  # measured 2e-16
    np.testing.assert_allclose(slow, expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS_OF_SCORES)
def test_both_signs_are_what_one_finds_for_the_values_and_for_their_negatives(kind):
    values, relation = scores(kind), labels()
    high, low = average_precision(values, relation), average_precision(-values, relation)
    found, sign = two_sided_precision(values, relation)
    np.testing.assert_allclose(found, np.maximum(high, low), atol=1e-12)
    np.testing.assert_array_equal(sign, np.where(high >= low, 1, -1))


def test_increasing_transforms_and_the_order_of_prompts_change_nothing():
    values, relation = scores("rounded"), labels()
    expected, order = average_precision(values, relation), np.random.default_rng(5).permutation(90)
    np.testing.assert_array_equal(average_precision(np.exp(values / 2), relation), expected)
    np.testing.assert_array_equal(average_precision(values[:, order], relation[order]), expected)
    np.testing.assert_array_equal(average_precision(np.asfortranarray(values), relation), expected)


def test_it_is_one_exactly_where_all_positives_come_first():
    relation = np.array([0, 0, 1, 1, 1])
    values = np.array([[5, 4, 3, 2, 1], [5, 3, 3, 2, 1], [5, 2, 3, 4, 1]], dtype=np.float32)
    found = average_precision(values, relation)[:, 0]
    assert found[0] == 1.0
    np.testing.assert_allclose(found[1:], [(1 + 2 / 3) / 2, (1 + 2 / 4) / 2])  # a tie counts as not before


def test_one_prompt_and_no_neuron_are_no_special_cases():
    assert average_precision(np.ones((2, 1), dtype=np.float32), np.array([0])).tolist() == [[1.0], [1.0]]
    assert average_precision(np.ones((0, 3), dtype=np.float16), np.array([0, 1, 1])).shape == (0, 2)


def test_a_constant_neuron_scores_the_share_of_positives_which_is_less_than_chance():
    relation = np.repeat([0, 1], [300, 1200])
    assert average_precision(np.zeros((1, 1500), dtype=np.float32), relation)[0, 0] == pytest.approx(0.2, abs=1e-12)
    assert chance_level(1500, 300) == pytest.approx(0.20368, abs=1e-5)


def test_the_chance_level_is_the_mean_over_all_orders_of_a_small_case():
    from itertools import combinations

    orders = [np.array(chosen) + 1 for chosen in combinations(range(7), 3)]
    exact = np.mean([(np.arange(1, 4) / ranks_of_positives).mean() for ranks_of_positives in orders])
    assert chance_level(7, 3) == pytest.approx(exact, abs=1e-12)
    assert chance_level(1, 1) == chance_level(9, 9) == 1.0


@pytest.mark.parametrize(
    ("values", "relation", "words"),
    [
        (np.array([[1.0, np.nan]], dtype=np.float32), [0, 1], "NaN or infinity"),
        (np.array([[1.0, -np.nan]], dtype=np.float32), [0, 1], "NaN or infinity"),
        (np.array([[np.inf, 0.0]], dtype=np.float32), [0, 1], "NaN or infinity"),
        (np.array([[-np.inf, 0.0]], dtype=np.float32), [0, 1], "NaN or infinity"),
        (np.zeros((1, 2)), [0, 1], "float64 scores, expected float32"),
        (np.zeros((1, 2), dtype=np.float32), [0, 2], r"\[1, 0, 1\] prompts per relation"),
        (np.zeros((1, 2), dtype=np.float32), [0, -1], "prompts per relation"),
        (np.zeros((1, 2), dtype=np.float32), [0, 1, 0], "one relation per prompt"),
    ],
)
def test_what_cannot_be_ranked_is_refused(values, relation, words):
    with pytest.raises(ValueError, match=words):
        average_precision(values, np.array(relation))


# --- the null


@pytest.mark.parametrize("sizes", [(300, 1200), (12,) * 6])
def test_random_orders_have_the_exact_mean(sizes):
    null = PrecisionNull.of(sizes, 4000, seed=1)
    for r, size in enumerate(sizes):
        error = null.draws[r].std() / np.sqrt(4000)
        assert abs(null.draws[r].mean() - chance_level(sum(sizes), size)) < 4 * error


@pytest.mark.parametrize("two_sided", [False, True])
def test_p_values_of_silent_neurons_are_uniform(two_sided):
    relation = np.repeat(np.arange(6), 20)
    values = np.random.default_rng(3).normal(size=(3000, 120)).astype(np.float32)
    found = two_sided_precision(values, relation)[0] if two_sided else average_precision(values, relation)
    p = PrecisionNull.of((20,) * 6, 20_000, two_sided=two_sided, seed=4).p(found)
    for level in (0.5, 0.05, 0.01):  # 18,000 tests, relations of one neuron not independent
        assert (p <= level).mean() == pytest.approx(level, rel=0.12)


@pytest.mark.parametrize("sizes", [(30, 150), (5, 35)])
def test_the_tail_reaches_beyond_counting_and_never_promises_too_much(sizes):
    draws = 100_000
    null, truth = PrecisionNull.of(sizes, 20_000, seed=0), PrecisionNull.of(sizes, draws, seed=9).draws[0]
    for level in (1e-2, 1e-3, 1e-4):
        at = truth[-int(level * draws)]
        p = null.p(np.full((1, 2), at))[0, 0]
        assert 0.6 * level <= p <= 6 * level  # .93 to 3.7 times in longer runs; above 1 costs power, below it validity
    assert null.p(np.ones((1, 2)))[0, 0] >= 1 / comb(sum(sizes), sizes[0]) * (1 - 1e-9)
    if sizes != (5, 35):
        assert null.p(np.full((1, 2), 0.6))[0, 0] < 1e-6  # no count of 20,000 draws says that


def test_too_few_random_orders_for_a_tail_are_refused():
    with pytest.raises(ValueError, match="got 50 random orders, expected at least 100"):
        PrecisionNull.of((3, 9), 50)


def test_a_null_with_few_values_is_counted_not_extrapolated():
    null = PrecisionNull.of((1, 39), 20_000, seed=0)  # AP = 1 / rank: 1 in 40 is perfect by chance
    assert null.p(np.ones((1, 2)))[0, 0] == pytest.approx(1 / 40, rel=0.1)
    assert null.p(np.full((1, 2), 0.025))[0, 0] == 1.0


def test_negatives_are_all_others_or_so_many_times_the_positives():
    relation = np.repeat(np.arange(4), [5, 10, 10, 10])
    (everything,) = fields(relation, None)
    np.testing.assert_array_equal(everything.labels, relation)
    for r, one in enumerate(fields(np.repeat(np.arange(6), 10), 4, seed=1)):
        np.testing.assert_array_equal(np.bincount(one.labels), [10, 40])
        assert one.relations == (r,) and set(one.columns[:10]) == set(range(10 * r, 10 * r + 10))
        assert len(set(one.columns)) == 50
    with pytest.raises(ValueError, match="wants 40 negatives, but the others have 25"):
        fields(relation, 4)


def test_ranks_go_from_the_best_down_and_ties_to_the_earlier_unit():
    ap = np.array([[[0.5], [0.9]], [[0.9], [0.1]]])
    np.testing.assert_array_equal(ranks(ap)[..., 0], [[2, 0], [1, 3]])


# --- facts


def test_no_subject_is_both_in_detection_and_in_evaluation_whatever_the_relation():
    facts = project_facts()
    for seed in range(3):
        detection, evaluation = facts.split(0.3, seed)
        assert len(detection) + len(evaluation) == len(facts)
        assert not {p.subject for p in detection.prompts} & {p.subject for p in evaluation.prompts}
        for relation in facts.relations:
            own, held = ({p.subject for p in some.prompts if p.relation == relation} for some in (facts, evaluation))
            assert len(held) == round(0.3 * len(own))  # people, towns and ships each are one pool
    assert facts.split(0.3, 0)[1] == facts.split(0.3, 0)[1] != facts.split(0.3, 1)[1]
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        facts.split(1.0)


def test_an_lre_file_and_the_projects_own_relations_are_the_same_prompts(tmp_path):
    for name in ("father", "river"):
        (tmp_path / f"{name}.json").write_text(json.dumps(corpus.lre(name)))
    read = read_lre(tmp_path)
    own = project_facts().of("statement").where(lambda p: p.relation in ("father", "river"))
    assert [replace(p, template="statement") for p in read.prompts] == list(own.prompts)
    assert read.relations == ("father", "river") and read.templates == ("prompt 1",)
    assert read_lre(tmp_path / "river.json").relations == ("river",)


def test_several_templates_and_several_objects_of_an_lre_file(tmp_path):
    path = tmp_path / "author.json"
    samples = [{"subject": "It", "object": "King"}, {"subject": "It", "object": "Stephen King"}]
    zero = ["Who wrote {}?"]
    content = {"name": "author", "prompt_templates": ["{} is by", "The author of {} is"], "samples": samples}
    path.write_text(json.dumps(content | {"prompt_templates_zs": zero, "relation_type": "factual"}))
    facts = read_lre(path, suffix=" Answer:")
    assert [p.text for p in facts.prompts] == [
        "It is by Answer:", "The author of It is Answer:", "Who wrote It? Answer:",
    ]  # fmt: skip
    assert facts.templates == ("prompt 1", "prompt 2", "zero-shot 1")
    assert facts.prompts[0].answers == ("King", "Stephen King")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not in LRE format"),
        ("[]", "not in LRE format"),
        ('{"name": "a", "samples": []}', "prompt_templates"),
        ('{"name": "a", "prompt_templates": ["no place"], "samples": [{"subject": "s", "object": "o"}]}', "one {}"),
        ('{"name": "a", "prompt_templates": ["{}"], "samples": [{"subject": "s", "object": " "}]}', "expected a word"),
        ('{"name": "a", "prompt_templates": ["{}"], "samples": [{"subject": "s", "object": 3}]}', "expected a word"),
    ],
)
def test_a_broken_lre_file_is_refused_by_name(tmp_path, text, words):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_lre(tmp_path)


def test_a_missing_lre_file_or_an_empty_folder_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(FileNotFoundError, match="LRE format"):
            read_lre(path)


# --- a network built by hand: cue -> 20 hidden units -> answer

NAMES, PER_RELATION, N_PLANTED = ("north", "east", "south", "west"), 20, 20
WORDS = ["?", "none", *NAMES, *(f"is-{name}" for name in NAMES), *(f"s{n}" for n in range(PER_RELATION)), "is-nor"]


def built(*, redundant: bool) -> Subject:
    """A GPT-2 of one block. A cue word excites 20 units, which write its answer; half of them suffice if redundant.

    The answer "none" has a fixed score in between: what is left of a relation's own score decides.
    """
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = WhitespaceSplit()
    shape = {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 1, "n_head": 1, "n_inner": 128, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
        embedding, block = model.transformer.wte.weight, model.transformer.h[0].mlp
        block.c_fc.weight[16:, 80:] = torch.randn(
            16, 48, generator=generator
        )  # follow subjects, and nothing reads them
        embedding[-PER_RELATION - 1 : -1, 16:] = torch.randn(PER_RELATION, 16, generator=generator)
        model.transformer.ln_f.weight.zero_()  # the bias then carries the constant that "none" is compared with
        model.transformer.ln_f.weight[8:12], model.transformer.ln_f.bias[15] = 1.0, 1.0
        for r in range(len(NAMES)):
            embedding[WORDS.index(NAMES[r]), r] = 4.0
            block.c_fc.weight[r, r * N_PLANTED : (r + 1) * N_PLANTED] = 1.0
            block.c_proj.weight[r * N_PLANTED : (r + 1) * N_PLANTED, 8 + r] = 1.0
            model.lm_head.weight[WORDS.index(f"is-{NAMES[r]}"), 8 + r] = 1.0
        model.lm_head.weight[WORDS.index("none"), 15] = 1.0 if redundant else 5.2
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?")
    return Subject(model, tokenizer, name="built", verify=False)


def built_facts() -> Facts:
    """Each relation's cue after each subject, in two templates: cue last, or with a filler word in front."""
    made = [
        Prompt(name, f"s{n}", template, text.format(n, name), (f"is-{name}",))
        for template, text in (("plain", "s{} {}"), ("longer", "? s{} {}"))
        for name in NAMES
        for n in range(PER_RELATION)
    ]
    return Facts(tuple(made), "built")


FIND = RelationNeurons(n_null=2000, held_out=0.4)


@pytest.fixture(scope="module")
def plain() -> tuple[Subject, RelationNeuronsResult]:
    subject = built(redundant=False)
    result = FIND.run(subject, built_facts())
    assert isinstance(result, RelationNeuronsResult)
    return subject, result


def test_the_planted_units_are_found_and_no_others(plain):
    _, result = plain
    assert result.facts["exact"].eq(1.0).all() and result.templates == ("plain", "longer")
    for r in range(len(NAMES)):
        own = slice(r * N_PLANTED, (r + 1) * N_PLANTED)
        assert set(ranks(result.ap[0])[0, own, r]) == set(range(N_PLANTED))
        assert (result.sign[0, 0, own, r] == 1).all() and (result.ap[0, 0, own, r] == 1).all()
        assert result.selected[0, own, r].all() and not result.selected[0, 80:, r].any()
    assert result.units("east", 20) == {Site(0, "neurons"): tuple(range(20, 40))}
    assert result.survival()["survive"].eq(1.0).all()


def test_their_deactivation_is_fatal_to_their_relation_alone(plain):
    subject, result = plain
    found = Deactivation(sizes=(1, 20), n_random=3).run(subject, result.lesions()).table()
    ranked = found[(found["k"] == 20) & (found["control"] == "none")]
    own = ranked["evaluated"] == ranked["switched_off"]
    assert len(ranked) == 16 and ranked.loc[own, "drop"].eq(1.0).all() and ranked.loc[~own, "drop"].eq(0.0).all()
    assert found.loc[found["control"].str.startswith("random"), "drop"].eq(0.0).all()
    assert found.loc[found["switched_off"] == "none", "drop"].eq(0.0).all()  # k = 0


def test_a_probe_and_a_clamp_join_in_three_lines(plain):
    subject, result = plain
    prompts = built_facts().of("plain").prompts
    with subject.under(Clamp(result.units("south", 20))):
        wrong = ~ask(subject, prompts).exact
    assert {prompt.relation for prompt, failed in zip(prompts, wrong, strict=True) if failed} == {"south"}


def test_two_halves_that_can_stand_in_for_each_other_are_cumulative():
    subject = built(redundant=True)
    lesions = FIND.run(subject, built_facts()).lesions()  # type: ignore[attr-defined]
    found = Deactivation(sizes=(10, 20), n_random=0).run(subject, lesions)
    pooled = found.cumulativity().set_index("relation").loc["all, micro"]  # type: ignore[attr-defined]
    n_prompts = len(lesions.prompts)
    assert (pooled["total"], pooled["affected"], pooled["value"]) == (n_prompts, 0, 1.0)
    halves = found.curves().set_index(["curve", "k"])["accuracy"]  # type: ignore[attr-defined]
    assert halves["own relation", 10] == 1.0 and halves["own relation", 20] == 0.0


def test_where_the_added_units_alone_do_the_harm_cumulativity_is_zero():
    prompts = tuple(Prompt("r", f"s{n}", "t", f"{n}", ("yes",)) for n in range(5))
    units = np.array([[[0, 0], [0, 1]]])
    lesions = Lesions(("r",), units, np.zeros((1, 1, 4)), Layout((0,), ("neurons",), (4,)), prompts)

    def answered(off: np.ndarray | None, _: int, chosen: np.ndarray) -> np.ndarray:
        return np.full(len(chosen), off is None or 1 not in off[:, 1])

    outcome = switch_off(answered, lesions, (1, 2), n_random=0, seed=0)
    assert (outcome.total.item(), outcome.affected.item()) == (5, 5)


def test_holding_at_the_mean_uses_the_other_relations_responses(plain):
    subject, result = plain
    lesions = result.lesions()
    units = lesions.top(0, 0, 20)
    toggle = Deactivation(by="mean").clamp(lesions, units, 0)
    others = [p.text for p in built_facts().split(0.4, 0)[0].of("plain").prompts if p.relation != "north"]
    expected = subject.capture(others, [Site(0, "neurons")], tokens="mean")[Site(0, "neurons")].mean(0)[:20]
    np.testing.assert_allclose(toggle.to, expected, atol=1e-6)  # float32 means


def test_random_units_match_the_layers_and_parts_of_the_ranked_ones():
    layout = Layout((2, 5), ("gate", "down"), (30, 10))
    units = np.array([[(0, 3), (0, 35), (1, 7), (1, 8), (1, 31)]])
    lesions = Lesions(("r",), units, np.zeros((1, 2, 40)), layout, ())
    for draw in range(20):
        drawn = lesions.random(0, 5, np.random.default_rng(draw))
        assert len(np.unique(drawn, axis=0)) == 5
        counts = {site: len(indices) for site, indices in layout.units_by_site(drawn).items()}
        assert counts == {Site(2, "gate"): 1, Site(2, "mlp_out"): 1, Site(5, "gate"): 2, Site(5, "mlp_out"): 1}


# --- reading a model


def test_special_tokens_stay_out_of_the_mean_unless_asked_for(monkeypatch):
    subject, texts = Subject.tiny("llama"), ["the father of kalon is", "kalon names"]
    layout = Layout.of(subject, ("gate", "down"))
    first, width = Site(1, "gate"), subject.anatomy.d_mlp
    values = [subject.capture([text], [first])[first].double().numpy() for text in texts]
    bare = list(layer_responses(subject, texts, layout))[1][:width]
    whole = list(layer_responses(subject, texts, layout, special=True))[1][:width]
    last = list(layer_responses(subject, texts, layout, tokens="last"))[1][:width]
    for n, each in enumerate(values):  # 1e-5: float32 forwards of batches of another shape
        np.testing.assert_allclose(bare[:, n], each[1:].mean(0), atol=1e-5)
        np.testing.assert_allclose(whole[:, n], each.mean(0), atol=1e-5)
        np.testing.assert_allclose(last[:, n], each[-1], atol=1e-5)
    monkeypatch.setattr(reading, "BYTES_AT_ONCE", 1)  # one layer and one text at a time
    np.testing.assert_allclose(list(layer_responses(subject, texts, layout))[1][:width], bare, atol=1e-5)


def test_the_papers_mode_reads_three_projections_or_those_that_there_are():
    few = project_facts().where(lambda p: p.relation in ("father", "home", "river", "port", "cargo", "pet"))
    probe = RelationNeurons(mode="paper", only_answered=False, n_null=200)
    whole, part = (probe.run(Subject.tiny(family), few) for family in ("llama", "gpt2"))
    assert isinstance(whole, RelationNeuronsResult) and isinstance(part, RelationNeuronsResult)
    assert whole.parts == ("gate", "up", "down") and whole.widths == (48, 48, 32) and not whole.notes
    assert part.parts == ("up", "down") and part.notes == ("tiny:gpt2:0 has no gate: only up and down were read",)
    assert whole.templates == ("statement",) and (whole.sign == 1).all()
    np.testing.assert_array_equal(whole.selected.sum((0, 1)), 1)  # .36 % of 384 units
    np.testing.assert_allclose(whole.chance, chance_level(5 * 34, 34), atol=0.02)  # 28 or 34 positives
    mixture = probe.run(Subject.tiny("mixtral"), few)
    assert isinstance(mixture, RelationNeuronsResult) and mixture.parts == ("down",)


def test_a_part_that_a_model_lacks_is_refused_where_it_was_asked_for():
    few = project_facts().where(lambda p: p.relation in ("father", "river"))
    with pytest.raises(ValueError, match="gate@0: this model has no such place"):
        RelationNeurons(parts=("gate",), only_answered=False).run(Subject.tiny("gpt2"), few)
    with pytest.raises(ValueError, match="expected some of neurons, gate, up, down"):
        RelationNeurons(parts=("attention",)).run(Subject.tiny("gpt2"), few)


def test_facts_that_mean_nothing_to_a_model_are_said_to_mean_nothing():
    few = project_facts().where(lambda p: p.relation in ("father", "river"))
    with pytest.raises(ValueError, match=r"tiny:llama:0 answers 0 of .* These facts mean nothing to it"):
        RelationNeurons().run(Subject.tiny("llama"), few)


def test_a_relation_that_is_hardly_answered_is_left_out_and_named():
    wrong = [replace(p, answers=("none",)) if p.relation == "west" else p for p in built_facts().prompts]
    result = FIND.run(built(redundant=False), Facts(tuple(wrong)))
    assert isinstance(result, RelationNeuronsResult)
    assert result.relations == ("north", "east", "south") and result.notes[0].startswith("west: fewer than 5")
    assert {p.relation for p in result.lesions().prompts} == set(result.relations)


@pytest.mark.parametrize("templates", [(), ("plain", "longer")])
def test_relations_that_share_no_template_are_refused(templates):
    made = [
        Prompt(name, "s1", template, f"s1 {name}", ("x",)) for name, template in zip(NAMES, templates, strict=False)
    ]
    with pytest.raises(ValueError, match=f"no template that all of its {len(made)} relations share"):
        RelationNeurons().run(built(redundant=False), Facts(tuple(made)))


# --- answers


def test_two_tokens_that_begin_an_object_count_in_the_paper_and_not_as_exact():
    subject = built(redundant=False)
    prompts = [
        Prompt("r", "s", "t", "s1 north", ("is-north",)),
        Prompt("r", "s", "t", "s1 north", ("is-north none none s1",)),  # only its beginning is said
        Prompt("r", "s", "t", "s1 north", ("is-nor",)),  # a word that only begins like the object
        Prompt("r", "s", "t", "s1 north", ("is-east", "is-north")),
    ]
    answers = ask(subject, prompts)
    assert answers.exact.tolist() == [True, False, False, True], answers.texts
    assert answers.prefix.tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="expected exact or prefix"):
        answers.right("loose")


# --- the organism


@pytest.fixture(scope="module")
def organism() -> tuple[Subject, RelationNeuronsResult]:
    subject = Subject.organism()
    result = RelationNeurons(templates=("statement", "question"), n_null=2000).run(subject, project_facts())
    assert isinstance(result, RelationNeuronsResult)
    return subject, result


def test_own_accuracy_falls_far_more_than_others_and_random_neurons_do_nothing(organism):
    subject, result = organism
    found = Deactivation(sizes=(300,)).run(subject, result.lesions())  # of 2304
    accuracy = found.curves().set_index(["curve", "k"])["accuracy"]  # type: ignore[attr-defined]
    assert accuracy["own relation", 0] >= 0.95
    assert accuracy["own relation", 300] <= 0.7  # measured .54
    assert min(accuracy["other relations", 300], accuracy["own, random neurons off", 300]) >= 0.95  # measured 1.00


def test_figures_and_tables_refuse_what_they_do_not_have(organism):
    _, result = organism
    for wrong in ({"view": "spectrum"}, {"relation": "uncle"}):
        with pytest.raises(ValueError, match="expected one of"):
            result.plot(**wrong)
    for k in (0, 10**6):
        with pytest.raises(ValueError, match="expected 1 to 2304 neurons"):
            result.units("father", k)
    with pytest.raises(ValueError, match="expected some of"):
        result.lesions(("sonnet",))
    for sizes in ((), (0,), (5, 5), (3000,)):
        with pytest.raises(ValueError, match="numbers from 1 to the 2304 ranked units"):
            Deactivation(sizes=sizes).run(Subject.tiny("llama"), result.lesions())


def test_one_relation_alone_or_data_of_another_kind_is_refused(organism):
    subject, result = organism
    alone = replace(result.lesions(), relations=("father",))
    with pytest.raises(ValueError, match="expected two or more"):
        Deactivation(sizes=(5,)).run(subject, alone)
    with pytest.raises(ValueError, match="got a RelationNeuronsResult, expected Lesions"):
        Deactivation().run(subject, result)
    with pytest.raises(ValueError, match="got a tuple, expected Facts"):
        RelationNeurons().run(subject, ("the father of kalon is",))


def test_what_is_kept_reads_back(organism, tmp_path: Path):
    _, result = organism
    again = RelationNeuronsResult.load(result.save(tmp_path / "relations"))
    assert isinstance(again, RelationNeuronsResult)
    assert again.lesions().prompts == result.lesions().prompts
    np.testing.assert_array_equal(again.lesions().units, result.lesions().units)
