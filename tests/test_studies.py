"""A study of mechanisms under compressions: its scales, its costs, a planted truth with its control, and bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.corpora import bilingual, requests
from workbench.directions import difference_in_means, random_direction
from workbench.pruned.plan import Plan
from workbench.result import Result
from workbench.site import Site, sites
from workbench.studies.compressions import CONTROLS, KINDS, Bits, Blocks, Push, Ranks, Tokens, Units, kinds
from workbench.studies.costs import cost, nearest
from workbench.studies.cross import CrossStudy, untrained
from workbench.studies.crossed import AGAIN, COLUMNS, REFUSED, UNTRAINED, CrossResult, gathered
from workbench.studies.mechanisms import (
    CodesRecalled,
    FactsAnswered,
    Features,
    Fluency,
    LanguageProfile,
    Refusals,
    RelationSets,
    SyntaxSets,
    mechanisms,
)
from workbench.studies.questions import guessed, says
from workbench.studies.scales import (
    above_chance,
    features_above_chance,
    overlap_above_chance,
    profile_agreement,
)
from workbench.subject import Subject
from workbench.toggles.evict import EvictKV
from workbench.toggles.prune import Prune
from workbench.toggles.steer import Clamp, ProjectOut

FEW = (Fluency(4, 16), FactsAnswered(1), Refusals(8), CodesRecalled(4, 16))


@pytest.fixture(scope="module")
def organism() -> Subject:
    return Subject.organism()


@pytest.fixture(scope="module")
def small(organism) -> CrossResult:
    """A study of two seeds under one cache kind and one pruning kind."""
    return CrossStudy(FEW, (Ranks(), Units("heads")), cache=(0.5, 0.25), seeds=(0, 1)).run(organism)


def kept(mechanism, subject, toggle, seed=0) -> dict[str, float]:
    before = mechanism.read(subject, seed)
    with subject.under(toggle):
        return dict(zip(mechanism.measures, mechanism.kept(before, mechanism.read(subject, seed)), strict=True))


# Scales


def test_every_scale_is_one_for_the_same_and_zero_for_chance():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 4, 400)) < 0.3
    features = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    profile = rng.random((5, 2))
    assert above_chance(0.9, 0.9, 0.2) == 1 and above_chance(0.9, 0.2, 0.2) == 0
    assert overlap_above_chance(mask, mask) == 1
    assert features_above_chance(features, features) == pytest.approx(1, abs=1e-6)  # float32 features
    assert profile_agreement(profile, profile, 0.1) == 1
    assert profile_agreement(profile, np.full_like(profile, 0.1), 0.1) == 0


def test_sets_of_the_same_sizes_in_the_same_layers_overlap_by_nothing_on_average():
    rng = np.random.default_rng(1)
    sizes = (300, 20, 100)  # a layer with nearly all units would overlap by itself

    def draw() -> np.ndarray:
        return np.stack([rng.permutation(np.arange(400) < size) for size in sizes])

    found = [overlap_above_chance(draw(), draw()) for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20  # the mean of 400 draws, within four standard errors
    assert np.std(found) < 0.05


def test_shuffled_features_are_kept_by_nothing_on_average():
    draw = torch.Generator().manual_seed(0)
    for shift in (0.0, 1.0):  # features that point the same way are alike by chance
        features = torch.randn(400, 6, generator=draw) + shift
        found = [features_above_chance(features, features[torch.randperm(400, generator=draw)]) for _ in range(100)]
        assert abs(np.mean(found)) < 4 * np.std(found) / 10, shift  # the mean of 100 draws, within four standard errors
    features -= features.mean(0)
    assert features_above_chance(features, -features) < -0.9, "weights are positive: a feature turned round is another"


def test_half_of_a_set_is_half_kept_where_chance_plays_no_part():
    a = np.zeros((1, 100_000), dtype=bool)
    a[0, :100] = True
    b = a & (np.arange(100_000) < 50)
    assert overlap_above_chance(a, b) == pytest.approx(0.5, abs=1e-3)  # chance of overlap is 1e-3
    assert np.isnan(overlap_above_chance(a & False, a & False))


def test_an_answer_drawn_from_the_relation_is_what_guessing_gets():
    from workbench.methods.relations.facts import Facts, Prompt

    answers = ["red", "red", "red", "blue"]
    facts = Facts(tuple(Prompt("colour", str(n), "t", f"{n} is", (one,)) for n, one in enumerate(answers)))
    assert guessed(facts) == pytest.approx((3 / 4) ** 2 + (1 / 4) ** 2)


def test_says_is_what_greedy_decoding_says(organism):
    prompts = [requests.prompt(*pair) for pair in (("smash", "lamp"), ("paint", "lamp"), ("polish", "vase"))]
    said = [text.split()[0] for text in organism.generate(prompts, max_new_tokens=1).texts]
    for word in ("sorry", "sure"):
        assert says(organism, [(one, word) for one in prompts]).tolist() == [first == word for first in said]


# Mechanisms


@pytest.mark.parametrize(
    "mechanism",
    [*FEW, RelationSets(3, 12), SyntaxSets(12, 2), Features(2, 8, max_iterations=8), LanguageProfile(3)],
    ids=lambda one: type(one).__name__,
)
def test_without_a_toggle_nothing_is_lost_and_an_untrained_twin_has_nothing(organism, mechanism):
    before = mechanism.read(organism, 0)
    assert mechanism.lacking(before) == "" or isinstance(mechanism, Features)  # few stories tell few topics
    assert mechanism.kept(before, mechanism.read(organism, 0)) == pytest.approx([1.0] * len(mechanism.measures))
    floor = mechanism.kept(before, mechanism.read(Subject.tiny("organism"), 0))
    assert floor[0] < 0.2, floor  # the share that guessing, or another set of the same size, would get is 0


def test_data_grow_with_the_scale_as_far_as_the_corpora_reach(organism):
    (profile,) = [one for one in mechanisms(50) if isinstance(one, LanguageProfile)]
    assert profile.n_per_task == len(bilingual.DICTIONARY) and profile.read(organism, 0)["said"].size


def test_a_seed_draws_other_data(organism):
    for mechanism in FEW:
        one, again = (mechanism.read(organism, 0) for _ in range(2))
        assert all(np.array_equal(one[name], again[name]) for name in one)
    one, other = (Fluency(4, 16).read(organism, seed)["nll"] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_an_untrained_model_is_told_what_it_lacks():
    subject = Subject.tiny("gpt2")
    for mechanism in (FactsAnswered(1), Refusals(8), CodesRecalled(4, 16), LanguageProfile(2)):
        assert mechanism.lacking(mechanism.read(subject, 0)), mechanism


def test_without_its_direction_the_model_refuses_no_more_and_recalls_as_before(organism):
    items = requests.items("train")
    groups = [[item.prompt for item in items if item.form == form][:48] for form in ("harmful", "harmless")]
    direction = difference_in_means(organism, groups[0], groups[1], Site(3, "resid_out"))
    gone = ProjectOut.everywhere(organism, direction)
    control = ProjectOut.everywhere(organism, random_direction(direction, 1))
    assert max(kept(Refusals(12), organism, gone).values()) < 0.2
    assert kept(CodesRecalled(8, 32), organism, gone)["recall"] > 0.8
    assert min(kept(Refusals(12), organism, control).values()) > 0.9
    assert kept(CodesRecalled(8, 32), organism, control)["recall"] > 0.9


def test_without_any_head_nothing_from_afar_is_left(organism):
    plan = Plan.of(organism, {layer: {"heads": ()} for layer in range(organism.n_layers)})
    assert kept(CodesRecalled(4, 32), organism, Prune(plan, "mask"))["recall"] == 0
    assert kept(Refusals(8), organism, Prune(plan, "mask"))["refusals"] == 0
    assert kept(Fluency(4, 30), organism, Prune(plan, "mask"))["perplexity"] < 0.5


def test_where_no_neuron_fires_no_set_and_no_feature_is_left(organism):
    off: Any = {site: range(organism.anatomy.d_mlp) for site in sites(range(organism.n_layers), "neurons")}
    assert abs(kept(SyntaxSets(12, 2), organism, Clamp(off))["syntax neurons"]) < 1e-9
    found = kept(Features(2, 8, max_iterations=8), organism, Clamp(off))
    assert found["features"] <= 0 and found["topics told"] == 0


# Compressions


@pytest.mark.parametrize("kind", [Bits(), Tokens("snapkv"), Tokens("random"), Ranks()], ids=lambda one: one.name)
def test_kinds_of_caches_hold_the_share_asked_for(organism, kind):
    left = cost(organism, kind.toggle(organism, 0.4, 0), 0)
    assert left.cache == pytest.approx(0.4, abs=0.03), left  # one rank of 32, or a 40th of the tokens
    assert left.weights == 1


@pytest.mark.parametrize("of", ["heads", "neurons"])
def test_a_control_of_pruning_weighs_what_the_method_weighs(organism, of):
    method, control = (cost(organism, Units(of, random).toggle(organism, 0.9, 0), 0) for random in (False, True))
    assert method.weights == control.weights == pytest.approx(0.9, abs=0.02)  # a bundle of heads is .02 of the blocks
    assert control.kl > method.kl


def test_blocks_leave_whole_and_pushes_move_predictions_as_far_as_asked(organism):
    assert cost(organism, Blocks().toggle(organism, 0.85, 0), 0).weights == pytest.approx(5 / 6)
    for random in (False, True):
        left = cost(organism, Push(random).toggle(organism, 0.1, 0), 0)
        assert left.kl == pytest.approx(0.1, rel=0.06) and left.cache == left.weights == 1  # tolerance of the search


def test_the_nearest_rung_is_found_with_few_measurements():
    ladder, asked = [EvictKV(n / 40) for n in range(1, 40)], []

    def costs(rung: Any) -> float:
        asked.append(rung)
        return rung.keep**2

    for wanted in (0.0, 0.26, 0.5, 2.0):
        asked.clear()
        found = nearest(ladder, costs, wanted)
        assert found == min(ladder, key=lambda rung: abs(rung.keep**2 - wanted))
        assert len(asked) <= 8 and len(set(asked)) == len(asked)


def test_kinds_are_named_once_and_known_by_name():
    names = [kind.name for kind in (*KINDS, *CONTROLS)]
    assert len(set(names)) == len(names)
    assert [kind.name for kind in kinds(["low rank", "random tokens"])] == ["low rank", "random tokens"]
    assert not [kind for kind in KINDS if kind.control] and all(kind.control for kind in CONTROLS)
    with pytest.raises(ValueError, match="expected some of: fewer bits"):
        kinds(["nothing"])


# The study


def test_a_study_has_a_row_for_everything(small):
    table = small.table()
    assert list(table.columns) == list(COLUMNS)
    names = {name for one in FEW for name in one.measures}
    assert set(table["measure"]) == names == set(small.measures)
    assert set(table["kind"]) == {AGAIN, UNTRAINED, "low rank", "fewer heads"}
    assert len(table) == 2 * len(names) * 5  # seeds, measures, and five places: two ranks, heads, noise, floor
    assert not len(small.refused)


def test_the_same_seeds_give_the_same_table(small, organism):
    again = CrossStudy(FEW, (Units("heads"),), seeds=(1,), floor=False).run(organism).table()
    mine = small.facts[(small.facts["seed"] == 1) & small.facts["kind"].isin([AGAIN, "fewer heads"])]
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), again)


def test_a_study_saves_and_loads_and_draws(small, tmp_path):
    loaded = Result.load(small.save(tmp_path / "cross"))
    pd.testing.assert_frame_equal(loaded.table(), small.table())
    assert isinstance(loaded, CrossResult)
    for view in small.views()["view"]:
        title = str(loaded.plot(view).layout.title.text)
        assert title == str(small.plot(view).layout.title.text) and len(title) > 20
    drawn: Any = loaded.plot("matrix").data
    assert drawn[0].z.shape == (4, len(small.measures))
    for family in small.views()["family"]:
        drawn = loaded.plot("frontier", "recall", family).data
        assert [trace.line.dash for trace in drawn] == ["solid", "dash"]  # of one kind: the measure and perplexity


def test_runs_of_a_sweep_gather_to_the_study_they_are_parts_of(small):
    facts: Any = small.facts
    parts = [replace(small, facts=facts[facts["seed"] == seed]) for seed in (1, 0)]
    whole = gathered([*parts, parts[0]])
    assert whole.seeds == [0, 1]
    pd.testing.assert_frame_equal(whole.summary(), small.summary())
    nearly = replace(small, facts=facts.assign(kept=facts["kept"] + 1e-7))  # as other numbers of threads give
    pd.testing.assert_frame_equal(gathered([small, nearly]).summary(), small.summary())


def test_gathering_refuses_other_models_and_contradictions(small):
    with pytest.raises(ValueError, match="expected one model"):
        gathered([small, replace(small, fingerprint="0" * 16, model="another")])
    with pytest.raises(ValueError, match="different settings or versions"):
        gathered([small, replace(small, facts=small.facts.assign(kept=0.5))])
    with pytest.raises(ValueError, match="different settings or versions"):
        gathered([small, replace(small, facts=small.facts.assign(kept=np.nan))])
    with pytest.raises(ValueError, match="at least one run"):
        gathered([])


def simulated(damages: dict[tuple[str, str], list[float]]) -> CrossResult:
    """A result whose damages by (measure, kind) and seed are given."""
    rows = []
    for (measure, kind), values in damages.items():
        family = "" if kind in (AGAIN, UNTRAINED) else "cache"
        for seed, value in enumerate(values):
            cost_of = (kind.startswith("random"), family, 0.5 if family else np.nan, 0.5, 1.0, 0.0)
            rows.append((measure, kind, *cost_of, seed, 1 - value, value, "a toggle"))
    scales = {measure: "a scale" for measure, _ in damages}
    none = pd.DataFrame(columns=list(REFUSED))
    facts = pd.DataFrame(rows, columns=list(COLUMNS))
    return CrossResult(facts=facts, refused=none, scales=scales, model="simulated", fingerprint="0" * 16)


def test_what_perplexity_did_not_tell_is_said_and_chance_is_not():
    noise = {(name, AGAIN): [0.01, -0.01, 0.0] for name in ("perplexity", "recall", "facts")}
    found = simulated(
        noise
        | {("perplexity", "snapkv tokens"): [0.02, 0.03, 0.01], ("recall", "snapkv tokens"): [0.8, 0.9, 0.85]}
        | {("facts", "snapkv tokens"): [0.0, 0.01, -0.01]}
        | {("perplexity", "random tokens"): [0.3, 0.3, 0.31], ("recall", "random tokens"): [0.1, 0.2, 0.15]}
    )
    table: Any = found.summary().set_index(["measure", "kind"])
    assert table.loc[("recall", "snapkv tokens"), "beyond"] and not table.loc[("facts", "snapkv tokens"), "beyond"]
    assert table.loc[("recall", "snapkv tokens"), "low"] == pytest.approx(0.85 - 4.3027 * 0.05 / 3**0.5, abs=1e-3)
    said = found.surprises()
    assert said[0] == "snapkv tokens at 0.5 keeps 98% of perplexity, but only 15% of recall"
    assert said[1] == "random tokens spare more than snapkv tokens at the same cost: recall (by 0.70)"
    assert len(said) == 2 and "hurts recall most" in found.finding


def test_one_seed_claims_nothing():
    told = {("recall", AGAIN): [0.0], ("recall", "low rank"): [1.0], ("facts", "low rank"): [0.0]}
    found = simulated(told | {("perplexity", AGAIN): [0.0], ("perplexity", "low rank"): [0.5]})
    assert not any(found.summary()["beyond"]) and not found.surprises()
    assert "no intervals" in found.finding


# What can't be


def test_what_a_model_lacks_is_told_and_never_a_number():
    subject = Subject.tiny("gpt2")
    result = CrossStudy((Fluency(2, 20), FactsAnswered(1)), (Ranks(),), seeds=(0,)).run(subject)
    assert result.measures == ["perplexity"]
    assert [line for line in result.unmeasured() if line.startswith("facts, untouched: not measurable here. ")]


def test_what_a_model_can_not_undergo_is_told():
    subject = Subject.tiny("mixtral")
    result = CrossStudy((Fluency(2, 20), SyntaxSets(8, 1)), (Units("neurons"),), seeds=(0,)).run(subject)
    assert set(result.refused["what"]) == {"syntax neurons", "fewer neurons"}
    assert min(map(len, result.refused["why"])) > 20
    assert result.plot("matrix").data
    for view in ("frontier", "yardstick"):
        with pytest.raises(ValueError, match=f"no compression was measured, so no {view}"):
            result.plot(view)


def test_without_perplexity_there_is_no_yardstick(small):
    facts: Any = small.facts
    rest = replace(small, facts=facts[facts["measure"] != "perplexity"])
    assert rest.plot("frontier").data
    with pytest.raises(ValueError, match="perplexity, the yardstick, was not measured"):
        rest.plot("yardstick")


def test_the_twin_has_the_same_shape_other_weights_and_leaves_chance_as_it_was(organism):
    state = torch.get_rng_state()
    twin = untrained(organism)
    assert torch.equal(torch.get_rng_state(), state)
    assert twin.anatomy.summary() == organism.anatomy.summary() and twin.fingerprint != organism.fingerprint
    assert untrained(organism).fingerprint == twin.fingerprint != untrained(organism, 1).fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossStudy(mechanisms=()), "some mechanisms"),
        (lambda: CrossStudy(seeds=(0, 0)), "different seeds"),
        (lambda: CrossStudy(cache=(1.0,)), "below 1"),
        (lambda: CrossStudy(weights=()), "shares above 0"),
        (lambda: CrossStudy(kl=(-1.0,)), "shares above 0"),
        (lambda: mechanisms(0), "at least 1"),
        (lambda: above_chance(0.1, 0.5, 0.2), "more before"),
        (lambda: overlap_above_chance(np.ones((1, 3)), np.ones((1, 4))), "same units"),
        (lambda: profile_agreement(np.ones(3), np.ones(3), 1.0), "one that says more"),
    ],
)
def test_bad_settings_are_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_asking_for_what_is_not_there_names_what_is(small):
    with pytest.raises(ValueError, match="expected one of matrix, frontier"):
        small.plot("nothing")
    with pytest.raises(ValueError, match="under"):
        small.kept("recall", "nothing")
