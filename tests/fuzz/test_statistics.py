"""Statistics of any numbers: probabilities stay probabilities, intervals hold their estimate, nonsense is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workbench import stats

P_VALUES = hnp.arrays(float, hnp.array_shapes(max_dims=2, min_side=0, max_side=20), elements=st.floats(0, 1))
NUMBERS = st.floats(-1e6, 1e6)
LISTS = hnp.arrays(float, st.integers(1, 12), elements=NUMBERS)
HOSTILE = st.floats() | st.sampled_from([np.nan, np.inf, -np.inf])


@given(P_VALUES)
def test_q_values_are_probabilities_not_below_p_and_in_its_order(p: np.ndarray) -> None:
    q = stats.benjamini_hochberg(p)
    assert q.shape == p.shape and ((p <= q + 1e-15) & (q <= 1)).all()  # 1e-15: p n / n rounds
    order = np.argsort(p, axis=None)
    assert (np.diff(q.ravel()[order]) >= 0).all()


@given(P_VALUES, st.floats(0.001, 0.999))
def test_benjamini_hochberg_rejects_as_its_definition_does_and_never_more_than_no_correction(
    p: np.ndarray, level: float
) -> None:
    q, flat = stats.benjamini_hochberg(p), np.sort(p, axis=None)
    ranks = np.arange(1, flat.size + 1)
    bars = level * ranks / max(1, flat.size)
    assume(not np.isclose(flat, bars, rtol=1e-12, atol=0).any())  # a tie with a bar is a matter of rounding
    assert (q <= level).sum() == max([0, *ranks[flat <= bars]])
    assert (q <= level).sum() <= (p <= level).sum()


@given(hnp.arrays(float, 8, elements=st.floats(0, 1) | st.just(np.nan)))
def test_a_test_that_was_not_made_counts_for_nothing(p: np.ndarray) -> None:
    q, made = stats.benjamini_hochberg(p), ~np.isnan(p)
    assert np.array_equal(np.isnan(q), ~made)
    assert np.array_equal(q[made], stats.benjamini_hochberg(p[made]))


@given(hnp.arrays(float, 5, elements=HOSTILE))
def test_p_values_outside_0_to_1_are_refused(p: np.ndarray) -> None:
    outside = ((p < 0) | (p > 1)).any()
    if outside:
        with pytest.raises(ValueError, match="expected 0 to 1"):
            stats.benjamini_hochberg(p)
    else:
        stats.benjamini_hochberg(p)


@given(NUMBERS, NUMBERS, hnp.arrays(float, st.integers(0, 30), elements=NUMBERS))
def test_a_permutation_p_is_never_0_and_falls_as_the_observed_value_grows(a: float, b: float, null: np.ndarray) -> None:
    low, high = (float(stats.permutation_p(np.asarray(x), null)) for x in (min(a, b), max(a, b)))
    assert 1 / (len(null) + 1) <= high <= low <= 1


@given(st.integers(0, 1000), st.integers(1, 1000), st.floats(0.5, 0.999))
def test_a_wilson_interval_holds_the_share_inside_0_to_1(count: int, total: int, level: float) -> None:
    count = min(count, total)
    low, high = stats.wilson_interval(count, total, level)
    assert 0 <= low <= count / total <= high <= 1 and low < high


@given(HOSTILE, HOSTILE)
def test_counts_that_make_no_share_are_refused(count: float, total: float) -> None:
    if 0 <= count <= total and 0 < total < np.inf:
        low, high = stats.wilson_interval(count, total)
        assert 0 <= low <= high <= 1
    else:
        with pytest.raises(ValueError, match="wilson_interval: got"):
            stats.wilson_interval(count, total)


@given(LISTS, st.integers(0, 5), st.floats(0.5, 0.99))
def test_intervals_of_a_mean_lie_within_the_values_or_around_the_mean(
    values: np.ndarray, seed: int, level: float
) -> None:
    noise = 1e-9 * (1 + np.abs(values).max())  # sums of up to 12 numbers
    estimate, low, high = stats.bootstrap_interval(values, seed=seed, level=level, n_bootstrap=50)
    assert values.min() - noise <= low <= high <= values.max() + noise
    assert values.min() - noise <= estimate <= values.max() + noise
    mean, below, above = stats.mean_interval(values, level)
    assert mean == pytest.approx(values.mean())
    assert (len(values) == 1 and np.isnan(below) and np.isnan(above)) or below <= mean <= above


@given(LISTS, st.data(), st.floats(0.5, 0.99))
def test_intervals_of_many_means_are_those_of_each(values: np.ndarray, data: st.DataObject, level: float) -> None:
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    _, group = np.unique(drawn, return_inverse=True)  # no group is empty
    found = stats.mean_intervals(values, group, level)
    near = {"rel": 1e-6, "abs": 1e-9 * (1 + np.abs(values).max()), "nan_ok": True}
    for number, column in enumerate(found.T):
        assert column.tolist() == pytest.approx(stats.mean_interval(values[group == number], level), **near)


@given(LISTS, NUMBERS, st.floats(0.1, 10))
def test_intervals_move_and_stretch_with_the_values(values: np.ndarray, shift: float, factor: float) -> None:
    near = {"rel": 1e-6, "abs": 1e-6 * (1 + np.abs(values).max() * factor + abs(shift))}
    plain = stats.bootstrap_interval(values, n_bootstrap=50)
    moved = stats.bootstrap_interval(values * factor + shift, n_bootstrap=50)
    assert [float(x) for x in moved] == [pytest.approx(float(x) * factor + shift, **near) for x in plain]


@given(LISTS)
def test_z_scores_have_mean_0_and_deviation_1_or_are_all_0(values: np.ndarray) -> None:
    z = stats.z_score(values)
    assert np.isfinite(z).all()
    if values.std() > 1e-6 * (1 + np.abs(values).max()):
        assert z.mean() == pytest.approx(0, abs=1e-6) and z.std() == pytest.approx(1)


@given(LISTS.filter(lambda values: len(values) > 1), st.data())
def test_an_area_is_a_probability_and_turns_around_with_the_scores(scores: np.ndarray, data: Any) -> None:
    positive = data.draw(hnp.arrays(bool, len(scores)).filter(lambda mask: 0 < mask.sum() < len(mask)))
    area = stats.auc(scores, positive)
    assert 0 <= area <= 1
    assert stats.auc(-scores, positive) == pytest.approx(1 - area) == stats.auc(scores, ~positive)
    pairs = scores[positive][:, None] - scores[~positive]
    assert area == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())  # its definition


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.bootstrap_interval(np.array([])),
        lambda: stats.mean_interval(np.array([])),
        lambda: stats.mean_interval(np.array([1.0, 2.0]), level=1.5),
        lambda: stats.mean_intervals(np.array([1.0, 2.0]), np.array([0, 2])),
        lambda: stats.mean_intervals(np.array([]), np.array([], dtype=int)),
        lambda: stats.mean_intervals(np.array([1.0]), np.array([0, 0])),
        lambda: stats.bootstrap_interval(np.array([1.0]), level=-1),
        lambda: stats.bootstrap_interval(np.array([1.0]), n_bootstrap=0),
        lambda: stats.bootstrap_interval(np.array([1.0, 2.0]), weights=np.array([0.0, 0.0])),
        lambda: stats.bootstrap_interval(np.array([1.0, 2.0]), weights=np.array([1.0])),
        lambda: stats.resampling_weights(0, 5),
        lambda: stats.wilson_interval(1, 2, level=2),
        lambda: stats.auc(np.array([1.0, 2.0]), np.array([True, True])),
        lambda: stats.auc(np.array([1.0, np.nan]), np.array([True, False])),
        lambda: stats.auc(np.array([1.0, 2.0]), np.array([True, False, True])),
        lambda: stats.dice(np.array([True]), np.array([True, False])),
        lambda: stats.z_score(np.array([])),
    ],
)
def test_what_has_no_answer_is_refused_in_words(call: Any) -> None:
    with pytest.raises(ValueError, match=r"(got|expected)"):
        call()
