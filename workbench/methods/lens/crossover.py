"""Where one language hands over to another: the layer from which the target leads to the end, after another led.

crossover = min {l : target leads at every layer from l on}, if the other language leads somewhere before it.
A language leads where its mean over items is the larger one and at least `least`: with both near 0 nobody leads.
Interval: percentile bootstrap over items (Efron, 1979); the question is from Wendler et al., 2024 (arXiv 2402.10588).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from workbench.stats import resampling_weights

CERTAIN = 0.95  # share of resamples that must agree before anything is reported


@dataclass(frozen=True)
class Crossover:
    """layer, low, high: where, with its 95 % interval; None where no crossover is shown.

    share   of the resamples that show one         led   layers at which the other leads in 95 % of the resamples
    """

    layer: int | None
    low: int | None
    high: int | None
    share: float
    led: tuple[int, ...]


def crossover(
    target: Float[np.ndarray, "item layer"],
    other: Float[np.ndarray, "item layer"],
    *,
    least: float = 0.0,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> Crossover:
    """The layer at which `target` takes over from `other`, with its interval over items.

    One is reported where all items together and 95 % of the resamples show one, and where at some layer before it the
    other language leads in 95 % of them: either alone happens too often among unrelated curves.
    """
    if target.shape != other.shape or target.ndim != 2 or not len(target):
        raise ValueError(
            f"crossover: got shapes {target.shape} and {other.shape}, expected the same (item, layer) with an item."
        )
    (layer,), _ = _hand_over(target.mean(0)[None], other.mean(0)[None], least)
    weights = resampling_weights(len(target), n_bootstrap, seed)
    drawn, leads = _hand_over(weights @ target, weights @ other, least)
    led = tuple(int(one) for one in np.flatnonzero(leads.mean(0) >= CERTAIN))
    shown = drawn[drawn >= 0]
    share = len(shown) / n_bootstrap
    if layer < 0 or share < CERTAIN or not any(one < layer for one in led):
        return Crossover(None, None, None, share, led)
    low, high = np.quantile(shown, (0.025, 0.975), method="nearest")
    return Crossover(int(layer), int(low), int(high), share, led)


def _hand_over(
    target: Float[np.ndarray, "draw layer"], other: Float[np.ndarray, "draw layer"], least: float
) -> tuple[Int[np.ndarray, " draw"], np.ndarray]:
    """The layer of the crossover of each draw, -1 for none, and where the other language leads."""
    target_leads = (target > other) & (target >= least)
    other_leads = (other > target) & (other >= least)
    to_the_end = np.cumprod(target_leads[:, ::-1], axis=1)[:, ::-1].astype(bool)  # leads here and ever after
    layer = np.where(to_the_end.any(axis=1), to_the_end.argmax(axis=1), -1)
    before = np.arange(target.shape[1]) < layer[:, None]
    return np.where((other_leads & before).any(axis=1), layer, -1), other_leads
