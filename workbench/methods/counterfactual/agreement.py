"""How far do two texts agree? Shares of equal tokens, common prefix, edit distance; and what chance agreement would be.

Gumbel-max with shared noise: P(same) = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i); own noise: sum_i p_i q_i; no coupling
exceeds sum_i min(p_i, q_i). Sources: Maddison et al., 2014 (Gumbel-max); Levenshtein, 1966; Efron, 1979.
"""

from __future__ import annotations

import numpy as np

END = -1  # fills the places after a text's end
FACTUAL, COUNTERFACTUAL, INTERVENTIONAL = TEXTS = ("factual", "counterfactual", "interventional")
KINDS = (COUNTERFACTUAL, INTERVENTIONAL)  # what a factual text is compared with
SAME_DICE, OTHER_DICE = "same dice", "other dice"  # what another model's texts are compared by


def equal_and_counted(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, T) where both texts have the same token, and where at least one has a token; a, b (n, T), END after the end.

    A text that is over while the other goes on disagrees; places after both ends are not counted.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"agreement: got ids of shapes {a.shape} and {b.shape}, expected (n, T) twice.")
    counted = (a != END) | (b != END)
    return (a == b) & counted, counted


def equal_share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) share of equal tokens among the places where at least one text has one; 1 where both are empty."""
    equal, counted = equal_and_counted(a, b)
    total = counted.sum(axis=1)
    return np.where(total == 0, 1.0, equal.sum(axis=1) / np.maximum(total, 1))


def common_prefix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) number of equal tokens before the first difference."""
    equal, _ = equal_and_counted(a, b)
    return np.logical_and.accumulate(equal, axis=1).sum(axis=1)


def edit_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) Levenshtein distance over the longer length: 0 for equal texts, 1 where nothing can be kept.

    One vector operation per token of `a` over all pairs: a row of the table is D_j = min_k<=j (c_k + j - k), a running
    minimum, where c_k is the cheapest way to cell k that doesn't come from the left.
    """
    n, length = a.shape
    column = np.arange(length + 1)
    row = np.tile(column, (n, 1)).astype(np.int32)  # (n, T + 1): distances from the empty text
    rows = [row]
    for i in range(length):
        diagonal = row[:, :-1] + (a[:, i : i + 1] != b)
        fresh = np.concatenate([np.full((n, 1), i + 1), np.minimum(diagonal, row[:, 1:] + 1)], axis=1)
        row = (np.minimum.accumulate(fresh - column, axis=1) + column).astype(np.int32)
        rows.append(row)
    ends = (a != END).sum(axis=1), (b != END).sum(axis=1)
    distance = np.stack(rows)[ends[0], np.arange(n), ends[1]]
    longer = np.maximum(*ends)
    return np.where(longer == 0, 0.0, distance / np.maximum(longer, 1))


def gumbel_agreement(p: np.ndarray, q: np.ndarray) -> float:
    """P(same token) of Gumbel-max with shared noise. p, q (V,); sorted by q / p, so V log V and not V^2.

    Where q_j / p_j >= q_i / p_i the larger of the two ratios is q_j / q_i, elsewhere p_j / p_i.
    """
    p, q = _distributions(p, q)
    both = (p > 0) & (q > 0)
    only_p, only_q = p[q == 0].sum(), q[p == 0].sum()  # ratios 0 and infinity: first and last in the order
    p, q = p[both], q[both]
    order = np.argsort(q / p, kind="stable")
    p, q = p[order], q[order]
    below = only_p + np.concatenate([[0.0], np.cumsum(p)[:-1]])
    above = only_q + np.cumsum(q[::-1])[::-1]
    return float((1.0 / (below / p + above / q)).sum())


def inverse_cdf_agreement(p: np.ndarray, q: np.ndarray) -> float:
    """P(same token) of one shared uniform number: how far each token's two intervals overlap."""
    p, q = _distributions(p, q)
    ends = np.cumsum(p), np.cumsum(q)
    return float(np.maximum(0.0, np.minimum(*ends) - np.maximum(ends[0] - p, ends[1] - q)).sum())


def independent_agreement(p: np.ndarray, q: np.ndarray) -> float:
    """P(same token) of two draws with noise of their own."""
    p, q = _distributions(p, q)
    return float(p @ q)


def largest_agreement(p: np.ndarray, q: np.ndarray) -> float:
    """The largest P(same token) that any coupling can reach: 1 minus the total variation distance."""
    p, q = _distributions(p, q)
    return float(np.minimum(p, q).sum())


def share_interval(
    part: np.ndarray,
    whole: np.ndarray | None = None,
    *,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(estimate, low, high) of sum(part) / sum(whole) over items, by the percentile bootstrap over items.

    part, whole (n, ...); whole None: the mean over items. NaN where the whole is 0. Equal items are drawn together, by
    their number: the same law, and 200,000 pairs of two kinds cost as much as two.
    """
    part = np.asarray(part, dtype=np.float64)
    whole = np.ones_like(part) if whole is None else np.asarray(whole, dtype=np.float64)
    if len(part) == 0:
        raise ValueError("share_interval: got no items, expected at least one.")
    shape, n = part.shape[1:], len(part)
    kinds, counts = np.unique(
        np.concatenate([part.reshape(n, -1), whole.reshape(n, -1)], axis=1), axis=0, return_counts=True
    )
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=n_bootstrap).astype(np.float64)
    totals = np.concatenate([counts[None].astype(np.float64), draws]) @ kinds  # (1 + n_bootstrap, 2 * ...)
    above, below = np.split(totals, 2, axis=1)
    shares = np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0).reshape(-1, *shape)
    tails = (1 - level) / 2, (1 + level) / 2
    never = np.isnan(shares[0])
    low, high = np.nanquantile(np.where(never, 0.0, shares[1:]), tails, axis=0)
    return shares[0], np.where(never, np.nan, low), np.where(never, np.nan, high)


def _distributions(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if p.shape != q.shape or p.ndim != 1:
        raise ValueError(f"agreement: got distributions of shapes {p.shape} and {q.shape}, expected one (V,) each.")
    for name, values in (("p", p), ("q", q)):
        if (values < 0).any() or not abs(values.sum() - 1) < 1e-6:
            raise ValueError(f"agreement: {name} sums to {values.sum():.6g}, expected probabilities that sum to 1.")
    return p, q
