"""Permutation p-values, false discovery rates and intervals: pure functions of numpy arrays, in float64.

q_(i) = min_{k >= i} p_(k) n / k; a p-value from n permutations is (1 + #{null >= observed}) / (n + 1).
Sources: Benjamini and Hochberg, 1995; Wilson, 1927; Efron, 1979; Phipson and Smyth, 2010 (permutation p-values);
Hanley and McNeil, 1982 (area under the curve as a rank sum); Student, 1908 (few draws).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata
from scipy.stats import t as student


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values of all p-values together, in the shape of `p`: q <= 0.05 keeps the false discovery rate at 5 %.

    NaN is no test: it stays NaN and isn't counted.
    """
    p = np.asarray(p, dtype=np.float64)
    if np.any((p < 0) | (p > 1)):
        raise ValueError(
            f"benjamini_hochberg: got p-values from {np.nanmin(p):.3g} to {np.nanmax(p):.3g}, expected 0 to 1."
        )
    q = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    values = p[tested]  # (n_tests,)
    order = np.argsort(values)[::-1]  # from the largest p down, so that the running minimum looks at larger ranks
    rank = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum.accumulate(values[order] * len(values) / np.maximum(rank, 1))
    q[tested] = np.minimum(adjusted, 1.0)
    return q


def permutation_p(observed: np.ndarray, null: np.ndarray, axis: int = 0) -> np.ndarray:
    """One-sided p-values: the share of null values that reach the observed one, which counts itself.

    The smallest possible value is 1 / (n_permutations + 1): mind it before correcting over many tests. An observed NaN
    is no test: its p-value is NaN.
    """
    observed = np.asarray(observed, dtype=np.float64)
    # A tie must count as a tie: the same sum in another order differs by rounding.
    bar = np.expand_dims(observed, axis)
    reached = (null >= bar - 1e-12 * np.abs(bar)).sum(axis=axis)
    return np.where(np.isnan(observed), np.nan, (1.0 + reached) / (1.0 + null.shape[axis]))


def wilson_interval(
    count: np.ndarray | int, total: np.ndarray | int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of a proportion `count / total`; stays inside [0, 1] and is sensible at 0 and at `total`."""
    count, total = np.asarray(count, dtype=np.float64), np.asarray(total, dtype=np.float64)
    _check_level(level, "wilson_interval")
    if not np.all((count >= 0) & (count <= total) & (total > 0) & (total < np.inf)):
        raise ValueError(
            f"wilson_interval: got count={count} of total={total}, expected 0 <= count <= total, total > 0."
        )
    z = ndtri(0.5 + level / 2)
    share, weight = count / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * np.sqrt(share * (1 - share) / total + weight / (4 * total))
    low, high = np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)
    return np.where(count == 0, 0.0, low), np.where(count == total, 1.0, high)


def resampling_weights(n_items: int, n_bootstrap: int, seed: int = 0) -> np.ndarray:
    """Bootstrap as a matrix (n_bootstrap, n_items): row b holds how often each item was drawn, over n_items.

    `weights @ values` is the mean of every resample at once.
    """
    if n_items < 1 or n_bootstrap < 1:
        raise ValueError(
            f"bootstrap: got {n_items} items and n_bootstrap={n_bootstrap}, expected at least one of each."
        )
    drawn = np.random.default_rng(seed).integers(0, n_items, (n_bootstrap, n_items))
    flat = drawn + n_items * np.arange(n_bootstrap)[:, None]
    return np.bincount(flat.ravel(), minlength=n_bootstrap * n_items).reshape(n_bootstrap, n_items) / n_items


def bootstrap_interval(
    values: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    level: float = 0.95,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(estimate, low, high) of the mean of `values` (n_items, ...) over items, by the percentile bootstrap.

    `weights` (n_items,) are drawn together with their items: each resample is a weighted mean of its own, and one that
    drew no weight is left out.
    `transform` turns means into the statistic, such as np.exp for perplexity from nats; it must work elementwise.
    One item gives an interval of no width, none is an error.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("bootstrap_interval: got no items, expected at least one.")
    _check_level(level, "bootstrap_interval")
    draws = resampling_weights(len(values), n_bootstrap, seed)  # (n_bootstrap, n_items)
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        fit = weights.shape == (len(values),) and np.all((weights >= 0) & (weights < np.inf)) and weights.any()
        if not fit:
            raise ValueError(
                f"bootstrap_interval: got weights of shape {weights.shape} for {len(values)} items, expected one per "
                "item, none below 0 and one above it."
            )
        draws = draws * weights
        total = draws.sum(axis=1, keepdims=True)
        drew = total[:, 0] > 0
        draws = draws[drew] / total[drew]
    means = (draws @ values.reshape(len(values), -1)).reshape(len(draws), *values.shape[1:])
    estimate = np.average(values, axis=0, weights=weights)
    if transform is not None:
        means, estimate = transform(means), transform(estimate)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return estimate, low, high


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of independent draws by Student's t; low and high are NaN for a single draw."""
    values = np.asarray(values, dtype=np.float64)
    _check_level(level, "mean_interval")
    if not values.size:
        raise ValueError("mean_interval: got no values, expected at least one.")
    if values.size < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = student.ppf(0.5 + level / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def mean_intervals(values: np.ndarray, group: np.ndarray, level: float = 0.95) -> np.ndarray:
    """(3, n_groups): `mean_interval` of the values of each group, which are numbered from 0; no group is empty."""
    values, group = np.asarray(values, dtype=np.float64), np.asarray(group)
    _check_level(level, "mean_intervals")
    if values.shape != group.shape or values.ndim != 1 or group.dtype.kind not in "iu" or (group < 0).any():
        raise ValueError(
            f"mean_intervals: got values {values.shape} of groups {group.shape}, {group.dtype}, expected (n,) of each, "
            "groups as whole numbers from 0."
        )
    count = np.bincount(group)
    if not count.size or not count.all():
        raise ValueError(f"mean_intervals: got {count.size} groups, {(count == 0).sum()} of them empty; fill each.")
    mean = np.bincount(group, weights=values) / count
    squares = np.bincount(group, weights=(values - mean[group]) ** 2)
    spread = np.sqrt(squares / np.where(count > 1, count - 1, np.nan))  # NaN for a single draw
    half = student.ppf(0.5 + level / 2, np.maximum(count - 1, 1)) * spread / np.sqrt(count)
    return np.stack([mean, mean - half, mean + half])


def z_score(values: np.ndarray) -> np.ndarray:
    """Every value against the mean and the standard deviation of all; 0 where all are equal, NaN stays NaN."""
    values = np.asarray(values, dtype=np.float64)
    if np.isnan(values).all():
        raise ValueError(f"z_score: got {values.size} values, all of them NaN, expected at least one number.")
    centred = values - np.nanmean(values)
    spread = np.nanstd(values)
    if spread == 0 or np.nanmin(values) == np.nanmax(values):  # a rounded mean leaves equal values a spread
        return np.where(np.isnan(values), np.nan, 0.0)
    return centred / spread


def auc(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column of `scores` (n_items, ...) for the items marked `positive` (n_items,).

    The chance that a positive item scores above a negative one, ties counted half. Both kinds must be there.
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if positive.shape != scores.shape[:1]:
        raise ValueError(f"auc: got scores {scores.shape} and marks {positive.shape}, expected one mark per item.")
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        raise ValueError(f"auc: got {n_positive} positive and {n_negative} negative items, expected some of each.")
    if np.isnan(scores).any():
        raise ValueError("auc: got NaN among the scores, expected numbers that can be ranked.")
    ranks = rankdata(scores, axis=0)
    return (ranks[positive].sum(axis=0) - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two sets given as boolean masks: 2 |a and b| / (|a| + |b|); NaN where both are empty."""
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"dice: got masks of shapes {a.shape} and {b.shape}, expected the same items in both.")
    size = int(a.sum() + b.sum())
    return 2.0 * int((a & b).sum()) / size if size else float("nan")


def _check_level(level: float, name: str) -> None:
    if not 0 < level < 1:
        raise ValueError(f"{name}: got level={level}, expected the share that an interval shall hold, such as 0.95.")
