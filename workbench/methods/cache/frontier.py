"""Quality against bytes: what many settings of cache toggles lose, as curves with intervals, chance among them.

x = bytes held / bytes of the untoggled cache, scales and indices included; y = recall, perplexity, KL, ... with 95 %
intervals over texts. The best method at a budget is the one that is above the others there, not the one with a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from workbench import plots
from workbench.methods.cache.loss import CacheLossResult
from workbench.result import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CONTROL = "random"
NAMES = {  # measure -> its axis, and whether more is better
    "recall": ("share of texts recalled word for word", True),
    "perplexity": ("perplexity of the continuation", False),
    "nll_added": ("added loss = log perplexity ratio (nats per token)", False),
    "kl": ("KL from untoggled (nats per token)", False),
    "kl_p99": ("KL from untoggled, 99th percentile (nats)", False),
    "top1_agreement": ("share of top tokens that stay", True),
    "head_error": ("error of attention outputs / norm", False),
    "held_again": ("share of the tokens to be said again that are held", True),
}


class Point(NamedTuple):
    """One setting: the curve that it belongs to and what it lost."""

    method: str
    loss: CacheLossResult


@dataclass(frozen=True, eq=False, kw_only=True)
class FrontierResult(Result):
    """What each setting lost. `facts` is the table: every setting's own, with its curve and its share of the bytes."""

    facts: pd.DataFrame
    seed: int = 0

    columns: ClassVar[tuple[str, ...]] = (
        "method", "toggles", "bytes_share", "measure", "group", "value", "low", "high", "base", "unit", "n", "notes",
        "seed",
    )  # fmt: skip

    @classmethod
    def of(cls, points: Sequence[Point], *, seed: int = 0) -> FrontierResult:
        tables = [
            loss.table().assign(method=method, bytes_share=loss.bytes_share, notes=loss.notes, seed=seed)
            for method, loss in points
        ]
        return cls(facts=pd.concat(tables, ignore_index=True).loc[:, list(cls.columns)], seed=seed)

    def table(self) -> pd.DataFrame:
        """One row per setting and measure, and per group for recall."""
        return self.facts.copy()

    def summary(self) -> pd.DataFrame:
        """One row per setting: its share of the bytes and every measure."""
        facts = self.facts.loc[self.facts["group"] == "all", :]
        wide = facts.pivot_table(
            index=["method", "toggles", "bytes_share"], columns="measure", values="value", sort=False
        )
        return wide.reset_index().rename_axis(columns=None)

    def curve(self, method: str, measure: str, group: str = "all") -> pd.DataFrame:
        """The settings of one method by bytes."""
        facts = self._of(measure, group)
        if method not in set(facts["method"]):
            raise ValueError(f"curve: got {method!r}, expected one of {', '.join(dict.fromkeys(facts['method']))}.")
        return facts.loc[facts["method"] == method, :].sort_values(by="bytes_share")

    def best(self, measure: str = "recall", group: str = "all", within: float = 0.3) -> pd.Series:
        """The setting, chance apart, that is best within this share of the bytes; of the smallest if none is within.

        Of equals the one with fewer bytes.
        """
        facts = self._of(measure, group)
        chance = (facts["method"] == CONTROL).to_numpy()
        rivals = facts if chance.all() else facts.loc[~chance, :]
        share = rivals["bytes_share"].to_numpy()
        inside = rivals.loc[share <= max(within, share.min()), :]
        return inside.sort_values(by=["value", "bytes_share"], ascending=[not NAMES[measure][1], True]).iloc[0]

    def plot(self, measure: str = "recall", group: str = "all", within: float = 0.3, **options: Any) -> Figure:
        """One measure of every setting against its bytes; the untoggled value as a dotted line.

        Points at the same bytes are drawn side by side, for their whiskers.
        """
        facts = self._of(measure, group)
        methods = list(dict.fromkeys(facts["method"]))
        order = np.array([methods.index(name) for name in facts["method"]])
        shift = 1.015 ** (order - (len(methods) - 1) / 2)
        drawn = facts.assign(order=order, share=facts["bytes_share"] * shift).sort_values(by=["order", "share"])
        where = "" if group == "all" else f" at {group}"
        figure = plots.scatter(
            drawn, "share", "value", "method", "low", "high", title=self._title(measure, group, within, where),
            x_title="cache bytes / untoggled bytes", y_title=NAMES[measure][0] + where,
            colors={CONTROL: plots.GREY}, log_x=True,
        )  # fmt: skip
        for name, dash in zip(methods, plots.DASHES * len(methods), strict=False):
            figure.update_traces(mode="lines+markers", line={"width": 2, "dash": dash}, selector={"name": name})
        base = float(facts["base"].iloc[0])
        figure.add_hline(base, line={"color": plots.BLACK, "width": 1, "dash": "dot"})
        note = {"showarrow": False, "xanchor": "right", "yanchor": "bottom", "font": {"color": plots.BLACK}}
        figure.add_annotation(x=1, xref="paper", y=base, text="untoggled", **note)
        ticks = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
        return figure.update_xaxes(tickvals=ticks, ticktext=[f"{share:g}" for share in ticks])

    def views(self) -> dict[str, list[Any]]:
        return {"measure": list(NAMES), "group": list(dict.fromkeys(self.facts["group"]))}

    def _title(self, measure: str, group: str, within: float, where: str) -> str:
        best, facts = self.best(measure, group, within), self._of(measure, group)
        title = f"Best {measure}{where} within {max(within, best['bytes_share']):.2g} of the bytes: {best['value']:.3g}"
        title += f" by {best['toggles']} (untoggled {best['base']:.3g})"
        chance = facts.loc[facts["method"] == CONTROL, :]
        if not len(chance):
            return title
        near = chance.iloc[int(np.abs(np.log(chance["bytes_share"].to_numpy() / best["bytes_share"])).argmin())]
        return f"{title}; random eviction at {near['bytes_share']:.2g}: {near['value']:.3g}"

    def _of(self, measure: str, group: str) -> pd.DataFrame:
        if measure not in NAMES:
            raise ValueError(f"plot: got measure {measure!r}, expected one of {', '.join(NAMES)}.")
        facts = self.facts.loc[(self.facts["measure"] == measure) & (self.facts["group"] == group), :]
        if not len(facts):
            told = ", ".join(dict.fromkeys(self.facts.loc[self.facts["measure"] == measure, "group"]))
            raise ValueError(f"plot: got group {group!r} of {measure}, expected one of {told}.")
        return facts
