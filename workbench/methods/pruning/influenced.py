"""What block influence found: a table of blocks, the order in which they can go, and what that costs.

Ranks count from 1, the block that goes first. Intervals are bootstraps over texts, weighted by their tokens.
Sources: ShortGPT (arXiv 2403.03853), FuseGPT (arXiv 2411.14507); the controls are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from workbench import plots
from workbench.pruned.plan import Plan, Shape
from workbench.result import Result
from workbench.stats import bootstrap_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLOCK, MACRO, LAST, RANDOM = "block_influence", "macro_influence", "last_blocks", "random"
NAMES = {BLOCK: "block influence", MACRO: "macro influence", LAST: "the last blocks", RANDOM: "random"}
COLORS = dict(zip(NAMES.values(), (plots.BLUE, plots.VERMILLION, plots.GREEN, plots.GREY), strict=True))
N_BOOTSTRAP = 1000


@dataclass(frozen=True, eq=False, kw_only=True)
class InfluenceResult(Result):
    """Influence of L blocks on T texts, and the orders that follow from it.

    alone (text, block)            BI; NaN for blocks that were dropped already, here and below
    at_end (round, text, block)    MI, measured again after each removal; no round where it was not asked for
    n_tokens (text,)               weights of every mean over texts
    removed (order, n)             blocks in the order in which they go, -1 past the end; orders are named in `orders`
    nll (order, count, text)       nats per token of held-out texts with 0, 1, ... n blocks dropped; NaN past the end
    held_out_tokens (text,)        tokens that were predicted in them; none where nothing was validated
    parameters, kv_bytes (block,)  what a block weighs, and its bytes in the cache per token
    by, n_drop                     the measure that decides, and how many blocks were asked for
    """

    alone: np.ndarray
    at_end: np.ndarray
    n_tokens: np.ndarray
    removed: np.ndarray
    nll: np.ndarray
    held_out_tokens: np.ndarray
    parameters: np.ndarray
    kv_bytes: np.ndarray
    orders: tuple[str, ...]
    shape: tuple[int | None, ...]
    by: str
    n_drop: int
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "block", "block_influence", "block_low", "block_high", "macro_influence", "macro_low", "macro_high",
        "block_rank", "macro_rank", "dropped", "parameters", "kv_bytes", "seed",
    )  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row per block that is there: its influence with 95 % intervals, when it goes, and what it weighs.

        Ranks are NaN for blocks that stay to the end; macro columns are NaN where macro influence was not measured.
        """
        there = self.there
        columns: dict[str, Any] = {"block": there}
        macro = self.at_end[0] if len(self.at_end) else np.full_like(self.alone, np.nan)
        for name, values in (("block", self.alone), ("macro", macro)):
            estimate, low, high = self._mean(values[:, there])
            columns |= {f"{name}_influence": estimate, f"{name}_low": low, f"{name}_high": high}
        for name, order in (("block", BLOCK), ("macro", MACRO)):
            going = self.order(by=order) if order in self.orders else ()
            columns[f"{name}_rank"] = [going.index(block) + 1.0 if block in going else np.nan for block in there]
        columns |= {"dropped": np.isin(there, self.order(self.n_drop)), "parameters": self.parameters[there]}
        return pd.DataFrame(columns | {"kv_bytes": self.kv_bytes[there], "seed": self.seed}, columns=list(self.columns))

    @property
    def there(self) -> np.ndarray:
        """The blocks that were not dropped already."""
        return np.flatnonzero(~np.isnan(self.alone).all(axis=0))

    def order(self, n: int | None = None, by: str | None = None) -> tuple[int, ...]:
        """The first n blocks that go by a measure, the deciding one by default; None: as many as were ranked."""
        by = self.by if by is None else by
        if by not in self.orders:
            raise ValueError(f"order: got by={by!r}, expected one of {', '.join(dict.fromkeys(self.orders))}.")
        going = self.removed[self.orders.index(by)]
        ranked = tuple(int(block) for block in going[going >= 0])
        if n is not None and not 0 <= n <= len(ranked):
            raise ValueError(
                f"order: got n={n}, but {NAMES[by]} ranked {len(ranked)} blocks. Measure with n_drop={n} or ask for "
                "fewer."
            )
        return ranked[:n]

    def plan(self, n: int | None = None, by: str | None = None) -> Plan:
        """A plan that drops the first n blocks; None: as many as were asked for."""
        n = self.n_drop if n is None else n
        origin = (("criterion", by or self.by), ("n", n))
        return Plan(Shape(*self.shape), dropped=self.order(n, by), origin=origin)  # type: ignore[arg-type]

    def losses(self) -> pd.DataFrame:
        """One row per order and number of dropped blocks: perplexity of the held-out texts with its 95 % interval.

        The interval of random blocks is over texts, of the mean over their orders.
        """
        rows = []
        for name in dict.fromkeys(self.orders):
            mine = [row for row, order in enumerate(self.orders) if order == name]
            for count in range(self.nll.shape[1]):
                values = self.nll[mine, count].mean(axis=0)
                if len(self.held_out_tokens) and not np.isnan(values).any():
                    options: dict[str, Any] = {"weights": self.held_out_tokens, "transform": np.exp}
                    found = bootstrap_interval(values, n_bootstrap=N_BOOTSTRAP, seed=self.seed, **options)
                    rows.append((NAMES[name], count, *map(float, found), len(mine)))
        return pd.DataFrame(rows, columns=["by", "dropped", "perplexity", "low", "high", "orders"])

    # Figures

    def plot(self, view: str = "influence", **options: Any) -> Figure:
        """influence: of each block, with the cut · rounds: macro influence after each removal · loss: perplexity
        against the number of dropped blocks."""
        drawings: dict[str, Callable[[], Figure]] = {
            "influence": self._plot_influence,
            "rounds": self._plot_rounds,
            "loss": self._plot_loss,
        }
        if view not in self.views()["view"]:
            raise ValueError(f"plot: got view {view!r}, expected one of {', '.join(self.views()['view'])}.")
        return drawings[view]()

    def views(self) -> dict[str, list[Any]]:
        rounds = ["rounds"] if len(self.at_end) else []
        return {"view": ["influence", *rounds, *(["loss"] if len(self.held_out_tokens) else [])]}

    def _plot_influence(self) -> Figure:
        table: Any = self.table()
        going = self.order(self.n_drop)
        places = {
            block: f"{block}<br>out {going.index(block) + 1}" if block in going else str(block)
            for block in table["block"]
        }
        parts = []
        for measure in ("block", "macro"):
            names = {f"{measure}_{end}": end for end in ("influence", "low", "high")}
            parts.append(table[["block", *names]].rename(columns=names).assign(by=NAMES[f"{measure}_influence"]))
        drawn: Any = pd.concat(parts).dropna(subset=["influence"])
        drawn = drawn.assign(place=drawn["block"].map(places))
        titles: dict[str, Any] = {"title": self._finding(), "x_title": "block (out: when it goes)"}
        y_title = "1 - cosine, mean over tokens"
        figure = plots.bars(drawn, "place", "influence", "low", "high", "by", y_title=y_title, colors=COLORS, **titles)
        cut = self._cut()
        if cut is not None:
            figure.add_hline(cut, line={"color": plots.BLACK, "width": 1, "dash": "dash"})
            label = {"showarrow": False, "xanchor": "left", "xref": "paper", "align": "left"}
            figure.add_annotation(x=1.01, y=cut, text=f"cut by {NAMES[self.by]}", **label)
        return figure

    def _cut(self) -> float | None:
        """Between the dropped and the kept by the deciding measure; None where later rounds changed their order."""
        table = self.table()
        values, dropped = table[self.by].to_numpy(dtype=float), table["dropped"].to_numpy(dtype=bool)
        if not dropped.any() or dropped.all() or values[dropped].max() >= values[~dropped].min():
            return None
        return float(values[dropped].max() + values[~dropped].min()) / 2

    def _finding(self) -> str:
        going = self.order(self.n_drop)
        if not going:
            return f"No block was asked to go: the influence of {len(self.there)} blocks on the residual stream"
        said = f"block {going[0]}" if len(going) == 1 else f"blocks {', '.join(map(str, going))} in this order"
        title = f"By {NAMES[self.by]} {said} can go first"
        losses = self.losses().set_index(["by", "dropped"])["perplexity"]
        if not len(losses):
            return f"{title}, of {len(self.there)}"
        found = losses.loc[(NAMES[self.by], len(going))]
        title += f": perplexity goes from {losses.loc[(NAMES[self.by], 0)]:.2f} to {found:.2f}"
        if (NAMES[RANDOM], len(going)) in losses.index:
            title += f", without as many random blocks to {losses.loc[(NAMES[RANDOM], len(going))]:.2f}"
        return title

    def _plot_rounds(self) -> Figure:
        means = [self._mean(values, n_bootstrap=1)[0] for values in self.at_end]
        going = self.order(by=MACRO)
        rows = [
            (f"{number + 1}: drops {going[number]}", str(block), means[number][block])
            for number in range(len(means))
            for block in self.there
        ]
        drawn = pd.DataFrame(rows, columns=["round", "block", "influence"])
        first = tuple(np.array(self.there)[np.argsort(means[0][self.there], kind="stable")][: len(going)])
        kept = sum(a == b for a, b in zip(first, going, strict=True))
        title = f"Measured again after each removal, macro influence drops blocks {', '.join(map(str, going))}"
        title += f"; by its first round alone {kept} of these {len(going)} would go at the same turn"
        titles: dict[str, Any] = {"title": title, "x_title": "block", "y_title": "round", "value_title": "1 - cosine"}
        return plots.heatmap(drawn, "block", "round", "influence", **titles).update_traces(texttemplate="%{z:.2g}")

    def _plot_loss(self) -> Figure:
        drawn = self.losses()
        titles: dict[str, Any] = {
            "title": self._finding(),
            "x_title": "dropped blocks",
            "y_title": "perplexity of held-out texts",
        }
        figure = plots.lines(drawn, "dropped", "perplexity", "by", "low", "high", log_y=True, colors=COLORS, **titles)
        return figure.update_xaxes(dtick=1)

    def _mean(self, values: np.ndarray, n_bootstrap: int = N_BOOTSTRAP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return bootstrap_interval(values, weights=self.n_tokens, n_bootstrap=n_bootstrap, seed=self.seed)
