"""Do the neurons of a layer fire in groups that a router could switch off? What is lost on unseen tokens, against lots.

error(a) = |y - y_a| / |y| over held-out tokens, y what the neurons write and y_a with only a routed experts per token.
Source: the experts of CMoE, Pei et al., 2025 (arXiv 2502.04416); the held-out error and its control by lot are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench import plots
from workbench.methods.pruning.experts import Experts
from workbench.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CARVED, LOTS = "neurons that fire together", "neurons drawn by lot"
Route = Callable[[Experts], Int[Tensor, "token expert"]]


@dataclass(frozen=True, eq=False, kw_only=True)
class CoFiringResult(Result):
    """What each layer loses with fewer experts. `facts` is the table; low and high are the extremes over lots."""

    facts: pd.DataFrame
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "experts", "active", "active_share", "error", "low", "high", "load_entropy", "n_tokens",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per layer, kind of experts and number of routed experts that run."""
        return self.facts.loc[:, list(self.columns)]

    def gain(self) -> pd.DataFrame:
        """Columns layer, gain: how far below lots the error is, as a share of theirs, with about half active."""
        facts = self.facts
        nearest = facts.loc[(facts["active_share"] - 0.5).abs().groupby(facts["layer"]).idxmin(), ["layer", "active"]]
        wide = nearest.merge(facts).pivot(index="layer", columns="experts", values="error")
        return pd.DataFrame({"layer": wide.index, "gain": (1 - wide[CARVED] / wide[LOTS]).to_numpy()})

    def views(self) -> dict[str, list[Any]]:
        return {"layer": [None, *sorted(set(self.facts["layer"].tolist()))]}

    def plot(self, layer: int | None = None) -> Figure:
        """None: the gain over lots of each layer; a layer: its error against the share of neurons that run."""
        if layer is None:
            gain = self.gain()
            best = gain.loc[gain["gain"].idxmax()]
            title = (
                f"With half of the neurons off by topic, layer {int(best['layer'])} loses {best['gain']:.0%} less than "
                "with neurons off by lot, the most of all layers"
            )
            options: dict[str, Any] = {"x_title": "layer", "y_title": "error saved against lots, at half active"}
            return plots.bars(gain, "layer", "gain", title=title, **options).update_yaxes(tickformat=".0%")
        drawn = self.facts.loc[self.facts["layer"] == layer, :]
        if drawn.empty:
            raise ValueError(f"plot: got layer {layer}, expected one of {self.views()['layer'][1:]}.")
        saved = self.gain().set_index("layer").loc[layer, "gain"]
        title = f"Layer {layer}: experts of neurons that fire together lose {saved:.0%} less than lots at half active"
        options = {"x_title": "share of the neurons that run", "y_title": "error of the block's output / its norm"}
        figure = plots.lines(drawn, "active_share", "error", "experts", "low", "high", title=title, **options)
        return figure.update_xaxes(tickformat=".0%").update_yaxes(rangemode="tozero")


def layer_facts(
    said: Float[Tensor, "token neuron"],
    down: Float[Tensor, "d_model neuron"],
    experts: Experts,
    route: Route,
    n_lots: int,
    seed: int,
) -> pd.DataFrame:
    """The rows of one layer: `said` by its neurons on unseen tokens; `route` ranks the experts for each token."""
    carved = _curve(said, down, experts, route)
    lots = [_curve(said, down, experts.shuffled(seed + number), route) for number in range(n_lots)]
    rows = []
    for active, (error, entropy) in enumerate(carved):
        share = experts.active_share(active)
        others = [curve[active] for curve in lots]
        errors = np.array([one for one, _ in others])
        base = (experts.layer, active, share, len(said))
        rows.append((*base, CARVED, error, error, error, entropy))
        mean_entropy = float(np.mean([one for _, one in others]))
        rows.append((*base, LOTS, float(errors.mean()), float(errors.min()), float(errors.max()), mean_entropy))
    names = ["layer", "active", "active_share", "n_tokens", "experts", "error", "low", "high", "load_entropy"]
    return pd.DataFrame(rows, columns=names)


def _curve(said: Tensor, down: Tensor, experts: Experts, route: Route) -> list[tuple[float, float]]:
    """(error, entropy of the load in nats) with 0, 1, ... routed experts per token."""
    places = {unit: place for place, unit in enumerate(experts.units)}
    whole, order = said @ down.T, route(experts)
    left = said.clone()
    left[:, [places[unit] for unit in experts.shared]] = 0.0
    members = [torch.tensor([places[unit] for unit in one]) for one in experts.experts]
    load = torch.zeros(len(members), dtype=torch.float64)
    found = [(float((left @ down.T).norm() / whole.norm()), 0.0)]
    for column in order.T:
        for part, units in enumerate(members):
            rows = (column == part).nonzero()[:, 0]
            left[rows[:, None], units] = 0.0
            load[part] += len(rows)
        shares = load / load.sum()
        found.append((float((left @ down.T).norm() / whole.norm()), float(torch.special.entr(shares).sum())))
    return found
