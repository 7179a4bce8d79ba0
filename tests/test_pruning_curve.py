"""What pruning loses: the definition by hand, planted halves, scores dealt anew, questions, figures, bad input."""

from __future__ import annotations

import json
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from families import subject_of, texts
from scipy.stats import mannwhitneyu

from workbench.corpora import recall, relations, streams
from workbench.corpora.item import Item
from workbench.methods.pruning.budgets import Budget, Ranking
from workbench.methods.pruning.criteria import scores_of
from workbench.methods.pruning.curves import CONTROL, PruningCurveResult, Trial, losses
from workbench.methods.pruning.planted import half_dead, random_texts
from workbench.methods.pruning.scores import scored
from workbench.methods.pruning.speed import timed, too_noisy
from workbench.probes.pruning_curve import PruningCurve, dealt
from workbench.pruned import Plan
from workbench.pruned.report import parameter_bytes
from workbench.subject import Subject
from workbench.toggles.prune import Prune

SMALL = PruningCurve(("amp_out", "magnitude"), keeps=(0.8, 0.6), n_random=3)


def run(probe: PruningCurve, subject: Subject, data: Any) -> PruningCurveResult:
    result = probe.run(subject, data)
    assert isinstance(result, PruningCurveResult)
    return result


def test_losses_are_those_of_reading_each_text_alone() -> None:
    subject = subject_of("llama")
    ids = random_texts(subject, 0, 4)
    toggle = Prune(Plan.of(subject, {1: {"neurons": range(9)}}))
    found = losses(subject, [toggle], Trial([], ids))
    np.testing.assert_allclose(found.base_nll, subject.nll(ids), rtol=1e-6)
    with subject.under(toggle):
        np.testing.assert_allclose(found.nll[0], subject.nll(ids), rtol=1e-6)
    for row, text in enumerate(ids):
        sides = []
        for forms in ((), (toggle,)):
            with torch.no_grad():
                if forms:
                    with subject.under(toggle):
                        sides.append(subject.model(torch.tensor([text])).logits[0, :-1].double().log_softmax(-1))
                else:
                    sides.append(subject.model(torch.tensor([text])).logits[0, :-1].double().log_softmax(-1))
        kl = (sides[0].exp() * (sides[0] - sides[1])).sum(-1).mean()
        np.testing.assert_allclose(found.kl[0, row], kl, atol=1e-6)  # float32 logits
    assert found.tokens.tolist() == [len(text) - 1 for text in ids]
    table: Any = found.table(["pruned"], Trial([], ids))
    assert table.loc["untouched"].tolist() == [0, 0] and list(table.columns) == ["nll_added", "kl"]
    np.testing.assert_allclose(table.loc["pruned", "kl"], np.average(found.kl[0], weights=found.tokens))


def test_predictions_are_compared_in_chunks_with_the_same_outcome(monkeypatch) -> None:
    from workbench.methods.pruning import curves

    subject, ids = subject_of("llama"), random_texts(subject_of("llama"), 0, 5)
    toggle = Prune(Plan.of(subject, drop=[1]))
    whole = losses(subject, [toggle], Trial([], ids))
    monkeypatch.setattr(curves, "BASE_BYTES", 1)
    alone = losses(subject, [toggle], Trial([], ids))
    np.testing.assert_allclose(alone.kl, whole.kl, rtol=1e-4)
    np.testing.assert_allclose(alone.nll, whole.nll, rtol=1e-5)


@pytest.mark.parametrize("seed", [2, 3])
def test_dead_units_cost_nothing_until_they_are_used_up(seed: int) -> None:
    subject = half_dead(seed)
    probe = PruningCurve(("amp_out", "wanda_structured", "taylor"), keeps=(0.75, 0.5, 0.35), n_random=4)
    curves: Any = (
        run(probe, subject, random_texts(subject, seed)).curves("kl").set_index(["criterion", "keep"])["value"]
    )
    for name in probe.criteria:
        assert abs(curves[name, 0.75]) < 1e-6 and abs(curves[name, 0.5]) < 1e-6  # float32
        assert 1e-3 < curves[name, 0.35] < curves[CONTROL, 0.35]
    assert curves[CONTROL, 0.75] > 1e-2


def test_scores_dealt_to_other_units_of_their_layer_are_as_good_as_random() -> None:
    """20 draws of each; dealing leaves every layer its distribution of scores."""
    subject = half_dead(0)
    ids = random_texts(subject, 0, 4)
    probe = PruningCurve(("amp_out",), keeps=(0.6,), n_random=20)
    ranking = scored(subject, ids[::2], ("amp_out",)).ranking()
    assert np.array_equal(np.sort(dealt(ranking, 3).neurons), np.sort(ranking.neurons))
    rivals = [("dealt", draw, dealt(ranking, draw)) for draw in range(20)] + probe.control(subject, ranking)
    result = probe.solved(subject, Trial.of(ids), rivals)
    at = {name: result.kl[np.array(result.criteria) == name].mean(axis=1) for name in ("dealt", CONTROL)}
    assert mannwhitneyu(at["dealt"], at[CONTROL]).pvalue > 0.01
    assert len(np.unique(at["dealt"])) > 10 and at["dealt"].min() > 1e-3
    honest = probe.solved(subject, Trial.of(ids), [("amp_out", 0, ranking)])
    assert honest.kl.max() < at["dealt"].min()


@pytest.mark.parametrize("unit", ["group", "head"])
def test_the_control_of_a_global_budget_takes_as_many_units_of_each_layer_and_kind(unit) -> None:
    subject = subject_of("llama")
    probe = PruningCurve(budget=Budget(allocation="global", unit=unit), n_random=4)
    ranking = scored(subject, random_texts(subject, 0), ("amp_out",)).ranking()
    plans = [one.plan(0.3, probe.budget) for one in (ranking, *(r for _, _, r in probe.control(subject, ranking)))]
    families = ("heads", "kv_heads", "neurons")
    counts = [[[plan.kept(layer, name) for name in families] for layer in range(3)] for plan in plans]
    assert all(count == counts[0] for count in counts) and len(set(plans)) == 5


def test_on_the_organism_amp_out_loses_less_than_each_of_five_random_cuts() -> None:
    subject = Subject.organism()
    train = [document.text for document in islice(streams.documents("train", 0, 60), 4)]
    train += [" ".join(recall.filler(Random(seed), 60)) for seed in range(8)]
    held_out = [" ".join(recall.filler(Random(seed), 60, "held_out")) for seed in range(12)]
    scores = scored(subject, train, ("amp_out",))
    rankings = [scores.ranking(), *(
        Ranking(*scores_of("random", subject, None, seed=seed), scores.sizes) for seed in range(5)
    )]  # fmt: skip
    plans = [ranking.plan(0.3, Budget()) for ranking in rankings]
    for plan in plans:
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    nll = losses(subject, [Prune(plan) for plan in plans], Trial([], held_out)).nll.mean(axis=1)
    assert (nll[0] < nll[1:]).all(), nll


def test_parameters_left_are_those_that_act_and_shares_are_those_reached() -> None:
    subject = subject_of("qwen2")
    result = run(SMALL, subject, list(texts()) * 2)
    scores = scored(subject, texts()[:1], ("amp_out",))
    plan = scores.plan(keep=0.6)
    place = int(np.flatnonzero((np.array(result.criteria) == "amp_out") & (result.keeps == 0.6))[0])
    with subject.under(Prune(plan)):
        assert parameter_bytes(subject) == 4 * result.parameters[place]
        subject.nll([texts()[0]])
    assert abs(result.kept[place] - 0.6) < 96 * 3 / scores.sizes.units and result.total * 4 == parameter_bytes(subject)


def test_a_mask_loses_what_a_slice_loses() -> None:
    subject, ids = subject_of("llama"), random_texts(subject_of("llama"), 0, 4)
    found = [run(PruningCurve(("magnitude",), (0.5,), 2, form=form), subject, ids) for form in ("slice", "mask")]
    np.testing.assert_allclose(found[0].nll, found[1].nll, atol=1e-5)  # float32


def test_questions_are_asked_under_every_plan_and_untouched() -> None:
    subject = Subject.organism()
    facts = relations.items("train", 0)[:12]
    nonsense = [Item(facts[0].prompt, "lamp", "nonsense", "statement", "train")]
    trial = Trial([facts[0].prompt], [facts[1].prompt], {"facts": facts, "nonsense": nonsense})
    probe = PruningCurve(("amp_out",), keeps=(0.95, 0.35), n_random=2, budget=Budget(allocation="global"))
    plain: Any = losses(subject, [], trial).table([], trial)
    assert plain.loc["untouched", "facts"] > 0.9 and plain.loc["untouched", "nonsense"] == 0
    result = run(probe, subject, trial)
    table: Any = result.table().set_index(["criterion", "draw", "keep", "measure"])
    assert table.loc[("amp_out", 0, 0.95, "facts"), "base"] > 0.9  # facts it was raised on
    assert table.loc[("amp_out", 0, 0.95, "facts"), "value"] > table.loc[("random", 1, 0.35, "facts"), "value"]
    assert table.loc[("amp_out", 0, 0.95, "nonsense"), "base"] == 0 and (table["low"] <= table["high"]).all()
    assert result.measures == ("nll_added", "kl", "perplexity", "facts", "nonsense")
    assert "of facts, untouched" in str(result.plot("facts").layout.title.text)
    assert len(table) == (1 + 2) * 2 * 5


def test_curves_pool_the_draws_and_the_gap_is_the_difference_of_the_curves() -> None:
    subject, ids = subject_of("llama"), random_texts(subject_of("llama"), 1, 8)
    result = run(SMALL, subject, ids)
    for measure in ("nll_added", "kl"):
        curves: Any = result.curves(measure).set_index(["criterion", "keep"])
        gap, low, high = result.gap("magnitude", 0.6, measure)
        apart = curves["value"][CONTROL, 0.6] - curves["value"]["magnitude", 0.6]
        np.testing.assert_allclose(gap, apart, rtol=1e-9)
        assert low <= gap <= high and (curves["low"] <= curves["value"]).all()
        rows: Any = result.table()
        draws = rows[(rows["criterion"] == CONTROL) & (rows["keep"] == 0.6) & (rows["measure"] == measure)]["value"]
        np.testing.assert_allclose(curves["value"][CONTROL, 0.6], draws.mean(), rtol=1e-9)
        best = result.best(measure)
        assert best in SMALL.criteria and best in str(result.plot(measure).layout.title.text)
    assert result.beside(0.6).index.tolist() == ["amp_out", "magnitude", "random"]
    assert (
        result.beside(0.6).loc["random", "kl"]
        == result.curves("kl").set_index(["criterion", "keep"])["value"]["random", 0.6]
    )
    perplexity: Any = result.curves("perplexity").set_index(["criterion", "keep"])["value"]
    added: Any = result.curves("nll_added").set_index(["criterion", "keep"])["value"]
    base = float(np.average(result.base_nll, weights=result.tokens))
    np.testing.assert_allclose(np.log(perplexity["amp_out", 0.8]), base + added["amp_out", 0.8], rtol=1e-9)


def test_without_draws_there_is_no_control_to_tell_of() -> None:
    result = run(PruningCurve(("amp_out",), (0.7,), 0), subject_of("llama"), list(texts()))
    assert np.isnan(result.gap("amp_out", 0.7)).all() and "random" not in result.finding


def test_a_curve_is_measured_on_top_of_what_acts_already() -> None:
    from workbench import Steer

    subject = subject_of("llama")
    with subject.under(Steer.examples(subject)[0]):
        under = run(SMALL, subject, list(texts()))
    plain = run(SMALL, subject, list(texts()))
    assert not np.allclose(under.base_nll, plain.base_nll, rtol=1e-3)


@pytest.mark.parametrize(
    ("probe", "data", "message"),
    [
        (SMALL, "one text", "two texts or more"),
        (SMALL, ["one text"], "two texts or more"),
        (SMALL, Trial(["a"], []), "at least one held-out text"),
        (SMALL, Trial(["a"], ["a"], {"facts": []}), "one question of each task"),
        (SMALL, [[5, 6], [7]], "held-out text 0 has 1 token"),
        (PruningCurve(("random",)), [[5, 6], [7, 8]], "random is always there"),
        (PruningCurve(()), [[5, 6], [7, 8]], "name some others"),
        (PruningCurve(keeps=(0.0,)), [[5, 6], [7, 8]], "above 0"),
        (PruningCurve(keeps=(0.1,)), [[5, 6], [7, 8]], "at most 0.7000 can leave"),
        (PruningCurve(budget=Budget(allocation={0: 0.1})), [[5, 6], [7, 8]], "uniform"),
    ],
)
def test_what_can_not_be_measured_is_refused(probe, data, message) -> None:
    with pytest.raises(ValueError, match=message):
        probe.run(subject_of("llama"), data)


def test_a_figure_that_is_not_there_is_refused() -> None:
    result = run(PruningCurve(("magnitude",), (0.7,), 1), subject_of("llama"), list(texts()))
    with pytest.raises(ValueError, match="nll_added, kl, perplexity"):
        result.plot("recall")
    with pytest.raises(ValueError, match=r"at=0.3, expected one of 0.7"):
        result.plot(at=0.3)
    for ask in (lambda: result.beside(0.3), lambda: result.gap("magnitude", 0.3)):
        with pytest.raises(ValueError, match=r"at=0.3, expected one of 0.7"):
            ask()
    with pytest.raises(ValueError, match="got criterion 'amp', expected one of magnitude"):
        result.gap("amp", 0.7)


# --- speed


def test_speed_is_measured_by_turns_and_a_mask_is_never_a_speed_up(monkeypatch) -> None:
    from workbench.methods.pruning import speed

    subject = subject_of("llama")
    plan = Plan.of(subject, {layer: {"neurons": range(8), "kv_heads": [0]} for layer in range(3)})
    clock, order = iter(range(10_000)), []
    monkeypatch.setattr(speed, "read_clock", lambda _: float(next(clock)))
    real = speed._once
    monkeypatch.setattr(speed, "_once", lambda *given: order.append(str(subject.active)) or real(*given))
    forms = {"sliced": Prune(plan), "masked": Prune(plan, "mask")}
    table: Any = timed(subject, **forms, prompt_tokens=8, new_tokens=2, repeats=3)
    assert table["form"].tolist() == ["dense", "masked", "sliced"]
    assert len(order) == 4 * 3 and order[:3] != sorted(order)[:3] and order[:3] == order[3:6], (
        "by turns, one to warm up"
    )
    for name in ("prefill_speed_up", "decode_speed_up"):
        assert table[name].isna().tolist() == [True, True, False] and table[name][2] == 1.0  # an even clock
    assert table["decode_ms"].tolist() == [500.0] * 3 and table["tokens_per_second"].tolist() == [2.0] * 3
    with subject.under(Prune(plan)):
        left = parameter_bytes(subject)
        subject.nll([texts()[0]])
    assert table["parameter_bytes"].tolist() == [parameter_bytes(subject), parameter_bytes(subject), left]
    assert table["kv_bytes_per_token"].tolist() == [3 * 128, 3 * 128, 3 * 64]
    assert "saves nothing" in table["verdict"][1] and table["verdict"][2] == ""


def test_where_the_mask_is_not_as_fast_as_the_whole_nothing_is_compared() -> None:
    assert too_noisy({"dense": 1.0, "masked": 1.05, "sliced": 0.4}) == ""
    assert "too noisy to compare" in too_noisy({"dense": 1.0, "masked": 1.2, "sliced": 0.4})
    assert "too noisy to compare" in too_noisy({"dense": 1.0, "masked": 0.8, "sliced": 0.4})
