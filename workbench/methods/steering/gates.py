"""A gate over prompts: a score per row, a threshold, and how well it tells the prompts that match from the others.

score(h) = cos(h - m, c), signed, m a centre; as published cos(h, tanh(c c^T h)), which is |cos| but for small values.
F1 = 2 TP / (2 TP + FP + FN). The threshold with the best F1 is chosen on some rows and must be reported on others.
Source: Lee et al., 2024, "Programming Refusal with Conditional Activation Steering" (CAST).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.stats import auc

Score = Literal["cosine", "tanh"]
When = Literal["above", "below"]


@dataclass(frozen=True)
class Threshold:
    """Rows whose score lies above (or below) `value` match. `f1` is that of the rows it was chosen on."""

    value: float
    when: When
    f1: float

    def opens(self, scores: np.ndarray) -> np.ndarray:
        """(n,) True at the rows that match."""
        return scores > self.value if self.when == "above" else scores < self.value


def row_scores(
    values: Float[Tensor, "row width"], direction: Float[Tensor, " width"], score: Score = "cosine"
) -> Float[Tensor, " row"]:
    """The score of each row in [-1, 1], from that row alone; a row of zeros scores 0.

    "tanh" is CAST's: it is blind to the sign of the projection, so that rows on the far side match as well.
    """
    unit = direction / direction.norm()
    along = values @ unit  # (row,)
    if score == "cosine":
        return along / values.norm(dim=-1).clamp_min(torch.finfo(values.dtype).tiny)
    bent = torch.tanh(along[:, None] * unit)
    norms = values.norm(dim=-1) * bent.norm(dim=-1)
    return (values * bent).sum(-1) / norms.clamp_min(torch.finfo(values.dtype).tiny)


def best_threshold(scores: np.ndarray, positive: np.ndarray, when: When | None = None) -> Threshold:
    """The threshold of best F1 on these rows; among equals the one in the widest gap between scores.

    when   None tries both sides and prefers "above". Every distinct decision is tried: midpoints between neighbouring
           scores and one threshold beyond each end, so that "always" (F1 = 2 base / (1 + base)) is among them.
    Raises ValueError where one of the two classes is missing or a score is not finite.
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if scores.shape != positive.shape or positive.all() or not positive.any() or not np.isfinite(scores).all():
        raise ValueError(
            f"best_threshold: got {len(scores)} scores, {int(positive.sum())} of {len(positive)} rows positive, "
            "expected finite scores and rows of both classes."
        )
    found = [_best_above(scores, positive)] if when != "below" else []
    if when != "above":
        mirrored = _best_above(-scores, positive)
        found.append(Threshold(-mirrored.value, "below", mirrored.f1))
    return max(found, key=lambda each: each.f1)  # the first of equals


def _best_above(scores: np.ndarray, positive: np.ndarray) -> Threshold:
    order = np.argsort(scores)
    values, hits = scores[order], positive[order]
    # With the threshold below the i-th smallest score, rows i.. open: (n + 1,) for i = 0 .. n.
    true = np.append(np.cumsum(hits[::-1])[::-1], 0)
    opened = np.arange(len(values), -1, -1)
    f1 = 2.0 * true / (opened + positive.sum())
    gaps = np.concatenate([[0.0], np.diff(values), [0.0]])
    allowed = np.concatenate([[True], np.diff(values) > 0, [True]])  # equal scores can't be parted
    best = f1[allowed].max()
    widest = int(np.argmax(np.where(allowed & (f1 >= best - 1e-12), gaps, -1.0)))
    ends = np.concatenate([[values[0] - 1.0], values, [values[-1] + 1.0]])
    return Threshold(float((ends[widest] + ends[widest + 1]) / 2), "above", float(best))


@dataclass(frozen=True)
class Quality:
    """How well a gate tells matching rows from others. Shares are NaN where nothing was opened."""

    f1: float
    precision: float
    recall: float
    auc: float


def gate_quality(scores: np.ndarray, positive: np.ndarray, threshold: Threshold) -> Quality:
    """F1, precision and recall of `threshold` on these rows, and the area under the curve of their scores."""
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    opened = threshold.opens(scores)
    true = int((opened & positive).sum())
    precision = true / int(opened.sum()) if opened.any() else float("nan")
    area = auc((scores if threshold.when == "above" else -scores)[:, None], positive)[0]
    return Quality(2 * true / int(opened.sum() + positive.sum()), precision, true / int(positive.sum()), float(area))


def three_parts(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices 0 .. n - 1 at random in three parts: half to find a direction, a quarter each to choose and to report."""
    if n < 4:
        raise ValueError(f"fit: got {n} texts in a group, expected at least 4: to learn, to choose and to report on.")
    order = rng.permutation(n)
    return order[: n // 2], order[n // 2 : n // 2 + n // 4], order[n // 2 + n // 4 :]
