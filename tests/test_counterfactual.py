"""Counterfactual: closed forms of agreement, edits in prompts and in the model's own text, the same dice elsewhere."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import Clamp, Site, Steer, Subject, plots
from workbench.methods.counterfactual import agreement
from workbench.methods.counterfactual.edits import Edit, plan, read
from workbench.probes.counterfactual import Counterfactual, _planted, expected_agreement
from workbench.result import Result

QUICK = Counterfactual(temperatures=(1.0,), n_samples=12, max_new_tokens=5)
EVERY = replace(QUICK, samplers=("full", "top_k", "top_p", "rank", "inverse_cdf"))
SPEC = {  # V 20, logits 1.5 * normal, moved by 0.5 * normal, seed 0: measured with 200,000 draws of numpy's generator
    "same": 0.7567,
    "fresh": 0.115,
    "largest": 0.793,
    "inverse CDF": 0.508,
    "violations": 0.096,
}
FOUR_SD = 0.004  # of a share of 200,000


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@pytest.fixture(scope="module")
def words(subject: Subject) -> list[str]:
    return sorted(word for word in subject.tokenizer.get_vocab() if word.isalpha())


@pytest.fixture(scope="module")
def edits(words: list[str]) -> list[Edit]:
    reads = {"initial": {"early": tuple(words[:400]), "late": tuple(words[400:])}}
    return [
        Edit(" ".join(words[:6]), " ".join([*words[:3], words[9], *words[4:6]]), name="word", reads=reads),
        Edit(" ".join(words[20:24]), " ".join(words[20:24]), name="nothing", reads=reads),
    ]


@pytest.fixture(scope="module")
def result(subject: Subject, edits: list[Edit]) -> Result:
    return replace(QUICK, temperatures=(0.0, 1.0)).run(subject, edits)


def distributions(seed: int, vocab: int = 30, zeros: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(vocab, 0.3)), rng.dirichlet(np.full(vocab, 0.3))
    p[:zeros], q[zeros // 2 : zeros + 2] = 0.0, 0.0
    return p / p.sum(), q / q.sum()


# Agreement


@pytest.mark.parametrize(("seed", "zeros"), list(product(range(4), (0, 6))))
def test_the_closed_form_is_the_sum_over_all_ratios(seed, zeros):
    p, q = distributions(seed, zeros=zeros)
    slow = sum(
        1.0 / sum(max(p[j] / p[i], q[j] / q[i]) for j in range(len(p))) for i in range(len(p)) if p[i] > 0 and q[i] > 0
    )
    assert agreement.gumbel_agreement(p, q) == pytest.approx(slow, rel=1e-12)
    assert agreement.gumbel_agreement(q, p) == pytest.approx(slow, rel=1e-12)


def test_no_coupling_beats_the_bound_and_gumbel_beats_chance():
    for seed in range(30):
        p, q = distributions(seed)
        same, fresh, largest = expected_agreement(p, q, "full")
        overlap = agreement.inverse_cdf_agreement(p, q)
        assert fresh <= same <= largest + 1e-12 and overlap <= largest + 1e-12
        assert same >= largest / (2 - largest) - 1e-12, "Gumbel-max is within this of the bound (Jaccard of p and q)"


def test_equal_distributions_agree_always_and_disjoint_ones_never():
    p, _ = distributions(0)
    assert agreement.gumbel_agreement(p, p) == pytest.approx(1.0) == agreement.inverse_cdf_agreement(p, p)
    assert agreement.independent_agreement(p, p) == pytest.approx(float((p**2).sum()))
    left, right = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, 0.3, 0.7])
    assert expected_agreement(left, right, "full") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("wrong", [np.ones(3), np.array([1.2, -0.2, 0.0]), np.ones((1, 3)) / 3])
def test_what_is_no_distribution_is_refused(wrong):
    with pytest.raises(ValueError, match="agreement: "):
        agreement.gumbel_agreement(wrong, np.ones(3) / 3)


def slow_distance(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_is_levenshteins_over_the_longer_length():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, (2, 60, 6))
    for ids in (a, b):
        for row, length in zip(ids, rng.integers(0, 7, 60), strict=True):
            row[length:] = agreement.END
    found = agreement.edit_distance(a, b)
    for x, y, distance in zip(a, b, found, strict=True):
        x, y = [int(t) for t in x if t >= 0], [int(t) for t in y if t >= 0]
        assert distance == pytest.approx(slow_distance(x, y) / max(len(x), len(y), 1))
    assert (found == agreement.edit_distance(b, a)).all()


def test_texts_that_end_disagree_where_only_one_goes_on():
    a, b = np.array([[1, 2, 3, -1, -1], [-1] * 5]), np.array([[1, 2, 4, 5, -1], [-1] * 5])
    assert agreement.equal_share(a, b).tolist() == [0.5, 1.0]
    assert agreement.common_prefix(a, b).tolist() == [2, 0]
    equal, counted = agreement.equal_and_counted(a, b)
    assert counted.sum(axis=1).tolist() == [4, 0] and not equal[:, 3:].any()
    with pytest.raises(ValueError, match="expected"):
        agreement.equal_share(a, b[:1])


def test_drawing_kinds_by_number_is_the_bootstrap_over_items():
    rng = np.random.default_rng(0)
    part = rng.integers(0, 2, (80, 3)).astype(float)
    whole = np.maximum(part, rng.integers(0, 2, (80, 3)))
    whole[:, 2] = part[:, 2] = 0.0
    estimate, low, high = agreement.share_interval(part, whole, n_bootstrap=4000)
    drawn = rng.integers(0, 80, (4000, 80))
    shares = part[drawn].sum(1)[:, :2] / whole[drawn].sum(1)[:, :2]
    np.testing.assert_allclose(estimate[:2], part.sum(0)[:2] / whole.sum(0)[:2])
    np.testing.assert_allclose(
        [low[:2], high[:2]], np.quantile(shares, [0.025, 0.975], axis=0), atol=0.02
    )  # Monte Carlo
    assert np.isnan([estimate[2], low[2], high[2]]).all()
    with pytest.raises(ValueError, match="no items"):
        agreement.share_interval(np.zeros(0))


# Planted truth


def test_the_numbers_of_the_specification_come_out():
    planted = _planted("logits", 0, edited=True, n_pairs=200_000)
    result = planted.solve()
    table = result.first_token().set_index(["sampler", "kind"])
    same, fresh = (table.loc[("full", kind)] for kind in ("counterfactual", "interventional"))
    assert same["expected"] == pytest.approx(SPEC["same"], abs=5e-5)
    assert same["observed"] == pytest.approx(SPEC["same"], abs=FOUR_SD)
    assert fresh["observed"] == pytest.approx(SPEC["fresh"], abs=FOUR_SD)
    assert same["largest"] == pytest.approx(SPEC["largest"], abs=5e-4)
    assert table.loc[("inverse_cdf", "counterfactual"), "observed"] == pytest.approx(SPEC["inverse CDF"], abs=FOUR_SD)
    stability = result.stability(0.0).set_index("sampler")
    assert stability.loc["full", "violations"] == 0
    assert stability.loc["inverse_cdf", "share"] == pytest.approx(SPEC["violations"], abs=FOUR_SD)
    for kind, p in (("factual", planted.arrays["p"]), ("counterfactual", planted.arrays["q"])):
        ids = getattr(result, kind)[result.sampler == 0, 0]
        assert np.abs(np.bincount(ids, minlength=20) / len(ids) - p).max() < FOUR_SD


def test_an_identity_edit_changes_nothing_and_its_twin_agrees_by_chance(subject, edits):
    found = replace(EVERY, n_samples=200, max_new_tokens=1).run(subject, edits[1:])
    assert np.array_equal(found.factual, found.counterfactual)
    twin = found.first_token().query("kind == 'interventional'")
    four_sd = 4 * np.sqrt(twin["expected"] * (1 - twin["expected"]) / 200)
    assert ((twin["observed"] - twin["expected"]).abs() <= four_sd).all(), twin


def test_a_synonym_with_the_same_embedding_changes_nothing():
    subject = Subject.tiny(seed=3)
    with torch.no_grad():
        weights = subject.model.get_input_embeddings().weight
        weights[40] = weights[50]
    found = EVERY.run(subject, [Edit((5, 6, 40, 7), (5, 6, 50, 7)), Edit((5, 6), position=4, ids=(40,), name="a")])
    first = found.edit == 0
    assert np.array_equal(found.factual[first], found.counterfactual[first])
    assert not np.array_equal(found.factual[first], found.interventional[first])


def test_a_models_first_token_stays_as_often_as_the_closed_form_says(subject, edits):
    """The model's logits are made ten times as sharp, so that the edit moves more than a little."""
    probe = replace(EVERY, temperatures=(0.1,), n_samples=600, max_new_tokens=1)
    table = probe.run(subject, edits[:1]).first_token().query("sampler != 'rank'")
    sd = np.sqrt(table["expected"] * (1 - table["expected"]) / 600)
    assert (np.abs(table["observed"] - table["expected"]) < 4 * sd).all(), table
    full = table.query("sampler == 'full' and kind == 'counterfactual'").iloc[0]
    assert full["expected"] < full["largest"] < 0.999, "the edit should move the distribution"


def test_gumbel_max_is_stable_on_a_model_and_inverse_cdf_is_not(subject, edits):
    probe = replace(QUICK, temperatures=(0.1,), n_samples=600, max_new_tokens=1, samplers=("full", "inverse_cdf"))
    table = probe.run(subject, edits[:1]).stability().set_index("sampler")
    assert table.loc["full", "violations"] == 0 and table.loc["full", "changed"] > 20
    assert table.loc["inverse_cdf", "violations"] > 0


# The probe


def test_at_temperature_0_the_twins_are_one_and_greedy(subject, edits, result):
    cold = result.temperature == 0
    assert cold.sum() == 2 * len(edits) and np.array_equal(result.counterfactual[cold], result.interventional[cold])
    greedy = subject.generate([edit.edited for edit in edits], max_new_tokens=5).ids
    for edit, ids in zip(result.edit[cold], result.counterfactual[cold], strict=True):
        assert tuple(ids[ids >= 0]) == greedy[edit]


def test_what_was_generated_can_be_generated_again_by_hand(subject, edits, result):
    probe = replace(QUICK, temperatures=(0.0, 1.0))
    at = int(np.flatnonzero((result.temperature == 1) & (result.sample == 7) & (result.sampler == 1))[0])
    for kind, prompt, fresh in (
        ("factual", edits[0].prompt, False),
        ("counterfactual", edits[0].edited, False),
        ("interventional", edits[0].edited, True),
    ):
        row = probe.row(0, 7, fresh=fresh)
        made = subject.generate([prompt], max_new_tokens=5, dice=probe.dice("inverse_cdf", 1.0), rows=[row])
        ids = getattr(result, kind)[at]
        assert made.ids[0] == tuple(ids[ids >= 0]) and made.texts[0] == result.texts[kind][at]
    assert result.log_prob[at, 2, : len(made.ids[0])] == pytest.approx(made.log_probs[0], abs=1e-4)  # another batch


def test_no_two_texts_share_a_throw():
    probe = Counterfactual(n_samples=5)
    rows = [probe.row(e, s, fresh=fresh) for e, s, fresh in product(range(4), range(5), (False, True))]
    assert sorted(rows) == list(range(40))


def test_an_edit_in_the_models_own_text_keeps_what_was_written_before(subject):
    prompt, start = (5, 6, 7), 2
    edit = Edit(prompt, position=4, ids=(30,), name="own")
    found = QUICK.run(subject, [edit])
    probe_dice = QUICK.dice("full", 1.0)
    for k in range(12):
        row = QUICK.row(0, k)
        whole = subject.generate([prompt], max_new_tokens=7, dice=probe_dice, rows=[row]).ids[0]
        edited = [*prompt, *whole[: start - 1], 30]
        again = subject.generate([edited], max_new_tokens=5, dice=probe_dice, rows=[row]).ids[0]
        ids, changed = found.factual[k], found.counterfactual[k]
        assert tuple(ids[ids >= 0]) == whole[start:] and tuple(changed[changed >= 0]) == again


def test_texts_that_end_before_the_edit_are_left_out_and_noted(monkeypatch):
    subject = Subject.tiny()
    ends = subject.generate(
        [(5, 6)] * 12, max_new_tokens=1, dice=QUICK.dice("full", 1.0), rows=[QUICK.row(0, k) for k in range(12)]
    )
    monkeypatch.setattr(subject, "_end_ids", lambda: [ids[0] for ids in ends.ids[:5]])
    found = QUICK.run(subject, [Edit((5, 6), position=6, ids=(9,))])
    assert len(found.factual) < 24 and f"{24 - len(found.factual)} of 24 texts ended" in found.notes[0]
    monkeypatch.setattr(subject, "_end_ids", lambda: list(range(subject.model.config.vocab_size)))
    with pytest.raises(ValueError, match="every text ended before its edit"):
        QUICK.run(subject, [Edit((5, 6), position=6, ids=(9,))])


def test_a_text_that_ends_with_the_edited_token_has_none_that_could_stay(monkeypatch):
    subject, probe = Subject.tiny(), replace(QUICK, n_samples=1, samplers=("full",))
    whole = subject.generate([(5, 6)], max_new_tokens=2, dice=probe.dice("full", 1.0), rows=[0]).ids[0]
    monkeypatch.setattr(subject, "_end_ids", lambda: [whole[1]])
    found = probe.run(subject, [Edit((5, 6), position=3, ids=(9,))])
    assert (found.factual == -1).all() and found.counterfactual[0, 0] >= 0
    assert (found.first_token()[["observed", "expected", "largest"]] == 0).all(axis=None)


def test_the_same_edit_said_in_two_ways_is_the_same(subject):
    as_prompt = QUICK.run(subject, [Edit((5, 6, 7, 8), (5, 9, 7, 8))])
    as_ids = QUICK.run(subject, [Edit((5, 6, 7, 8), position=1, ids=(9,))])
    assert as_prompt.edit_positions == as_ids.edit_positions == (1,)
    pd.testing.assert_frame_equal(as_prompt.table(), as_ids.table())


def test_noise_can_follow_the_distance_from_an_edit_that_lengthens_the_prompt(subject):
    """A push that drowns what was read: then, with the throws at the same distance, a longer prompt changes nothing."""
    edit = Edit((5, 6, 7), (5, 5, 6, 7), name="longer")
    with subject.under(Steer(torch.ones(32) * 1e4, Site(subject.n_layers - 1, "resid_out"))):
        by_position = QUICK.run(subject, [edit])
        by_distance = replace(QUICK, noise_follows="distance").run(subject, [edit])
    assert by_distance.summary().query("measure == 'equal_share'")["value"].iloc[0] > 0.95
    assert by_position.summary().query("measure == 'equal_share'")["value"].iloc[0] < 0.5
    assert by_distance.noise_follows == "distance"


@pytest.mark.parametrize("rule", ["prompt", "generated", "last"])
def test_toggles_that_know_the_prompt_keep_it_when_the_models_own_text_is_edited(subject, rule):
    """An identity edit in the model's own text is the control: under any rule nothing may change."""
    toggle = Steer(torch.linspace(-1, 1, 32), Site(1, "resid_out"), 3.0, rule)
    probe = replace(QUICK, n_samples=1)
    with subject.under(toggle):
        dice = probe.dice("full", 1.0)
        whole = subject.generate([(5, 6, 7)], max_new_tokens=8, dice=dice, rows=[0]).ids[0]
        found = probe.run(subject, [Edit((5, 6, 7), position=5, ids=whole[2:3])])
    at = found.sampler == 0
    assert len(whole) > 3 and np.array_equal(found.factual[at], found.counterfactual[at])


def test_a_neutral_toggle_changes_nothing_and_the_same_dice_tell_two_models_apart(subject, edits, result):
    probe = replace(QUICK, temperatures=(0.0, 1.0))
    with subject.under(Steer.neutral(subject)):
        neutral = probe.run(subject, edits)
    assert (result.against(neutral).query("kind == 'same dice'")["equal_share"].dropna() == 1).all()
    with subject.under(Clamp({Site(0, "neurons"): tuple(range(20))}, to=0.0)):
        hurt = probe.run(subject, edits)
    table = result.against(hurt).query("edit == 'word' and sampler == 'full' and position_after_edit == 0")
    share = table.set_index("kind")["equal_share"]
    assert share["other dice"] < share["same dice"] <= 1
    figure = result.plot("models", other=hurt, other_name="with 20 neurons silenced")
    assert "20 neurons silenced" in figure.layout.title.text


def test_flips_count_what_another_model_reads_otherwise(subject, edits, result):
    with subject.under(Steer(torch.linspace(-1, 1, 32), Site(1, "resid_out"), 6.0)):
        pushed = replace(QUICK, temperatures=(0.0, 1.0)).run(subject, edits)
    table = result.flips(pushed)
    assert set(table.groupby(["edit", "sampler", "temperature", "kind"])["count"].sum()) == {1, 12}
    at = (result.edit == 0) & (result.temperature == 1) & (result.sampler == 0)
    values = [
        [read(text, edits[0].reads["initial"]) for text in some.texts["factual"][at]] for some in (result, pushed)
    ]
    row = table.query("edit == 'word' and temperature == 1 and sampler == 'full'").set_index(
        ["kind", "before", "after"]
    )
    both = sum(pair == ("early", "late") for pair in zip(*values, strict=True))
    assert row["count"].get(("same dice", "early", "late"), 0) == both
    rolled = sum(pair == ("early", "late") for pair in zip(values[0], np.roll(values[1], -1), strict=True))
    assert row["count"].get(("other dice", "early", "late"), 0) == rolled
    assert not len(result.flips(result).query("kind == 'same dice' and before != after"))


def test_results_of_other_dice_are_not_compared(subject, edits, result):
    for probe, message in (
        (replace(QUICK, temperatures=(0.0, 1.0), seed=1), "the seed differ"),
        (QUICK, "differ in edit"),
        (replace(QUICK, temperatures=(0.0, 1.0), max_new_tokens=2), "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            result.against(probe.run(subject, edits))
    with pytest.raises(ValueError, match="at least two"):
        one = replace(QUICK, n_samples=1).run(subject, edits)
        one.against(one)
    with pytest.raises(ValueError, match="greedy only"):
        cold = replace(QUICK, temperatures=(0.0,)).run(subject, edits)
        cold.against(cold)
    with pytest.raises(ValueError, match="no second result"):
        result.plot("models")


def test_a_pair_that_was_left_alone_is_not_its_own_control(result):
    kept = (result.edit == 0) | (result.sample == 0)
    arrays = {name: value[kept] for name, value in vars(result).items() if isinstance(value, np.ndarray)}
    few = replace(result, **arrays, texts=result.texts[kept].reset_index(drop=True))
    for compare in (few.against, few.flips):
        with pytest.raises(ValueError, match="got one sample of edit 'nothing', expected at least two"):
            compare(few)


# Attributes and figures


def test_the_value_whose_word_comes_first_is_read():
    style = {"brace": ("function", "}"), "layout": ("def",)}
    assert read("function add def", style) == "brace" and read("a def }", style) == "layout"
    assert read("nothing of it", style) == read("", style) == "none"
    assert read('She said: "He ran."', {"he": ("he", "He"), "she": ("She",)}) == "she"


def test_attribute_tables_count_every_pair_once(result):
    table = result.attributes()
    groups = table.groupby(["edit", "sampler", "temperature", "kind"])["count"].sum()
    assert set(groups) == {1, 12} and table["share"].between(table["low"], table["high"]).all()
    changed = result.changed().set_index(["edit", "sampler", "temperature", "kind"])["share"]
    assert changed["nothing", "full", 1.0, "counterfactual"] == 0 < changed["nothing", "full", 1.0, "interventional"]
    own = result.changed(lambda text: str(len(text.split()) > 3), "long")
    assert set(own["attribute"]) == {"long"} and len(own) == len(changed)


def test_the_table_agrees_with_the_arrays(result):
    table = result.table()
    assert tuple(table.columns) == result.columns and len(table) == 2 * len(result.factual)
    row = table.query("kind == 'interventional'").iloc[5]
    assert row["tokens"] == (result.interventional[5] >= 0).sum() and row["edit_position"] == result.edit_positions[0]


def test_the_text_view_marks_what_is_new(result):
    figure = result.plot("text", temperature=1.0, pair=2)
    texts = [annotation.text for annotation in figure.layout.annotations]
    at = int(np.flatnonzero((result.edit == 0) & (result.sampler == 0) & (result.temperature == 1))[2])
    new = set(result.counterfactual[at]) - set(result.factual[at])
    blue = "".join(texts).count("color:#0072B2")
    assert blue >= len(new) > 0
    quiet = result.plot("text", edit="nothing", pair=0)
    assert "0 of" in quiet.layout.title.text and "#0072B2" not in "".join(a.text for a in quiet.layout.annotations)


def test_passages_are_broken_at_words_and_show_markup_as_text():
    figure = plots.passages([("one", [("<eos> a&b", None), (" " + "word " * 40, plots.BLUE)])], title="t", width=30)
    name, first, *rest = (annotation.text for annotation in figure.layout.annotations)
    assert name == "<b>one</b>" and first.startswith("&lt;eos&gt; a&amp;b") and len(rest) > 10
    assert all(len(re.sub(r"<[^>]*>", "", line)) <= 30 for line in rest)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"view": "nonsense"}, "got view 'nonsense'"),
        ({"edit": "x"}, "got edit 'x', expected one of word, nothing"),
        ({"sampler": "rank"}, "got sampler 'rank'"),
        ({"temperature": 0.7}, r"got temperature 0\.7"),
        ({"view": "text", "pair": 12}, "got pair 12, expected 0 to 11"),
        ({"view": "attributes", "attribute": "x"}, "reads no 'x'"),
    ],
)
def test_views_that_are_not_there_are_refused(result, view, message):
    with pytest.raises(ValueError, match=message):
        result.plot(**view)


# Bad input


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit((5, 6)), "expected one of them"),
        (Edit((5, 6), (5, 7), position=1, ids=(3,)), "expected one of them"),
        (Edit((5, 6), position=1), "got ids=()"),
        (Edit((5, 6), position=1, ids=(10**6,)), "expected token ids from 0 to"),
        (Edit((5, 6), position=-1, ids=(3,)), "got position -1"),
        (Edit((), (5,)), "is empty"),
        (Edit("xyzzy", (5,)), "not in this model's vocabulary"),
        (Edit((5, 6), (5, 7), reads={"who": {"he": "he"}}), "among its reads, expected a list"),
    ],
)
def test_edits_that_make_no_sense_are_refused(subject, edit, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        plan(subject, edit)


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, [], "at least one"),
        ({}, ["a text"], "list of Edit"),
        ({"n_samples": 0}, None, "n_samples=0"),
        ({"samplers": ()}, None, "samplers="),
        ({"samplers": ("full", "full")}, None, "Name each once"),
        ({"noise_follows": "luck"}, None, "noise_follows='luck'"),
        ({"samplers": ("best",)}, None, "expected a tuple, each 'full'"),
        ({"temperatures": (-1.0,)}, None, r"temperatures=\(-1.0,\), expected at least 0"),
        ({"max_new_tokens": 600}, None, "the context is 512"),
    ],
)
def test_settings_that_make_no_sense_are_refused(subject, edits, settings, data, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **settings).run(subject, edits if data is None else data)
