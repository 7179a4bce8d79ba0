"""The three figures of a study: the matrix of damages, the frontier against cost, mechanisms against the yardstick.

Each is a function of the table that `CrossResult.summary` gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench import plots
from workbench.studies.costs import COST_NAMES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

YARD = ": perplexity"  # ends the name of a dashed curve
CELL, AROUND = 38, 260  # pixels of a row; of what stands above and below


def matrix(table: Any, title: str, measures: list[str]) -> Figure:
    """Damage of every measure under every kind, at one share of each: kinds, then controls, noise and floor.

    Kinds are rows: there are more of them than measures, and a notebook is longer than it is wide.
    """
    kinds = [*dict.fromkeys(table["kind"])]
    group = np.where(table["family"] == "", 2, table["control"].astype(int))
    place = group * len(kinds) + table["kind"].map(kinds.index)
    order = table["measure"].map(measures.index)
    table = table.assign(order=order, place=place).sort_values(["place", "order"])
    titles: dict[str, Any] = {"x_title": "", "y_title": "", "value_title": "damage"}
    figure = plots.heatmap(table, "measure", "kind", "damage", title=title, span=(0.0, 1.0), **titles)
    texts = {(row["measure"], row["kind"]): _cell(row) for row in table.to_dict("records")}
    cells: Any = figure.data[0]
    shown = [[texts.get((measure, kind), "") for measure in cells.x] for kind in cells.y]
    cells.update(text=shown, texttemplate="%{text}", textfont={"size": 11})
    figure.update_xaxes(tickangle=-35)
    return figure.update_layout(height=AROUND + CELL * len(kinds))


def frontier(table: Any, measure: str, family: str, model: str) -> Figure:
    """What is kept of a measure against the cost reached, a curve per kind; dashed in its colour, perplexity."""
    here = table[table["family"] == family]
    own, yard = here[here["measure"] == measure], here[here["measure"] == "perplexity"]
    shades = [shade for shade in plots.PALETTE if shade != plots.YELLOW]
    names = [*dict.fromkeys(own["kind"])]
    color = {name: shades[k % len(shades)] for k, name in enumerate(names)}
    chance = set(own.loc[own["control"], "kind"])
    color |= dict.fromkeys(chance, plots.GREY)
    yard = yard[yard["kind"].isin(names)].assign(low=np.nan, high=np.nan)
    curves = [own.assign(curve=own["kind"], low=1 - own["high"], high=1 - own["low"])]
    curves.append(yard.assign(curve=yard["kind"] + YARD))
    drawn = pd.concat(curves, ignore_index=True).sort_values(["kind", "reached"], kind="stable")
    titles: dict[str, Any] = {"x_title": COST_NAMES[family], "y_title": f"{measure} kept (dashed: perplexity kept)"}
    colors = {curve: color[curve.removesuffix(YARD)] for curve in dict.fromkeys(drawn["curve"])}
    title = _frontier_title(own, measure, model)
    figure = plots.scatter(drawn, "reached", "kept", "curve", "low", "high", title=title, colors=colors, **titles)
    traces: Any = figure.data
    for trace in traces:
        dashed = str(trace.name).endswith(YARD)
        trace.update(mode="lines+markers", line={"dash": "dash" if dashed else "solid", "width": 1.5 if dashed else 3})
        trace.update(opacity=0.6 if dashed else 1.0)
    marks = {"as before": 1.0, "gone": 0.0}
    noise = own["noise"].mean()
    marks |= {"other data": 1 - float(noise)} if noise > 0.05 else {}  # nearer than that the two lines are one
    for text, y in marks.items():
        figure.add_hline(y, line={"color": plots.GREY, "width": 1, "dash": "dot"})
        place = {"x": 1, "xref": "paper", "xanchor": "right", "yanchor": "bottom", "font": {"color": plots.GREY}}
        figure.add_annotation(y=y, text=text, showarrow=False, **place)
    return figure.update_layout(height=480).update_yaxes(range=_span(drawn))


def yardstick(table: Any, measure: str, model: str) -> Figure:
    """What is kept of a measure against what is kept of perplexity, a point per kind and share; equal on the line."""
    told = table[(table["family"] != "") & (table["measure"] == measure) & table["perplexity"].notna()]
    told = told.assign(low=1 - told["high"], high=1 - told["low"])
    said = f"{len(told)} settings"
    if len(told) > 2 and told["kept"].nunique() > 1 and told["perplexity"].nunique() > 1:
        said = f"rank correlation {told['kept'].corr(told['perplexity'], method='spearman'):.2f} over {said}"
    title = f"{model}: what is kept of {measure} against what is kept of perplexity: {said}"
    titles: dict[str, Any] = {"x_title": "perplexity kept (before / after)", "y_title": f"{measure} kept"}
    colors = dict.fromkeys(told.loc[told["control"], "kind"], plots.GREY)
    figure = plots.scatter(told, "perplexity", "kept", "kind", "low", "high", title=title, colors=colors, **titles)
    line = {"color": plots.GREY, "width": 1, "dash": "dash"}
    return figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line=line).update_yaxes(range=_span(told))


def _frontier_title(own: Any, measure: str, model: str) -> str:
    """Where the measure and perplexity are furthest apart, the control aside."""
    real = own[~own["control"] & own["perplexity"].notna()]
    if not len(real):
        return f"{model}: what is kept of {measure}, against cost"
    row = real.loc[(real["perplexity"] - real["kept"]).abs().idxmax()]
    what = f"{row['kind']}, at a cost of {row['reached']:.2f}"
    return f"{model}: {what}, keep {row['perplexity']:.0%} of perplexity and {row['kept']:.0%} of {measure}"


def _span(drawn: Any) -> list[float]:
    """All means with some room; the whiskers of few seeds may leave the frame."""
    return [min(0.0, float(drawn["kept"].min())) - 0.25, max(1.0, float(drawn["kept"].max())) + 0.25]


def _cell(row: Any) -> str:
    half = row["high"] - row["damage"]
    text = f"{row['damage']:.2f}" + (f"<br>±{half:.2f}" if np.isfinite(half) else "")
    return f"<b>{text}</b>" if row["beyond"] else text
