"""SNMF: the laws of the factorisation, references beside it, planted truth, concepts, steering, files, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from workbench import Site, Steer, Subject
from workbench.methods.snmf import causal, concepts
from workbench.methods.snmf.activations import read_activations, read_sites
from workbench.methods.snmf.baselines import k_means, principal_axes
from workbench.methods.snmf.concepts import LabelledTexts, Question
from workbench.methods.snmf.factorise import (
    SemiNMF,
    best_columns,
    cosines,
    explained_share,
    gram_loss,
    hierarchy,
    in_blocks,
    matched_cosines,
    renewed,
    sparsest,
    weights_of,
)
from workbench.probes.snmf import SNMF, simulated
from workbench.unembedding import Unembedding


def small(seed: int = 0, n: int = 300, m: int = 40, k: int = 4) -> torch.Tensor:
    """Activations (n, m) in float64 with k features."""
    return simulated(seed, signal=True, m=m, n=n, k=k)[0].double()


def explicit_loss(activations: torch.Tensor, features: torch.Tensor, weights: torch.Tensor) -> float:
    return float((activations.double() - weights.double() @ features.double().T).square().sum())


# --- laws of the factorisation


@pytest.mark.parametrize("init", ["random", "svd", "knn"])
@pytest.mark.parametrize("update", ["hals", "multiplicative"])
def test_weights_are_never_negative_columns_have_norm_one_and_features_are_sparse(init, update):
    fit = SemiNMF(4, 0.1, init, update, max_iterations=15).fit([small()])
    assert (fit.weights >= 0).all() and ((fit.features != 0).sum(0) <= 4).all()
    torch.testing.assert_close(fit.weights.norm(dim=0), torch.ones(4), atol=1e-5, rtol=0)  # float32


@pytest.mark.parametrize("update", ["hals", "multiplicative"])
def test_without_sparsity_the_loss_never_rises(update):
    loss = SemiNMF(4, 1.0, update=update, max_iterations=60, tolerance=0).fit([small()]).loss
    assert (loss.diff() <= 1e-9 * loss[:-1]).all()  # the ridge of 1e-6 on columns of norm 1


def test_the_exact_steps_never_raise_the_loss_with_sparsity_either():
    loss = SemiNMF(6, 0.1, explore=5, max_iterations=80, tolerance=0).fit([small()]).loss[6:]
    assert (loss.diff() <= 1e-12).all()


def test_the_loss_from_products_is_the_explicit_loss():
    activations, generator = small(), torch.Generator().manual_seed(1)
    weights = torch.rand(300, 4, generator=generator, dtype=torch.float64)
    features = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    energy = float(activations.square().sum())
    found = gram_loss(energy, activations.T @ weights, weights.T @ weights, features)
    assert found == pytest.approx(explicit_loss(activations, features, weights), rel=5e-8)


def test_the_reported_loss_is_that_of_the_factors():
    activations = small()
    fit = SemiNMF(4, 0.1, max_iterations=40).fit([activations])
    explicit = explicit_loss(activations, fit.features, fit.weights) / fit.energy
    assert fit.best_loss == pytest.approx(explicit, rel=1e-5)  # factors come back in float32


def test_the_order_of_tokens_permutes_the_weights_only():
    activations, order = small(), torch.randperm(300, generator=torch.Generator().manual_seed(2))
    settings = SemiNMF(3, 0.1, init="svd", max_iterations=60)
    first, second = (settings.fit([values]) for values in (activations, activations[order]))
    # the jitter of the start is drawn by place, so the fits meet at the same optimum only
    assert first.best_loss == pytest.approx(second.best_loss, rel=1e-3)
    partners = cosines(first.features, second.features).abs()
    assert partners.max(1).values.min() > 0.99
    torch.testing.assert_close(
        first.weights[order], second.weights[:, partners.argmax(1)], atol=5e-3, rtol=0
    )  # two ends of one valley, stopped at a gain of 1e-4


@pytest.mark.parametrize("update", ["hals", "multiplicative"])
def test_blocks_give_what_one_piece_gives(update):
    activations = small()
    settings = SemiNMF(4, 0.1, init="knn", update=update, max_iterations=30)
    start = settings._start([activations], 0, "cpu")[0]
    whole, parts = [start.clone()], [part.clone() for part in start.split(70, dim=1)]
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for weights, blocks in ((whole, [activations]), (parts, in_blocks(activations, 70))):
        gram, cross = settings._pass(blocks, weights, features, "cpu")
        torch.testing.assert_close(torch.cat(weights, 1), torch.cat(whole, 1))
        torch.testing.assert_close(gram, whole[0] @ whole[0].T)
        torch.testing.assert_close(cross, (whole[0] @ activations).T)


def test_the_update_of_weights_is_the_textbook_loop():
    generator = torch.Generator().manual_seed(0)
    activations, features = small(n=20), torch.randn(40, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(4, 20, generator=generator, dtype=torch.float64)
    expected = weights.clone()
    for token in range(20):  # one coordinate at a time, from the residual itself
        for k in range(4):
            residual = activations[token] - features @ expected[:, token]
            step = residual @ features[:, k] / features[:, k].square().sum()
            expected[k, token] = max(0.0, expected[k, token] + step)
    found = renewed(weights, features.T @ activations.T, features.T @ features, "hals", 1)
    torch.testing.assert_close(found, expected)


def test_a_column_step_is_the_best_sparse_column_of_all():
    activations, generator = small(m=6, k=2, n=50), torch.Generator().manual_seed(0)
    weights = torch.rand(50, 1, generator=generator, dtype=torch.float64)
    zero = torch.zeros(6, 1, dtype=torch.float64)
    found = best_columns(zero, activations.T @ weights, weights.T @ weights, keep=0.3)  # 2 of 6
    losses = {}
    for pair in [(i, j) for i in range(6) for j in range(i)]:
        column = zero.clone()
        column[list(pair)] = (activations.T @ weights / weights.square().sum())[list(pair)]
        losses[pair] = explicit_loss(activations, column, weights)
    assert explicit_loss(activations, found, weights) == pytest.approx(min(losses.values()))


def test_one_feature_without_sparsity_is_the_best_non_negative_rank_one_fit():
    activations = small().abs()  # then the leading singular pair is non-negative: Perron and Frobenius
    fit = SemiNMF(1, 1.0, max_iterations=300, tolerance=1e-12).fit([activations])
    singular = torch.linalg.svdvals(activations)
    assert fit.best_loss == pytest.approx(float(1 - singular[0] ** 2 / singular.square().sum()), rel=1e-5)


def test_winner_takes_all_keeps_the_largest_and_counts_without_rounding_up_by_noise():
    column = torch.arange(1.0, 301.0)[:, None] * torch.tensor([1.0, -1.0])
    kept = sparsest(column, 0.01)  # .01 * 300 is 3.0000000000000004 in binary
    assert (kept != 0).sum(0).tolist() == [3, 3] and kept[-3:].abs().tolist() == column[-3:].abs().tolist()


def test_weights_of_new_tokens_are_the_non_negative_least_squares():
    from scipy.optimize import nnls

    activations = small(n=12)
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = weights_of(features, [activations], sweeps=400)
    expected = np.stack([nnls(features.numpy(), row)[0] for row in activations.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)
    gap = explicit_loss(activations, features, torch.from_numpy(expected)) / float(activations.square().sum())
    assert explained_share(features, [activations]) == pytest.approx(1 - gap, abs=1e-6)


# --- planted truth: what finds features and what does not


def test_sparsity_identifies_features_and_a_good_fit_alone_does_not():
    activations, truth = simulated(3, signal=True)
    found = {keep: SemiNMF(10, keep).fit([activations], seed=1) for keep in (0.02, 1.0)}
    right = {keep: int((matched_cosines(truth, fit.features).abs() > 0.9).sum()) for keep, fit in found.items()}
    assert right[0.02] == 10 and right[1.0] <= 5, right
    assert found[1.0].best_loss < found[0.02].best_loss  # the better fit is the wrong one


def test_hals_needs_fewer_iterations_than_the_multiplicative_update_to_the_same_loss():
    activations, _ = simulated(0, signal=True, n=2000)
    slow, fast = (
        SemiNMF(10, 1.0, update=update, max_iterations=150, tolerance=0).fit([activations]).loss
        for update in ("multiplicative", "hals")
    )
    reached = int((fast <= slow[-1]).nonzero()[0])
    assert reached <= 150 / 5, f"{reached} iterations"  # an iteration costs about the same: see bench/snmf.py


def test_a_matching_is_signed_and_one_to_one():
    a = torch.eye(5, dtype=torch.float64)[:, :3]
    assert matched_cosines(a, -a[:, [2, 0, 1]]).tolist() == [-1.0, -1.0, -1.0]
    assert torch.isnan(matched_cosines(a, a[:, :1])).sum() == 2


def test_parents_of_features_use_the_same_neurons():
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(40, 2)
    base[:8, 0], base[20:28, 1] = 1.0, 1.0
    children = base.repeat_interleave(3, 1) * (1 + 0.1 * torch.rand(40, 6, generator=generator))
    (parents, weights), *_ = hierarchy(children, (2,), SemiNMF(6, 0.1))
    chosen = weights.argmax(1).tolist()
    assert len(set(chosen[:3])) == len(set(chosen[3:])) == 1 and chosen[0] != chosen[5]
    assert cosines(parents, base).max(1).values.min() > 0.95


# --- baselines


def test_principal_axes_are_those_of_the_covariance():
    values = small(m=30) * torch.linspace(3, 0.1, 30, dtype=torch.float64)
    axes = principal_axes(in_blocks(values, 77), 3)
    expected = torch.linalg.eigh(torch.cov(values.T)).eigenvectors.flip(1)[:, :3]
    assert (axes.double() * expected).sum(0).abs().min() > 0.999


def test_k_means_finds_separate_groups():
    generator = torch.Generator().manual_seed(0)
    middle = 10 * torch.randn(3, 5, generator=generator)
    values = middle.repeat_interleave(50, 0) + 0.1 * torch.randn(150, 5, generator=generator)
    centres, nearest = k_means(in_blocks(values, 40), 3)
    assert torch.cdist(middle, centres).min(1).values.max() < 0.1
    assert [len(set(part.tolist())) for part in torch.cat(nearest).split(50)] == [1, 1, 1]


# --- concepts


def test_the_auc_is_scikit_learns_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    positive = np.arange(60) < 20
    scores = rng.normal(size=60).round(1) + positive
    value, low, high = concepts.auc_interval(scores, positive)
    assert value == pytest.approx(roc_auc_score(positive, scores)) and low < value < high


def test_half_of_each_label_is_held_out():
    data = LabelledTexts(("a", "b", "c", "d", "e"), ("x", "x", "y", "", "y"))
    assert data.held_out.tolist() == [False, True, False, False, True]


def test_labels_of_the_corpus_mark_the_topical_words():
    data = concepts.topics(2)
    words = {q.concept: set(q.words) for q in data.questions}
    for text, label, spans in zip(data.texts, data.labels, data.spans, strict=True):
        assert spans and {text[a:b] for a, b in spans} <= words[label]


def test_the_ceiling_is_what_the_best_push_reaches():
    base, kl = 0.1, 0.5
    up, down = (causal.bound(base, kl, sign) for sign in (1, -1))
    for q in (up, down):  # the best push only moves mass between the set and the rest: its KL is this
        assert base * np.log(base / q) + (1 - base) * np.log((1 - base) / (1 - q)) == pytest.approx(kl)
    assert down < base < up


def test_words_that_begin_alike_belong_to_no_concept():
    subject = Subject.tiny("llama")
    questions = [Question("a", ("long ago a",), ("sailor", "king")), Question("b", ("long ago a",), ("king",))]
    ids = causal.first_ids(subject, questions)
    assert ids["b"] == [] and ids["a"] == [subject.tokenizer.get_vocab()["sailor"]]


# --- on models


@pytest.fixture(scope="module")
def organism() -> Subject:
    return Subject.organism()


@pytest.fixture(scope="module")
def result(organism):
    probe = SNMF(n_features=40, keep=0.03, restarts=2, init="svd", max_iterations=100, levels=(10,))
    return probe.run(organism, concepts.topics(12))


def test_a_feature_per_topic_is_found_on_the_organism_and_not_for_shuffled_labels(result):
    mean = result.detection.groupby("method")["auc"].mean()
    assert mean[concepts.FACTORS] > 0.95, mean
    assert mean[concepts.FACTORS] > mean[concepts.RANDOM] + 0.03, mean
    assert mean[concepts.SHUFFLED] == pytest.approx(0.5, abs=0.06), mean


def test_steering_by_a_topics_feature_raises_its_words_more_than_controls_of_equal_kl(organism):
    data = concepts.topics(12)
    data = replace(data, questions=data.questions[::5])
    probe = SNMF(n_features=40, keep=0.03, restarts=1, init="svd", max_iterations=60, target_kl=(0.5,), signs=(1, -1))
    steering = probe.run(organism, data).steering
    assert steering["reached"].all()
    mass = steering.groupby(["method", "sign"])["mass"].mean()
    base = steering["base"].mean()
    for control in (concepts.RANDOM, concepts.OTHER):
        assert mass[concepts.FACTORS, 1] > mass[control, 1] + 0.1, mass
    assert mass[concepts.FACTORS, -1] < base / 2, mass  # the other sign takes the words away
    assert (steering["mass"] <= steering["bound"] + 1e-6)[steering["sign"] == 1].all()
    assert (steering["mass"] >= steering["bound"] - 1e-6)[steering["sign"] == -1].all()


def test_a_feature_steers_only_the_model_it_was_found_on(result, organism):
    direction = result.feature("sea").direction()
    assert direction.site == Site(3, "neurons") and direction.norm == pytest.approx(1)
    with organism.under(Steer(direction, direction.site, 5.0)):
        organism.capture(["long ago a"], [Site(3, "resid_out")])
    twin = Subject.tiny("organism")
    with pytest.raises(ValueError, match="was found on model"), twin.under(Steer(direction, direction.site)):
        pass


def test_contexts_hold_the_token_that_the_result_names(result):
    data = concepts.topics(12)
    for row in result.tokens.iloc[::17].itertuples():
        assert row.before + row.token + row.after in data.texts[row.text]
        assert result.text[result.weights[:, row.feature] > 0].tolist().count(row.text) > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_written_words_are_those_that_a_push_raises_in_the_last_layer(family):
    """Adding a little of a feature must raise the logits of its words, against their mean over the vocabulary."""
    subject = Subject.tiny(family)
    texts = concepts.topics(1).texts
    layer = subject.n_layers - 1
    found = SNMF(n_features=3, keep=0.1, layer=layer, restarts=1, max_iterations=10, n_words=20).run(subject, texts)
    site, direction = Site(layer, "resid_out"), found.feature(0).direction()
    unembedding, prompts = Unembedding.of(subject), texts[:3]
    before = subject.capture(prompts, [site], tokens="last")[site]
    with subject.under(Steer(direction, direction.site, 0.05)):
        after = subject.capture(prompts, [site], tokens="last")[site]
    moved = (unembedding.logits(after) - unembedding.logits(before)).mean(0)
    words = found.vocabulary[found.vocabulary["feature"] == 0]
    up, down = (moved[words[words["sign"] == sign]["token_id"].tolist()].mean() for sign in (1, -1))
    assert up > moved.mean() > down


def test_a_file_gives_what_memory_gives():
    subject, texts = Subject.tiny("llama"), concepts.topics(1).texts
    site = Site(1, "neurons")
    memory, disk = (read_activations(subject, texts, site, on_disk=on_disk) for on_disk in (False, True))
    assert torch.equal(torch.cat(list(memory.blocks)), torch.cat(list(disk.blocks)))
    probe = SNMF(n_features=5, keep=0.1, restarts=1, max_iterations=10)
    results = [replace(probe, on_disk=on_disk).run(subject, texts) for on_disk in (False, True)]
    assert np.array_equal(results[0].features, results[1].features)


def test_several_sites_are_read_in_one_run_as_each_alone():
    subject, texts = Subject.tiny("llama"), concepts.topics(1).texts
    sites = [Site(1, "neurons"), Site(0, "resid_out")]
    for site, read in zip(sites, read_sites(subject, texts, sites), strict=True):
        alone = read_activations(subject, texts, site)
        assert torch.equal(torch.cat(list(read.blocks)), torch.cat(list(alone.blocks)))
        assert torch.equal(read.text, alone.text) and torch.equal(read.ids, alone.ids)


def test_first_tokens_are_left_out_and_padding_never_enters():
    subject, texts = Subject.tiny("gpt2"), ["long ago a king", "the king was tired . the end"]
    read = read_activations(subject, texts, Site(0, "neurons"))
    assert (read.position > 0).all() and len(read) == sum(subject.tokenize(texts).lengths) - 2
    alone = read_activations(subject, texts[:1], Site(0, "neurons"))
    torch.testing.assert_close(torch.cat(list(read.blocks))[: len(alone)], torch.cat(list(alone.blocks)))


# --- bad input


def test_a_model_without_neurons_says_why():
    with pytest.raises(ValueError, match="neurons"):
        SNMF().run(Subject.tiny("mixtral"), ["long ago a king"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_features": 0}, "at least one feature"),
        ({"n_features": 2, "keep": 0.0}, "share of neurons"),
        ({"n_features": 2, "init": "zeros"}, "expected one of random, svd, knn"),
        ({"n_features": 2, "update": "adam"}, "expected one of hals"),
        ({"n_features": 500}, "at least 500 tokens"),
        ({"n_features": 50, "init": "svd"}, "no more components to start from"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, message):
    with pytest.raises(ValueError, match=message):
        SemiNMF(**settings).fit([small()])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_activations_without_a_finite_size_are_refused(value):
    with pytest.raises(ValueError, match="sum of squares"):
        SemiNMF(2).fit([torch.full((20, 5), value)])


@pytest.mark.parametrize(
    ("data", "message"),
    [("long ago a king", "list of texts"), ([3, 4], "list of texts"), ([""], "first tokens are left out")],
)
def test_bad_data_is_refused_in_words(data, message):
    with pytest.raises(ValueError, match=message):
        SNMF(n_features=1, restarts=1).run(Subject.tiny("gpt2"), data)


def test_labels_must_fit_the_texts():
    with pytest.raises(ValueError, match="2 labels for 1 texts"):
        LabelledTexts(("a",), ("x", "y"))
    with pytest.raises(ValueError, match="questions about"):
        LabelledTexts(("a",), ("x",), questions=(Question("z", ("a",), ("b",)),))


@pytest.mark.parametrize("labels", [("x", "x", "x", "x"), ("x", "", "x", ""), ("x", "x", "y", "")])
def test_labels_that_no_held_out_text_could_tell_apart_are_refused(labels):
    texts = concepts.topics(1).texts[:4]
    with pytest.raises(ValueError, match="expected two concepts or more, each of two texts or more"):
        SNMF(n_features=2, keep=0.1, restarts=1).run(Subject.tiny("llama"), LabelledTexts(texts, labels))


def test_questions_without_prompts_or_words_are_refused():
    data, probe = concepts.topics(2), SNMF(n_features=2, keep=0.1, restarts=1, target_kl=(0.1,))
    for question in (Question("sea", (), ("b",)), Question("sea", ("a",), ())):
        with pytest.raises(ValueError, match="a question about 'sea' without prompts or words"):
            probe.run(Subject.tiny("llama"), replace(data, questions=(question,)))


@pytest.mark.parametrize("levels", [(100,), (10, 20), (10, 0)])
def test_levels_that_do_not_fall_are_refused_before_anything_runs(levels):
    with pytest.raises(ValueError, match="expected fewer and fewer of them"):
        SNMF(n_features=100, levels=levels)


def test_only_the_best_start_keeps_its_weights():
    fits, _ = SNMF(n_features=3, keep=0.1, restarts=3, max_iterations=5)._fits([small()], torch.device("cpu"))
    best = int(np.argmin([fit.best_loss for fit in fits]))
    assert [len(fit.weights) for fit in fits] == [300 if k == best else 0 for k in range(3)]


def test_one_string_is_not_taken_apart_into_letters():
    with pytest.raises(ValueError, match="got one string"):
        LabelledTexts("a text")  # type: ignore[arg-type]
    for prompts, words in (("a", ("b",)), (("a",), "b")):
        with pytest.raises(ValueError, match="expected a tuple of texts"):
            Question("x", prompts, words)  # type: ignore[arg-type]


def test_unknown_views_concepts_and_features_are_named(result):
    for arguments, message in (
        ({"view": "pie"}, "expected one of concepts"),
        ({"view": "card", "feature": "love"}, "expected one of sea"),
        ({"view": "card", "feature": 99}, "expected 0 to 39"),
    ):
        with pytest.raises(ValueError, match=message):
            result.plot(**arguments)
