"""Clusters and ClusteredSteer: plain references, hand-built truths and nulls, the organism, then bad input."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from workbench import ProjectOut, Site, Steer, Subject, difference_in_means
from workbench.corpora import code_styles
from workbench.methods.steering.clusters import (
    DECAY,
    EPOCHS,
    RATE,
    Clusters,
    choose_k,
    fit_clusters,
    k_means,
    silhouette,
    train_probes,
)
from workbench.toggles.clustered import ClusteredSteer

LOW, HIGH = Site(0, "resid_out"), Site(1, "resid_out")


def world(
    k: int = 3, per: int = 40, width: int = 64, noise: float = 0.3, *, opposite: bool = False, known: bool = True
) -> tuple[Tensor, Tensor, np.ndarray, Tensor]:
    """(residuals, differences, cluster of each prompt, true directions); `noise` is the norm of a row's noise."""
    rng = np.random.default_rng(0)
    units = np.linalg.qr(rng.standard_normal((width, 2 * k)))[0].T
    truth = np.repeat(np.arange(k), per)
    directions = np.stack([units[0], -units[0]]) if opposite else units[:k]
    shake = rng.standard_normal((2, k * per, width)) * noise / np.sqrt(width)
    residual = (units[k:][truth] if known else 0.0) + shake[0]
    differences = directions[truth] + shake[1]
    return torch.from_numpy(residual), torch.from_numpy(differences), truth, torch.from_numpy(directions)


def matched_cosine(clusters: Clusters, directions: Tensor) -> Tensor:
    """Of each true direction with the nearest mean."""
    means = clusters.means / clusters.means.norm(dim=1, keepdim=True)
    return (directions @ means.T).amax(1)


def test_k_means_is_as_good_as_scikit_learn_s() -> None:
    rng = np.random.default_rng(1)
    for k, n in ((2, 30), (3, 80), (5, 80)):
        points = rng.standard_normal((n, 6))
        labels = k_means(points, k)
        assert set(labels) == set(range(k)) and labels[0] == 0
        spread = sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in range(k))
        theirs = float(KMeans(k, n_init="auto", random_state=0).fit(points).inertia_ or 0.0)
        assert spread <= theirs * 1.02  # both are local searches
        assert np.array_equal(labels, k_means(points, k)), "the same seed gives the same clusters"


def test_the_silhouette_is_scikit_learn_s() -> None:
    rng = np.random.default_rng(2)
    points, a = rng.standard_normal((300, 5)), rng.integers(0, 4, 300)
    assert silhouette(points, a) == pytest.approx(silhouette_score(points, a), abs=1e-9)
    a[a == 3] = 2
    a[0] = 3  # a point alone in its cluster
    assert silhouette(points, a) == pytest.approx(silhouette_score(points, a), abs=1e-9)


def test_of_few_different_points_only_so_many_clusters_are_tried() -> None:
    labels, k = choose_k(np.repeat(np.eye(3), 5, axis=0))
    assert k == 3 and adjusted_rand_score(labels, np.repeat(np.arange(3), 5)) == 1.0


def test_probes_trained_side_by_side_are_those_trained_alone_by_torch() -> None:
    residual, _, truth, _ = world(per=10, width=8)
    rows, labels = (residual - residual.mean(0)) / residual.std(0), torch.from_numpy(truth)
    masks = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.8
    weight, bias = train_probes(rows, labels, 3, masks)
    for index, mask in enumerate(masks):
        alone = torch.nn.Linear(8, 3, dtype=torch.float64)
        for part in alone.parameters():
            torch.nn.init.zeros_(part)
        optimiser = torch.optim.AdamW(alone.parameters(), lr=RATE, weight_decay=DECAY)
        for _ in range(EPOCHS):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(alone(rows[mask]), labels[mask]).backward()
            optimiser.step()
        torch.testing.assert_close(weight[index], alone.weight.detach(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(bias[index], alone.bias.detach(), rtol=1e-8, atol=1e-10)


def test_three_orthogonal_clusters_are_found_and_told_from_the_residual() -> None:
    residual, differences, truth, directions = world()
    found = fit_clusters(residual, differences)
    assert found.k == 3 and adjusted_rand_score(found.labels.numpy(), truth) == 1.0
    assert float(matched_cosine(found, directions).min()) > 0.998  # measured .9987 to .9991
    assert found.accuracy > 0.98 and found.has_signal()


def test_of_two_opposite_clusters_one_difference_of_means_finds_nothing() -> None:
    residual, differences, truth, directions = world(2, 60, opposite=True)
    assert float(differences.mean(0).norm()) < 0.1, "what each cluster asks for cancels"  # measured .03
    found = fit_clusters(residual, differences)
    assert found.k == 2 and adjusted_rand_score(found.labels.numpy(), truth) == 1.0
    assert float(matched_cosine(found, directions).min()) > 0.998


def test_the_scale_of_the_residual_does_not_matter() -> None:
    residual, differences, *_ = world(per=20)
    one, many = fit_clusters(residual, differences, k=3), fit_clusters(1000 * residual + 5, differences, k=3)
    torch.testing.assert_close(one.probabilities(residual), many.probabilities(1000 * residual + 5))


def test_clusters_that_the_residual_does_not_know_are_no_signal() -> None:
    residual, differences, truth, _ = world(known=False)
    found = fit_clusters(residual, differences)
    assert adjusted_rand_score(found.labels.numpy(), truth) == 1.0, "the clusters are there"
    assert not found.has_signal() and abs(found.accuracy - found.majority) < 0.15
    rng = np.random.default_rng(0)
    passed = []
    for seed in range(12):  # nothing at all: k-means still returns clusters of a norm
        noise = torch.from_numpy(rng.standard_normal((2, 40, 16)))
        null = fit_clusters(noise[0], noise[1], k=2, seed=seed)
        assert float(null.means.norm(dim=1).min()) > 0.5, "a norm is no evidence"
        passed.append(null.has_signal())
    assert sum(passed) <= 1  # 2.5 % nominal; measured 0 of 40


def test_a_probe_that_reads_one_side_of_the_difference_knows_clusters_of_pure_noise() -> None:
    """The trap that `prompts` of ClusteredSteer.fit is there for."""
    rng, passed = np.random.default_rng(0), []
    for seed in range(6):
        towards, away = (torch.from_numpy(rng.standard_normal((80, 32))) for _ in range(2))
        passed.append(fit_clusters(away, towards - away, k=2, seed=seed).has_signal())
    assert np.mean(passed) >= 0.5  # measured .9


def test_refinement_is_a_gradient_step_per_row_on_a_new_value() -> None:
    residual, differences, *_ = world(per=20)
    old = fit_clusters(residual, differences, k=3)
    kept = old.weight.clone()
    new = old.refined(residual[:2], torch.tensor([2, 0]), rate=0.1)
    weight, bias = old.weight.clone().requires_grad_(), old.bias.clone().requires_grad_()
    for row, label in zip((residual[:2] - old.centre) / old.scale, (2, 0), strict=True):
        loss = torch.nn.functional.cross_entropy(weight @ row + bias, torch.tensor(label))
        gradients = torch.autograd.grad(loss, (weight, bias))
        weight, bias = (
            (part - 0.1 * step).detach().requires_grad_() for part, step in zip((weight, bias), gradients, strict=True)
        )
    torch.testing.assert_close(new.weight, weight.detach())
    torch.testing.assert_close(new.bias, bias.detach())
    assert torch.equal(old.weight, kept) and new != old and new.means is old.means


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.tiny()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Prompts cut after different words, so that probes find different clusters."""
    asked = code_styles.combinations("train")[:40:4]
    return [" ".join(code_styles.prompt(*each).split()[: 3 + i % 6]) for i, each in enumerate(asked)]


def made(subject: Subject, **settings: object) -> ClusteredSteer:
    """Two layers with clusters that their probes know."""
    toggle = ClusteredSteer.examples(subject)[0]
    assert isinstance(toggle, ClusteredSteer)
    (_, low), (_, high) = toggle.layers
    return replace(toggle, layers=((LOW, low), (HIGH, replace(high, means=-high.means))), **settings)


def test_hard_choice_adds_the_mean_of_the_cluster_that_the_probe_finds(subject: Subject, texts: list[str]) -> None:
    toggle = made(subject, choice="hard", strength=0.5, positions="all")
    toggle = replace(toggle, layers=toggle.layers[:1])
    plain, ends = subject.capture(texts, [LOW]), subject.capture(texts, [LOW], tokens="last")
    clusters = toggle.layers[0][1]
    chosen = clusters.choice(ends[LOW])
    assert len(set(chosen.tolist())) > 1, "rows must differ for the test to mean anything"
    with subject.under(toggle):
        moved = subject.capture(texts, [LOW])[LOW] - plain[LOW]
    torch.testing.assert_close(moved.double(), 0.5 * clusters.means[chosen][plain.text], rtol=0, atol=1e-4)


def test_soft_choice_weighs_the_means_by_their_probability(subject: Subject, texts: list[str]) -> None:
    toggle = made(subject)
    (_, clusters) = toggle.layers[0]
    clusters = replace(clusters, weight=clusters.weight / 20)  # so that no cluster takes all
    toggle = replace(toggle, layers=((LOW, clusters),))
    plain = subject.capture(texts, [LOW], tokens="last")[LOW]
    shares = clusters.probabilities(plain)
    assert float(shares.max()) < 0.99
    with subject.under(toggle):
        moved = subject.capture(texts, [LOW], tokens="last")[LOW] - plain
    torch.testing.assert_close(moved.double(), shares @ clusters.means, rtol=0, atol=1e-4)


def test_every_probe_reads_the_prompt_before_anything_is_pushed(subject: Subject, texts: list[str]) -> None:
    """What the second layer adds is decided by the unsteered prompt, though the first layer has changed it since."""
    toggle = made(subject, choice="hard", positions="all")
    (_, high) = toggle.layers[1]
    ends = subject.capture(texts, [LOW, HIGH], tokens="last")
    with subject.under(replace(toggle, layers=toggle.layers[:1])):
        below = subject.capture(texts, [HIGH])
        steered = subject.capture(texts, [HIGH], tokens="last")[HIGH]
    with subject.under(toggle):
        both = subject.capture(texts, [HIGH])[HIGH]
    chosen = high.choice(ends[HIGH])
    assert not torch.equal(chosen, high.choice(steered)), "read on the way, it would have chosen otherwise"
    torch.testing.assert_close((both - below[HIGH]).double(), high.means[chosen][below.text], rtol=0, atol=1e-3)


def test_keeping_the_norm_keeps_it(subject: Subject, texts: list[str]) -> None:
    toggle = made(subject, keep_norm=True, positions="all")
    toggle = replace(toggle, layers=toggle.layers[:1])
    plain = subject.capture(texts, [LOW])[LOW]
    with subject.under(toggle):
        turned = subject.capture(texts, [LOW])[LOW]
    torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert float((turned - plain).norm()) > 1.0


def test_layers_without_signal_are_left_alone_and_named_in_the_receipt(subject: Subject, texts: list[str]) -> None:
    toggle = made(subject)
    unknown = replace(toggle.layers[0][1], predicted=torch.zeros(20, dtype=torch.long))
    toggle = replace(toggle, layers=((LOW, unknown), toggle.layers[1]))
    assert [site for site, _ in toggle.acting] == [HIGH] and toggle.evidence()["skipped"].tolist() == [True, False]
    plain = subject.capture(texts, [LOW])[LOW]
    with subject.under(toggle):
        assert torch.equal(subject.capture(texts, [LOW])[LOW], plain)
        assert "resid_out@0 skipped (probe right on 35%, largest cluster 35%)" in str(subject.receipts[0])
    with pytest.warns(UserWarning, match="never fired"), subject.under(replace(toggle, layers=toggle.layers[:1])):
        subject.nll(texts)
    with subject.under(replace(toggle, margin=-1.0)):
        assert not torch.equal(subject.capture(texts, [LOW])[LOW], plain), "a margin of -1 lets every layer act"
        assert not subject.receipts[0].notes


def test_the_random_control_has_the_same_probes_and_norms(subject: Subject) -> None:
    toggle = made(subject)
    control = toggle.random_control(1)
    for (site, a), (other, b) in zip(toggle.layers, control.layers, strict=True):
        assert site == other and torch.equal(a.weight, b.weight)
        torch.testing.assert_close(a.means.norm(dim=1), b.means.norm(dim=1))
        cosine = (a.means * b.means).sum(1) / a.means.norm(dim=1) ** 2
        assert float(cosine.abs().max()) < 0.7
    assert control == toggle.random_control(1) and control != toggle.random_control(2)


def lists(styles: object = None) -> tuple[list[str], list[str], list[str]]:
    """Open prompts, and those that ask for each task's style and for the other one."""
    asked = code_styles.combinations("train")[::2]
    style = {
        task: ("layout", "brace")[(i % 2) if styles == "by task" else 0] for i, task in enumerate(code_styles.TASKS)
    }
    other = {"layout": "brace", "brace": "layout"}
    return (
        [code_styles.prompt(*each) for each in asked],
        [code_styles.prompt(*each, style[each[0]]) for each in asked],
        [code_styles.prompt(*each, other[style[each[0]]]) for each in asked],
    )


def layout_shares(subject: Subject) -> tuple[float, float]:
    """P("def") on held-out open prompts, for every second task and for the others."""
    new = code_styles.combinations("held_out")
    word, shares = subject.tokenizer.convert_tokens_to_ids("def"), np.zeros(len(new))
    for index, _, log_probs in subject.predictions([code_styles.prompt(*each) for each in new]):
        shares[index] = float(log_probs[-1, word].exp())
    even = np.array([code_styles.TASKS.index(task) % 2 == 0 for task, _ in new])
    return float(shares[even].mean()), float(shares[~even].mean())


def test_on_the_organism_clusters_turn_two_groups_of_tasks_opposite_ways_and_one_direction_fails() -> None:
    subject, site = Subject.organism(), Site(4, "resid_out")
    prompts, towards, away = lists("by task")
    toggle = ClusteredSteer.fit(subject, prompts, towards, away, at=[site], name="style by task", strength=0.5)
    assert toggle.layers[0][1].k == 2 and len(toggle.acting) == 1
    plain = layout_shares(subject)
    with subject.under(toggle):
        wanted, unwanted = layout_shares(subject)
        receipt = subject.receipts[0]
    assert wanted > plain[0] + 0.4 and unwanted < plain[1] - 0.2, "measured .86 and .05, from .32 for both"
    assert receipt.fired and not receipt.notes
    with subject.under(toggle.random_control()):
        control = layout_shares(subject)
    assert control[0] - control[1] < 0.25, "measured .44 and .30"
    mean = difference_in_means(subject, towards, away, site)
    norm = float(toggle.layers[0][1].means.norm(dim=1).mean())
    assert mean.norm < 0.05 * norm  # measured 3 of 267: what the two groups ask for cancels
    with subject.under(Steer(mean.unit() * norm, site, 0.5, "last")):
        constant = layout_shares(subject)
    assert abs(constant[0] - constant[1]) < 0.05, "one direction can't tell the two groups apart"


def test_refinement_by_confirmed_outcomes_moves_a_little_and_agreement_with_the_frozen_copy_says_how_much() -> None:
    subject = Subject.organism()
    prompts, towards, away = (part[:60] for part in lists())
    sites = [Site(2, "resid_out"), Site(4, "resid_out")]
    frozen = ClusteredSteer.fit(subject, prompts, towards, away, at=sites, k=3, name="layout")
    new = frozen.refined(subject, prompts, [index % 2 == 0 for index in range(60)])
    assert new != frozen and set(new.agreement(frozen, subject, prompts)) == set(sites)
    assert min(new.agreement(frozen, subject, prompts).values()) > 0.9  # measured 1.0
    assert frozen.refined(subject, prompts, [False] * 60) is frozen
    with pytest.raises(ValueError, match="got 1 outcomes for 60 prompts"):
        frozen.refined(subject, prompts, [True])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it reads nothing and so never fires
        with subject.under(frozen), pytest.raises(ValueError, match="a ClusteredSteer acts now"):
            frozen.refined(subject, prompts, [True] * 60)


def test_fitting_reads_the_subject_under_its_toggles() -> None:
    subject, site = Subject.organism(), Site(4, "resid_out")
    prompts, towards, away = (part[:20] for part in lists())
    mean = difference_in_means(subject, towards, away, site)
    with subject.under(ProjectOut(mean, (site,))):
        toggle = ClusteredSteer.fit(subject, prompts, towards, away, at=[site], k=2)
    assert float((toggle.layers[0][1].means @ mean.unit().vector.double()).abs().max()) < 1e-3 * mean.norm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: ClusteredSteer(()), "expected each once"),
        (lambda s: replace(made(s), choice="both"), "got choice='both'"),
        (lambda s: replace(made(s), positions="first"), "positions: got 'first'"),
        (lambda s: replace(made(s), model="0123"), "was found on model 0123"),
        (lambda s: ClusteredSteer(((LOW, made(Subject.organism()).layers[0][1]),)), "has 128 dims at resid_out@0"),
        (lambda s: ClusteredSteer.fit(s, ["a"], ["b"], ["c", "d"]), r"got \[1, 1, 2\] prompts"),
        (lambda s: fit_clusters(torch.ones(20, 4), torch.ones(20, 3)), "expected .n, width. twice"),
        (lambda s: fit_clusters(torch.ones(5, 4), torch.ones(5, 4)), "got 5 prompts, expected at least 10"),
        (lambda s: fit_clusters(torch.ones(20, 4), torch.full((20, 4), torch.nan)), "NaN or infinity"),
        (lambda s: fit_clusters(torch.ones(20, 4), torch.ones(20, 4), k=2), "got k=2 for 1 different points"),
        (lambda s: choose_k(np.ones((20, 4))), "for 1 different points"),
    ],
)
def test_impossible_settings_are_refused_in_words(subject: Subject, make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), subject.under(make(subject)):  # type: ignore[operator]
        pass
    assert subject.active == ()
