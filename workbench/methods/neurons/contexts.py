"""Where a unit fires: the values of one neuron, or of one feature, on a sample of texts, by word and in context.

share = value / peak; the peak is the value of the largest size, sign included: a neuron of a gated MLP may be strongest
below 0. Source: own; contexts of the largest values as in Geva et al., 2021 (arXiv 2012.14913), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.stats import mean_intervals


@dataclass(frozen=True, eq=False)
class Firing:
    """A unit's values on the tokens of a sample, (token,) each, with the text, the position and the id of each token.

    Raises ValueError for values that are all 0, of which there are no shares.
    """

    values: Float[np.ndarray, " token"]
    text: Int[np.ndarray, " token"]
    position: Int[np.ndarray, " token"]
    ids: Int[np.ndarray, " token"]

    def __post_init__(self) -> None:
        if not np.any(self.values):
            raise ValueError(f"Firing: the unit is 0 on all {len(self.values)} tokens, expected one that fires.")

    @property
    def peak(self) -> float:
        """The value of the largest size, sign included."""
        return float(self.values[np.abs(self.values).argmax()])

    @property
    def shares(self) -> Float[np.ndarray, " token"]:
        """Values as shares of the peak, at most 1."""
        return self.values / self.peak

    def by_token(self, fewest: int = 3) -> pd.DataFrame:
        """id, count, share, low, high: mean share of each token that comes `fewest` times or more, with its 95 %
        interval, cut at 1, which no share passes; the strongest first. Raises ValueError where none comes so often."""
        ids, where, count = np.unique(self.ids, return_inverse=True, return_counts=True)
        often = np.flatnonzero(count >= fewest)
        if not len(often):
            raise ValueError(
                f"by_token: no token comes {fewest} times in this sample, expected some that do. Give more texts."
            )
        mean, low, high = mean_intervals(self.shares, where)[:, often]
        columns = {"id": ids[often], "count": count[often], "share": mean, "low": low, "high": high.clip(max=1.0)}
        table = pd.DataFrame(columns)
        return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)

    def strongest(self, count: int) -> Int[np.ndarray, " text"]:
        """Indices of the strongest token of each text, of the `count` texts where it is strongest, best first."""
        order = np.argsort(-self.shares, kind="stable")
        _, first = np.unique(self.text[order], return_index=True)
        return order[np.sort(first)[:count]]

    def around(self, text: int) -> dict[int, float]:
        """Position -> share of the peak, of every token of one text that was read."""
        here = self.text == text
        return dict(zip(self.position[here].tolist(), self.shares[here].tolist(), strict=True))
