"""What fusing blocks did: one row per fusion, the loss of each epoch, and who took over the work.

Source: FuseGPT, Pan et al., 2024 (arXiv 2411.14507); the losses on held-out texts are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Fusion:
    """One block that was fused into its neighbours.

    group       the blocks that were trained together, this one among them
    influence   its macro influence before
    curve       loss of the group on held-out texts, before training and after each epoch; the best epoch was kept
    shares      ((neighbour, |C o W_i| / |W'|), ...): how much of a neighbour's weights the block is by now
    nll         held-out nats per token with the block, without it, and after the fusion
    """

    block: int
    group: tuple[int, ...]
    influence: float
    curve: tuple[float, ...]
    shares: tuple[tuple[int, float], ...] = ()
    nll: tuple[float, ...] = ()

    def after(self, nll: float) -> Fusion:
        """This fusion with the loss that it led to."""
        return replace(self, nll=(*self.nll, nll))


@dataclass(frozen=True, eq=False, kw_only=True)
class FusionResult(Result):
    """What each fusion did, in their order. F fusions, L blocks, E epochs at most.

    blocks (F,), influence (F,), group (F, L) True for members     curve (F, 1 + E), NaN after the last epoch
    shares (F, L), NaN outside of the group     nll (F, 3) with the block, without it, fused     parameters (F,) removed
    """

    blocks: np.ndarray
    group: np.ndarray
    influence: np.ndarray
    curve: np.ndarray
    shares: np.ndarray
    nll: np.ndarray
    parameters: np.ndarray

    columns: ClassVar[tuple[str, ...]] = (
        "fusion", "block", "group", "macro_influence", "loss_before", "loss_after", "epochs", "nll_with", "nll_without",
        "nll_fused", "parameters_removed",
    )  # fmt: skip

    @classmethod
    def of(cls, fusions: Sequence[Fusion], n_layers: int, parameters: Sequence[int]) -> FusionResult:
        """The result of these fusions; `parameters` removed by each."""
        group, shares = np.zeros((len(fusions), n_layers), dtype=bool), np.full((len(fusions), n_layers), np.nan)
        curve = np.full((len(fusions), max(len(fusion.curve) for fusion in fusions)), np.nan)
        for row, fusion in enumerate(fusions):
            group[row, list(fusion.group)] = True
            curve[row, : len(fusion.curve)] = fusion.curve
            for block, share in fusion.shares:
                shares[row, block] = share
        return cls(
            blocks=np.array([fusion.block for fusion in fusions]),
            group=group,
            influence=np.array([fusion.influence for fusion in fusions]),
            curve=curve,
            shares=shares,
            nll=np.array([fusion.nll for fusion in fusions]),
            parameters=np.array(parameters),
        )

    def table(self) -> pd.DataFrame:
        """One row per fusion; losses are those of the group on held-out texts, nll is in nats per token."""
        columns: dict[str, Any] = {
            "fusion": range(1, len(self.blocks) + 1),
            "block": self.blocks,
            "group": [", ".join(map(str, np.flatnonzero(row))) for row in self.group],
            "macro_influence": self.influence,
            "loss_before": self.curve[:, 0],
            "loss_after": np.nanmin(self.curve, axis=1),
            "epochs": np.isfinite(self.curve).sum(axis=1) - 1,
        }
        columns |= dict(zip(("nll_with", "nll_without", "nll_fused"), self.nll.T, strict=True))
        return pd.DataFrame(columns | {"parameters_removed": self.parameters}, columns=list(self.columns))

    def plot(self, view: str = "curves", **options: Any) -> Figure:
        """curves: loss of each fusion over its epochs · shares: who took over the work of the fused blocks ·
        losses: of predictions with each block, without it, and fused."""
        drawings: dict[str, Callable[[], Figure]] = {
            "curves": self._plot_curves,
            "shares": self._plot_shares,
            "losses": self._plot_losses,
        }
        if view not in drawings:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(drawings)}.")
        return drawings[view]()

    def views(self) -> dict[str, list[Any]]:
        return {"view": ["curves", "shares", "losses"]}

    def _plot_curves(self) -> Figure:
        rows = [
            (f"block {block}", epoch, loss)
            for block, curve in zip(self.blocks, self.curve, strict=True)
            for epoch, loss in enumerate(curve)
            if np.isfinite(loss)
        ]
        drawn = pd.DataFrame(rows, columns=["fused", "epoch", "loss"])
        left = [
            f"{np.nanmin(curve) / curve[0]:.0%} without block {block}"
            if curve[0] > 0
            else f"none without block {block}"
            for block, curve in zip(self.blocks, self.curve, strict=True)
        ]
        title = f"Of what the group gets wrong when a block leaves, training leaves {', '.join(left)}"
        y_title = "loss of the group, held-out texts"
        return plots.lines(drawn, "epoch", "loss", "fused", title=title, y_title=y_title).update_yaxes(
            rangemode="tozero"
        )

    def _plot_shares(self) -> Figure:
        rows = [
            (f"block {self.blocks[row]}", str(block), self.shares[row, block])
            for row in range(len(self.blocks))
            for block in np.flatnonzero(np.isfinite(self.shares[row]))
        ]
        drawn = pd.DataFrame(rows, columns=["fused", "neighbour", "share"])
        top = drawn.loc[drawn["share"].idxmax()]
        title = f"Block {top['neighbour']} took over most: {top['share']:.1%} of its weights' norm are {top['fused']}'s"
        if not top["share"]:
            title = "No neighbour took over any of the weights of the blocks that left"
        titles: dict[str, Any] = {
            "title": title,
            "x_title": "neighbour",
            "y_title": "share of the norm, |C o W fused| / |W'|",
        }
        figure = plots.bars(drawn, "neighbour", "share", color="fused", **titles)
        return figure.update_xaxes(categoryorder="array", categoryarray=sorted(set(drawn["neighbour"]), key=int))

    def _plot_losses(self) -> Figure:
        sides = ("with the block", "without it", "fused")
        rows = [
            (f"{number}: block {block}", side, loss)
            for number, (block, losses) in enumerate(zip(self.blocks, self.nll, strict=True), start=1)
            for side, loss in zip(sides, losses, strict=True)
        ]
        drawn = pd.DataFrame(rows, columns=["fusion", "side", "nll"])
        start, dropped, end = self.nll[0, 0], self.nll[-1, 1], self.nll[-1, 2]
        title = (
            f"After {len(self.blocks)} fusions a held-out token costs {end:.2f} nats, {start:.2f} before; without the "
        )
        title += f"last training {dropped:.2f}"
        titles: dict[str, Any] = {"title": title, "x_title": "fusion", "y_title": "nats per token, held-out texts"}
        return plots.bars(drawn, "fusion", "nll", color="side", **titles)
