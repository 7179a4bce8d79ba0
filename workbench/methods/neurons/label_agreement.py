"""Do two models name their neurons alike? The share of labels that stay, per layer: base and fine-tuned, or two steps.

agreement = #{top token of neuron j is the same in a and b} / #labels; chance = sum_t p_a(t) p_b(t), p shares of labels.
Source: Davies, 2025 (arXiv 2501.02688), its comparison of base and instruct; interval after Wilson, 1927.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.neurons.labels import COLORS, NeuronTokensResult
from workbench.result import Result
from workbench.stats import wilson_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

EVERY, LABELLED = "every neuron", "above the null line in both"
MUST_BE_EQUAL = ("tokenizer", "layers", "sides", "signs", "score", "fold_norm")


@dataclass(frozen=True, eq=False, kw_only=True)
class AgreementResult(Result):
    """Which labels two models share. L layers, N neurons.

    same      (L, N, side, sign) the top token is the same         labelled   (L, N, side, sign) above both null lines
    chance    (L, side) agreement of labels drawn from each model's own label frequencies of that layer
    names     of the two subjects
    """

    same: np.ndarray
    labelled: np.ndarray
    chance: np.ndarray
    layers: tuple[int, ...]
    sides: tuple[str, ...]
    names: tuple[str, str]

    columns: ClassVar[tuple[str, ...]] = ("layer", "side", "among", "agreement", "low", "high", "n", "by_chance")

    def table(self) -> pd.DataFrame:
        """One row per layer, side and group of labels that has any; n counts labels, one per neuron and sign."""
        rows = []
        for among, mask in ((EVERY, np.ones_like(self.same)), (LABELLED, self.labelled)):
            for i, layer in enumerate(self.layers):
                for j, side in enumerate(self.sides):
                    chosen = self.same[i, :, j][mask[i, :, j]]
                    if chosen.size:
                        low, high = wilson_interval(int(chosen.sum()), chosen.size)
                        share = float(chosen.mean())
                        row = (layer, side, among, share, float(low), float(high), chosen.size, self.chance[i, j])
                        rows.append(row)
        return pd.DataFrame(rows, columns=list(self.columns))

    def overall(self, side: str, among: str = EVERY) -> float:
        """The share of labels of one side that stay, over all layers; NaN where there is none."""
        rows = self.table().query("side == @side and among == @among")
        return float(np.average(rows["agreement"], weights=rows["n"])) if len(rows) else float("nan")

    def views(self) -> dict[str, list[Any]]:
        return {"among": [EVERY, LABELLED]}

    def plot(self, among: str = EVERY) -> Figure:
        """Agreement per layer and side with its interval; `among` every neuron, or those labelled in both models."""
        if among not in (EVERY, LABELLED):
            raise ValueError(f"plot: got among {among!r}, expected {EVERY!r} or {LABELLED!r}.")
        table = self.table().query("among == @among")
        parts = [
            f"{self.overall(side, among):.0%} of {side} labels" for side in self.sides if side in set(table["side"])
        ]
        title = f"{self.names[0]} and {self.names[1]} share {' and '.join(parts) or 'no labels'} ({among}; chance "
        title += f"{self.chance.mean():.1%})"
        names: dict[str, Any] = {"x_title": "layer", "y_title": "share of neurons that keep their token"}
        figure = plots.lines(table, "layer", "agreement", "side", "low", "high", title=title, colors=COLORS, **names)
        return figure.update_yaxes(tickformat=".0%", range=[0, 1.02]).update_xaxes(dtick=max(1, len(self.layers) // 12))


def agreement(a: NeuronTokensResult, b: NeuronTokensResult) -> AgreementResult:
    """Compare the labels of two models neuron by neuron.

    ValueError unless both were read with the same vocabulary, layers, sides, signs, score and folding, and have as many
    neurons: a label of one would mean another thing in the other.
    """
    for name in MUST_BE_EQUAL:
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"agreement: got {name} {getattr(a, name)!r} and {getattr(b, name)!r}, expected the same. "
                "Run NeuronTokens with the same settings on two models that share a tokenizer."
            )
    if a.norm.shape != b.norm.shape:
        raise ValueError(
            f"agreement: got {a.norm.shape[1]} and {b.norm.shape[1]} neurons per layer, expected the same."
        )
    one, other = a.top_token[..., 0], b.top_token[..., 0]  # (layer, neuron, side, sign)
    return AgreementResult(
        same=one == other,
        labelled=a.above_null() & b.above_null(),
        chance=np.array(
            [[_chance(one[i, :, j], other[i, :, j]) for j in range(len(a.sides))] for i in range(len(one))]
        ),
        layers=a.layers,
        sides=a.sides,
        names=(a.subject_name, b.subject_name),
    )


def _chance(one: np.ndarray, other: np.ndarray) -> float:
    """The chance that a label of `one` equals a label of `other`, both drawn at random."""
    size = int(max(one.max(), other.max())) + 1
    shares = [np.bincount(ids.ravel(), minlength=size) / ids.size for ids in (one, other)]
    return float(shares[0] @ shares[1])
