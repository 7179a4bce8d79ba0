"""Average precision of many neurons for many relations at once: how well a neuron's values pick out its prompts.

AP = 1/n sum over positives i of C+(s_i) / C(s_i); C prompts score >= s_i, C+ of them positive: ties count together.
Source: Su, Yuan and Zhu, 2015 (AP as mean precision); as a score of neurons, Suau et al., 2022 (arXiv 2110.02802).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

ROWS = 64  # neurons at a time, so that every temporary stays in the processor's cache
FLIP, INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)  # bits of a float32
FEWEST_DRAWS = 100
TAIL = 0.02  # share of the null's draws that the tail is fitted to


def average_precision(
    scores: Float[np.ndarray, "neuron prompt"], relation: Int[np.ndarray, " prompt"]
) -> Float[np.ndarray, "neuron relation"]:
    """AP of every neuron for every relation against all other prompts, in float64, ties included.

    scores     float32 or narrower: one sort of (value, relation) in 64 bits serves all relations
    relation   0 to R - 1, each at least once
    Raises ValueError for NaN or infinity, float64 scores, or a relation without a prompt.
    """
    relation, sizes = _checked(scores, relation)
    found = [_of_order(*_sorted(scores[start : start + ROWS], relation), sizes) for start in _starts(len(scores))]
    return np.concatenate(found)


def two_sided_precision(
    scores: Float[np.ndarray, "neuron prompt"], relation: Int[np.ndarray, " prompt"]
) -> tuple[Float[np.ndarray, "neuron relation"], Int[np.ndarray, "neuron relation"]]:
    """(max(AP(x), AP(-x)), sign): the better of both ends and which one it was, 1 for high values, -1 for low ones.

    Plain AP never sees a neuron that is low for its relation. The same sort, read backwards, gives the other end.
    """
    relation, sizes = _checked(scores, relation)
    ends: list[tuple[np.ndarray, np.ndarray]] = []
    for start in _starts(len(scores)):
        labels, tied = _sorted(scores[start : start + ROWS], relation)
        ends.append((_of_order(labels, tied, sizes), _of_order(labels[:, ::-1], tied[:, ::-1], sizes)))
    high, low = (np.concatenate(side) for side in zip(*ends, strict=True))
    return np.maximum(high, low), np.where(high >= low, 1, -1).astype(np.int8)


def average_precision_reference(scores: np.ndarray, positive: np.ndarray) -> float:
    """The definition, for one neuron and one relation: quadratic in the number of prompts."""
    above = scores[None, :] >= scores[positive][:, None]  # (positive, prompt)
    return float((above[:, positive].sum(axis=1) / above.sum(axis=1)).mean())


def chance_level(n_prompts: int, n_positive: int) -> float:
    """E[AP] of a neuron that knows nothing and has no ties: (H_P + (n - 1) / (P - 1) (P - H_P)) / P, H_P = sum 1/k.

    It lies above n / P, which is the AP of a constant neuron.
    """
    if not 1 <= n_positive <= n_prompts:
        raise ValueError(f"chance_level: got {n_positive} positives of {n_prompts} prompts, expected 1 to all.")
    harmonic = float((1.0 / np.arange(1, n_prompts + 1)).sum())
    return (harmonic + (n_positive - 1) / max(1, n_prompts - 1) * (n_prompts - harmonic)) / n_prompts


@dataclass(frozen=True, eq=False)
class PrecisionNull:
    """The null of AP where responses know nothing of relations: it depends on the numbers of prompts alone.

    draws   (relation, draw) AP of random orders, ascending         sizes   prompts per relation
    """

    draws: Float[np.ndarray, "relation draw"]
    sizes: tuple[int, ...]
    two_sided: bool

    @classmethod
    def of(
        cls, sizes: Sequence[int], n_draws: int = 20_000, *, two_sided: bool = False, seed: int = 0
    ) -> PrecisionNull:
        """Draw random orders of `sum(sizes)` prompts; one order serves all relations, and both signs."""
        if n_draws < FEWEST_DRAWS:
            raise ValueError(f"PrecisionNull: got {n_draws} random orders, expected at least {FEWEST_DRAWS}.")
        rng, counts = np.random.default_rng(seed), np.asarray(sizes)
        labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        found = []
        for start in range(0, n_draws, ROWS):
            order = rng.permuted(np.tile(labels, (min(ROWS, n_draws - start), 1)), axis=1)
            made = _of_order(order, None, counts)
            found.append(np.maximum(made, _of_order(order[:, ::-1], None, counts)) if two_sided else made)
        return cls(np.sort(np.concatenate(found).T, axis=1), tuple(map(int, counts)), two_sided)

    def p(self, observed: Float[np.ndarray, "*shape relation"]) -> Float[np.ndarray, "*shape relation"]:
        """P(null AP >= observed): counted in the draws, and beyond all but 2 % of them from a Pareto tail.

        Counting alone can't go below 1 / draws, which no correction over many neurons survives. The tail's shape is
        held at 0 or above (exponential or heavier), so that it never ends before the largest possible AP; and no p is
        smaller than that of a perfect neuron, 1 / (P choose n), which is exact.
        """
        columns = [self._tail_or_count(observed[..., r], r) for r in range(len(self.sizes))]
        return np.stack(columns, axis=-1)

    def _tail_or_count(self, observed: np.ndarray, r: int) -> np.ndarray:
        draws = self.draws[r]
        n_tail = int(TAIL * len(draws))
        reached = len(draws) - np.searchsorted(draws, observed - 1e-12, side="left")
        counted = (1.0 + reached) / (1.0 + len(draws))
        start = draws[-n_tail - 1]
        shape, scale = _pareto(draws[-n_tail:] - start)
        beyond = np.maximum(observed - start, 0.0)
        if scale == 0:  # the largest value of the null is common: counting says all there is to say
            return counted
        survival = np.exp(-beyond / scale) if shape == 0 else (1 + shape * beyond / scale) ** (-1 / shape)
        total, own = sum(self.sizes), self.sizes[r]
        perfect = np.exp(gammaln(own + 1) + gammaln(total - own + 1) - gammaln(total + 1)) * (1 + self.two_sided)
        fitted = np.maximum(n_tail / len(draws) * survival, min(1.0, perfect))
        return np.where(observed > start, fitted, counted)


def _pareto(excess: np.ndarray) -> tuple[float, float]:
    """(shape, scale) of a generalised Pareto tail, by probability-weighted moments (Hosking and Wallis, 1987)."""
    first = float(excess.mean())
    weights = 1 - (np.arange(1, len(excess) + 1) - 0.35) / len(excess)
    second = float((weights * excess).mean())
    if first == 0 or first == 2 * second:
        return 0.0, first
    shape = 2 - first / (first - 2 * second)
    return (shape, 2 * first * second / (first - 2 * second)) if shape > 0 else (0.0, first)


def _checked(scores: np.ndarray, relation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels and how often each occurs, after refusing what can't be ranked."""
    relation = np.asarray(relation)
    if scores.ndim != 2 or relation.shape != scores.shape[1:]:
        raise ValueError(
            f"average_precision: got scores {scores.shape} and {relation.shape} relations, "
            "expected (neurons, prompts) and one relation per prompt."
        )
    if not np.can_cast(scores.dtype, np.float32):
        raise ValueError(
            f"average_precision: got {scores.dtype} scores, expected float32: the other half of 64 bits holds the "
            "relation. Write scores.astype(np.float32)."
        )
    sizes = np.bincount(relation) if relation.size and relation.min() >= 0 else np.zeros(1, dtype=int)
    if not sizes.all():
        raise ValueError(
            f"average_precision: got {sizes.tolist()} prompts per relation, expected at least one of each, 0 to R - 1."
        )
    return relation.astype(np.int32), sizes


def _starts(n_rows: int) -> range:
    return range(0, max(1, n_rows), ROWS)


def _sorted(scores: np.ndarray, relation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Relations from the highest score to the lowest (row, prompt), and where a score equals the next one.

    The bits of a float32, with the lower 31 flipped where negative, order like the number itself: value and relation
    become one integer, and sorting integers needs no argsort.
    """
    bits = np.add(scores, np.float32(0.0), order="C", dtype=np.float32).view(np.int32)  # + 0 makes -0 equal to 0
    ordered = ~(bits ^ ((bits >> 31) & FLIP))  # ~ puts the highest first
    keys = ordered.astype(np.int64) << 32 | relation
    keys.sort(axis=1)
    values = (keys >> 32).astype(np.int32)
    if (values[:, 0] <= ~INFINITY).any() or (values[:, -1] >= INFINITY).any():  # NaN lies beyond infinity
        raise ValueError(
            "average_precision: got NaN or infinity among the scores, expected numbers that can be ranked."
        )
    return keys.astype(np.int32), values[:, 1:] == values[:, :-1]  # the lower half of a key is the relation


def _of_order(labels: np.ndarray, tied: np.ndarray | None, sizes: np.ndarray) -> np.ndarray:
    """AP (row, relation) from relations in order of rank, best first; `tied` where a rank's score is the next one's."""
    found = _of_ranks(labels, None, sizes)
    rows = np.flatnonzero(tied.any(axis=1)) if tied is not None else []
    if len(rows):
        assert tied is not None
        found[rows] = _of_ranks(labels[rows], tied[rows], sizes)
    return found


def _of_ranks(labels: np.ndarray, tied: np.ndarray | None, sizes: np.ndarray) -> np.ndarray:
    """The same, either without any tie or with the tie rule for every row."""
    n_prompts, first = labels.shape[1], np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.arange(n_prompts, dtype=np.int32) if tied is None else _run_ends(tied)
    # Sorting (relation, rank) puts the ranks of each relation side by side, ascending: the sizes are known beforehand.
    wide = np.int32 if len(sizes) * n_prompts < 2**31 else np.int64
    grouped = labels * wide(n_prompts) + rank
    grouped.sort(axis=1)
    own = np.arange(n_prompts) if tied is None else _run_ends(grouped[:, 1:] == grouped[:, :-1])
    hits = own - (np.repeat(first, sizes) - 1.0)  # float64, (prompt,) or (row, prompt): positives at least as high
    above = grouped - (np.repeat(np.arange(len(sizes)) * n_prompts, sizes) - 1.0)  # prompts at least as high
    return np.add.reduceat(np.divide(hits, above, out=above), first, axis=1) / sizes


def _run_ends(same_as_next: np.ndarray) -> np.ndarray:
    """(row, n) for each item the index of the last one of its run."""
    n = same_as_next.shape[1] + 1
    ends = np.where(same_as_next, np.int32(n), np.arange(n - 1, dtype=np.int32))
    ends = np.pad(ends, ((0, 0), (0, 1)), constant_values=n - 1)
    return np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
