"""Laws of the statistics, each against a slow or an independent way to the same number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from workbench.stats import (
    auc,
    benjamini_hochberg,
    bootstrap_interval,
    dice,
    mean_intervals,
    permutation_p,
    resampling_weights,
    wilson_interval,
    z_score,
)


@pytest.mark.parametrize("shape", [(1,), (7,), (40, 3)])
def test_benjamini_hochberg_equals_scipy(shape):
    p = np.random.default_rng(0).random(shape)
    np.testing.assert_allclose(
        benjamini_hochberg(p).ravel(), scipy_stats.false_discovery_control(p.ravel()), rtol=1e-12
    )


def test_benjamini_hochberg_leaves_out_what_was_not_tested():
    p = np.array([0.01, np.nan, 0.04])
    q = benjamini_hochberg(p)
    assert np.isnan(q[1])
    np.testing.assert_allclose(q[[0, 2]], benjamini_hochberg(p[[0, 2]]))


def test_benjamini_hochberg_keeps_the_order_of_p_and_stays_between_p_and_one():
    p = np.random.default_rng(1).random(200) ** 3
    q = benjamini_hochberg(p)
    assert np.all(np.diff(q[np.argsort(p)]) >= 0)
    assert np.all((p <= q) & (q <= 1))


def test_benjamini_hochberg_of_nothing_is_nothing():
    assert benjamini_hochberg(np.zeros((0, 2))).shape == (0, 2)


def test_benjamini_hochberg_refuses_what_is_no_p_value():
    with pytest.raises(ValueError, match="expected 0 to 1"):
        benjamini_hochberg(np.array([0.5, 1.5]))


def test_a_permutation_p_value_counts_the_observation_itself_and_ties():
    null = np.array([[1.0], [2.0], [2.0], [3.0]])
    assert permutation_p(np.array([2.0]), null)[0] == (1 + 3) / 5
    assert permutation_p(np.array([9.0]), null)[0] == 1 / 5


def test_an_observed_nan_is_no_test():
    p = permutation_p(np.array([np.nan, 2.0]), np.array([[np.nan, 1.0], [np.nan, 3.0]]))
    assert np.isnan(p[0]) and p[1] == 2 / 3, "the smallest p of all would make a discovery of what overflowed"


def test_a_permutation_p_value_is_valid():
    draws = np.random.default_rng(2).random((20, 5000))
    p = permutation_p(draws[0], draws[1:])
    for alpha in (0.05, 0.25, 0.5):
        assert (p <= alpha).mean() <= alpha + 0.02  # 3 standard errors at alpha .5


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (37, 400)])
def test_the_wilson_interval_equals_scipy(count, total):
    expected = scipy_stats.binomtest(count, total).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(count, total), (expected.low, expected.high), atol=1e-12)


def test_the_wilson_interval_refuses_impossible_counts():
    with pytest.raises(ValueError, match="count <= total"):
        wilson_interval(5, 4)


def test_resampling_weights_are_means_of_draws():
    weights = resampling_weights(6, 50, seed=3)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    np.testing.assert_allclose(weights * 6, np.round(weights * 6), atol=1e-12)
    np.testing.assert_array_equal(weights, resampling_weights(6, 50, seed=3))


def test_the_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    samples = rng.exponential(1.0, (60, 400))
    _, low, high = bootstrap_interval(samples, n_bootstrap=1000)
    covered = ((low <= 1.0) & (high >= 1.0)).mean()
    assert 0.88 <= covered <= 0.98  # 95 % less the known shortfall of percentiles for 60 skewed values


def test_the_bootstrap_interval_of_a_transform_is_the_transform_of_the_interval():
    values = np.random.default_rng(5).normal(size=(30, 2))
    plain, curved = bootstrap_interval(values), bootstrap_interval(values, transform=np.exp)
    np.testing.assert_allclose(np.exp(plain[0]), curved[0])
    np.testing.assert_allclose(np.exp(plain[1]), curved[1], rtol=1e-3)  # quantiles interpolate between resamples


def test_the_bootstrap_interval_of_one_value_has_no_width_and_of_none_is_an_error():
    assert [float(x) for x in bootstrap_interval(np.array([2.0]))] == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="no items"):
        bootstrap_interval(np.array([]))


def test_z_scores_have_mean_zero_and_unit_spread_and_ignore_gaps():
    values = np.append(np.random.default_rng(6).normal(3.0, 2.0, 50), np.nan)
    z = z_score(values)
    assert np.isnan(z[-1])
    np.testing.assert_allclose([z[:-1].mean(), z[:-1].std()], [0.0, 1.0], atol=1e-12)
    np.testing.assert_array_equal(z_score(np.full(4, 7.0)), np.zeros(4))


def test_z_scores_of_equal_values_are_zero_whatever_the_sum_rounds_to():
    assert np.full(3, 0.1).std() > 0, "the trap: the mean of three times .1 is not .1"
    np.testing.assert_array_equal(z_score(np.full(3, 0.1)), np.zeros(3))
    np.testing.assert_array_equal(z_score(np.array([7.0, np.nan, 7.0])), [0.0, np.nan, 0.0])


def test_dice_is_one_for_equal_sets_zero_for_disjoint_ones_and_undefined_for_empty_ones():
    mask = np.array([True, True, False])
    assert dice(mask, mask) == 1.0
    assert dice(mask, ~mask) == 0.0
    assert np.isnan(dice(~(mask | True), ~(mask | True)))


def test_a_weighted_bootstrap_draws_weights_with_their_items() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 50, 40)
    constant = bootstrap_interval(np.full(40, 0.3), weights=weights)
    np.testing.assert_allclose(constant, 0.3)
    values = rng.random(40)
    even, plain = (bootstrap_interval(values, weights=w, seed=3) for w in (np.full(40, 7), None))
    np.testing.assert_allclose(even, plain)
    assert bootstrap_interval(values, weights=weights)[0] == pytest.approx(np.average(values, weights=weights))


def test_resamples_that_draw_no_weight_are_left_out() -> None:
    found = bootstrap_interval(np.array([[1.0, 3.0], [9.0, 9.0]]), weights=np.array([2.0, 0.0]))
    np.testing.assert_array_equal(found, [[1.0, 3.0]] * 3)


@pytest.mark.parametrize("group", [[0.0, 1.0], [-1, 0], []])
def test_groups_that_are_no_numbers_from_zero_are_refused(group) -> None:
    with pytest.raises(ValueError, match="mean_intervals: got"):
        mean_intervals(np.ones(len(group)), np.array(group))


def test_the_area_under_the_curve_equals_scikit_learn_with_ties() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, (50, 4)).astype(float), rng.random(50) < 0.3
    expected = [roc_auc_score(positive, column) for column in scores.T]
    np.testing.assert_allclose(auc(scores, positive), expected, rtol=1e-12)
    np.testing.assert_allclose(auc(scores[:, 0], positive), expected[0], rtol=1e-12)


def test_the_area_under_the_curve_refuses_one_kind_of_item_and_gaps() -> None:
    with pytest.raises(ValueError, match="expected some of each"):
        auc(np.zeros(3), np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match="NaN"):
        auc(np.array([0.0, np.nan]), np.array([True, False]))
