"""One text read twice, through the untoggled cache and through the toggled one: what the second lost.

KL(p0 || p) = sum_v p0(v) (log p0(v) - log p(v)); head error = mean over queries of |o - o0| / |o0|, 0 the untoggled.
Intervals: texts are drawn with all their tokens (bootstrap, Efron, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workbench.methods.cache.continuations import Text
from workbench.methods.cache.reading import Reading
from workbench.stats import resampling_weights

N_BOOTSTRAP = 1000
TOKEN_ARRAYS = ("nll", "base_nll", "kl", "same_top", "right", "base_right")


@dataclass(frozen=True, eq=False)
class Loss:
    """One text, both sides compared: arrays over its continuation tokens, errors (layer, head), and what is held."""

    tokens: dict[str, np.ndarray]
    head_error: np.ndarray
    held: np.ndarray
    again: np.ndarray  # (seq,) prompt tokens that the continuation says again
    cache_bytes: tuple[float, float]


def compare(base: Reading, toggled: Reading, text: Text) -> Loss:
    """What the toggled side lost on one text."""
    before, after = base.logprobs.double(), toggled.logprobs.double()
    following = before.new_tensor(text.continuation).long()[:, None]
    nll, base_nll = (-side.gather(1, following)[:, 0] for side in (after, before))
    kl = torch.where(before.exp() > 0, before.exp() * (before - after), 0.0).sum(-1)  # 0 log 0 = 0
    top, base_top = after.argmax(-1), before.argmax(-1)
    columns = (nll, base_nll, kl, top == base_top, top == following[:, 0], base_top == following[:, 0])
    again = np.isin(text.prompt[: toggled.held.shape[2]], text.continuation)
    return Loss(
        tokens={name: value.double().cpu().numpy() for name, value in zip(TOKEN_ARRAYS, columns, strict=True)},
        head_error=padded([relative_error(*pair) for pair in zip(base.heads, toggled.heads, strict=True)]),
        held=toggled.held,
        again=again,
        cache_bytes=(base.cache_bytes, toggled.cache_bytes),
    )


def relative_error(base: Tensor, toggled: Tensor) -> np.ndarray:
    """(head,) mean over queries of |toggled - base| / |base|; NaN where nothing was asked or every base is zero."""
    before, after = base.double(), toggled.double()
    norm = before.norm(dim=-1)  # (queries, head)
    share = ((after - before).norm(dim=-1) / norm).where(norm > 0, float("nan"))
    return share.nanmean(0).cpu().numpy()


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of unequal length as one float64 matrix, NaN where a row has ended."""
    matrix = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in enumerate(rows):
        matrix[row, : len(values)] = values
    return matrix


def quantile_interval(
    values: np.ndarray, text: np.ndarray, at: float, *, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> tuple[float, float, float]:
    """(estimate, low, high) of the quantile `at` of tokens' values, the smallest value that a share `at` don't exceed.

    Texts are drawn with all their tokens; a resample at a time, so memory is O(tokens).
    """
    order = np.argsort(values, kind="stable")
    ranked, owner = values[order], text[order]

    def quantile(weight: np.ndarray) -> float:
        below = weight[owner].cumsum()
        return float(ranked[np.searchsorted(below, at * below[-1] * (1 - 1e-12))])

    n_texts = int(text.max()) + 1
    drawn = [quantile(weight) for weight in resampling_weights(n_texts, n_bootstrap, seed)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return quantile(np.ones(n_texts)), float(low), float(high)


def shares_held(loss: Loss) -> tuple[np.ndarray, np.ndarray]:
    """(layer, kv_head) share of the prompt's tokens held, and of those said again; NaN where there are none."""
    held = np.where(loss.held >= 0, loss.held, np.nan).astype(np.float64)
    again = held[:, :, loss.again].mean(axis=2) if loss.again.any() else np.full(held.shape[:2], np.nan)
    return held.mean(axis=2), again
