"""Naming a vector by the tokens whose unembedding rows it points at, and the line that chance draws.

score(v, t) = v . W_t (dot) · v . W_t / |v| |W_t| (cosine) · the cosine with W_t - mean W (centred); label = argmax_t.
Source: Davies, 2025, "Flash Interpretability" (arXiv 2501.02688); the scores beside "dot" and the line are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.unembedding import top_tokens

Score = Literal["dot", "cosine", "centred"]
SCORES: tuple[Score, ...] = ("dot", "cosine", "centred")
SIGNS: tuple[str, ...] = ("+", "-")
NULL_LEVEL = 0.999  # share of random vectors that stay below the line


def prepared_rows(
    rows: Float[Tensor, "vocab d_model"], score: Score, allowed: Bool[Tensor, " vocab"] | None = None
) -> Float[Tensor, "vocab d_model"]:
    """The rows that a plain product gives `score` with, in float32: as they are, of length 1, or centred and so.

    The mean is that of the allowed rows. In a dot product it would shift all scores of a vector alike.
    """
    if score not in SCORES:
        raise ValueError(f"labels: got score {score!r}, expected one of {', '.join(SCORES)}.")
    rows = rows.float()
    if score == "dot":
        return rows
    if score == "centred":
        rows = rows - (rows if allowed is None else rows[allowed.to(rows.device)]).mean(0)
    return _units(rows)


def label(
    vectors: Float[Tensor, "n d_model"],
    rows: Float[Tensor, "vocab d_model"],
    k: int,
    *,
    score: Score = "cosine",
    signs: Sequence[str] = SIGNS,
    allowed: Bool[Tensor, " vocab"] | None = None,
) -> tuple[Float[Tensor, "n sign k"], Int[Tensor, "n sign k"]]:
    """(scores, token ids), best first, of every vector ("+") and of its negative ("-"); ties go to the smaller id.

    rows   as `prepared_rows` makes them. A zero vector has score 0 with every token, and so the first ids.
    """
    vectors = vectors.float() if score == "dot" else _units(vectors.float())
    if "-" in signs:
        scores, ids = top_tokens(vectors, rows, k, allowed=allowed, negated=True)
        kept = [SIGNS.index(sign) for sign in signs]
        return scores[kept].transpose(0, 1), ids[kept].transpose(0, 1)
    scores, ids = top_tokens(vectors, rows, k, allowed=allowed)
    return scores[:, None], ids[:, None]


def null_line(
    rows: Float[Tensor, "vocab d_model"],
    *,
    scale: Float[Tensor, " d_model"] | None = None,
    signs: Sequence[str] = SIGNS,
    allowed: Bool[Tensor, " vocab"] | None = None,
    n_random: int = 4000,
    seed: int = 0,
) -> float:
    """The best score that 999 in 1000 random vectors of length 1 stay below, whichever of the signs is best.

    scale   what is folded into the neurons, for the random vectors too: rows long along the same coordinates make
            chance stronger
    """
    # numpy's stream: torch's, from the same seed, may be the very numbers that a random model's rows were made of
    drawn = np.random.default_rng(seed).standard_normal((n_random, rows.shape[1]), dtype=np.float32)
    noise = torch.from_numpy(drawn).to(rows.device)
    vectors = _units(noise if scale is None else noise * scale)
    scores, _ = label(vectors, rows, 1, score="dot", signs=signs, allowed=allowed)
    return float(torch.quantile(scores[..., 0].amax(1).double(), NULL_LEVEL))


def _units(vectors: Tensor) -> Tensor:
    """Each vector at length 1; the zero vector stays what it is."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
