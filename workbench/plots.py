"""Tables to plotly figures: one palette, one layout, seven kinds of figure that every probe shares.

A figure is a function of a tidy table and column names; its title is the finding, its axes carry units.
Source of the palette: Okabe and Ito, 2008 (readable with every common form of colour blindness, and in print).
"""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, YELLOW, GREY = "#CC79A7", "#56B4E9", "#000000", "#F0E442", "#767676"
PALETTE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK, YELLOW)  # yellow last: faint on white
# Groups also differ in dash and marker, so that a figure survives a black-and-white printer.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
TITLE_WIDTH = 74  # characters: with 15 pixels high letters they fit a notebook in a window of 800 pixels
LINE_HEIGHT = 22
CELLS = {"type": "category", "showgrid": False}  # an axis of a grid
DOWNWARDS = CELLS | {"autorange": "reversed"}


def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    color: str | None = None,
    low: str | None = None,
    high: str | None = None,
    *,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    colors: Mapping[str, str] | None = None,
    markers: bool = True,
    log_x: bool = False,
    log_y: bool = False,
) -> go.Figure:
    """One line per value of `color`, with a band from `low` to `high` where those columns are given."""
    figure = go.Figure()
    for i, (name, rows, shade) in enumerate(_groups(table, color, colors)):
        rows = rows.sort_values(x)
        if low is not None and high is not None:
            figure.add_trace(_band(rows, x, low, high, shade, name))
        style = {"color": shade, "width": 2, "dash": DASHES[i % len(DASHES)]}
        mode = "lines+markers" if markers else "lines"
        marker = {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7}
        figure.add_trace(
            go.Scatter(x=rows[x], y=rows[y], mode=mode, name=name, legendgroup=name, line=style, marker=marker)
        )
    return laid_out(
        figure, title, x if x_title is None else x_title, y if y_title is None else y_title, log_x=log_x, log_y=log_y
    )


def bars(
    table: pd.DataFrame,
    x: str,
    y: str,
    low: str | None = None,
    high: str | None = None,
    color: str | None = None,
    *,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    colors: Mapping[str, str] | None = None,
    log_y: bool = False,
) -> go.Figure:
    """Bars side by side per value of `color`, with whiskers from `low` to `high` where those columns are given."""
    figure = go.Figure()
    for name, rows, shade in _groups(table, color, colors):
        figure.add_trace(
            go.Bar(x=rows[x], y=rows[y], name=name, marker_color=shade, error_y=_whiskers(rows, y, low, high))
        )
    figure.update_layout(barmode="group")
    return laid_out(figure, title, x if x_title is None else x_title, y if y_title is None else y_title, log_y=log_y)


def scatter(
    table: pd.DataFrame,
    x: str,
    y: str,
    color: str | None = None,
    low: str | None = None,
    high: str | None = None,
    *,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    text: str | None = None,
    colors: Mapping[str, str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> go.Figure:
    """Points, one colour and marker per value of `color`; `text` is a column shown beside each point."""
    figure = go.Figure()
    for i, (name, rows, shade) in enumerate(_groups(table, color, colors)):
        marker = {"color": shade, "symbol": SYMBOLS[i % len(SYMBOLS)], "size": 9}
        figure.add_trace(
            go.Scatter(
                x=rows[x],
                y=rows[y],
                name=name,
                mode="markers+text" if text else "markers",
                text=rows[text] if text else None,
                textposition="top center",
                marker=marker,
                error_y=_whiskers(rows, y, low, high),
            )
        )
    return laid_out(
        figure, title, x if x_title is None else x_title, y if y_title is None else y_title, log_x=log_x, log_y=log_y
    )


def heatmap(
    table: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    value_title: str | None = None,
    midpoint: float | None = None,
    span: tuple[float, float] | None = None,
    show_values: bool | None = None,
) -> go.Figure:
    """A grid of coloured cells, one row of the table each; the order of both axes is that of the table.

    midpoint     the value that is white in a diverging scale; None: a sequential scale from light to dark
    span         the values at the two ends of the scale; None: those of the table
    show_values  write the numbers into the cells; None: where there are at most 200 cells
    """
    columns, rows = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[y]))
    means: Any = table.groupby([y, x], sort=False, observed=True)[value].mean()
    grid = means.unstack().reindex(index=rows, columns=columns)
    shown = grid.size <= 200 if show_values is None else show_values
    scale = "Cividis_r" if midpoint is None else [[0.0, BLUE], [0.5, "#FFFFFF"], [1.0, VERMILLION]]
    cells = go.Heatmap(
        x=[str(name) for name in columns],
        y=[str(name) for name in rows],
        z=grid.to_numpy(dtype=float),
        zmid=midpoint,
        zmin=span[0] if span else None,
        zmax=span[1] if span else None,
        colorscale=scale,
        colorbar={"title": {"text": value_title or value}},
        texttemplate="%{z:.2f}" if shown else None,
        xgap=1,
        ygap=1,
    )
    figure = laid_out(go.Figure(cells), title, x if x_title is None else x_title, y if y_title is None else y_title)
    return figure.update_layout(_axes(figure, CELLS, DOWNWARDS))


def beside(figures: Mapping[str, go.Figure], *, title: str = "") -> go.Figure:
    """Heat maps of the same grid next to each other, each under its name and with its own scale of colours."""
    from plotly.subplots import make_subplots

    made: Any = make_subplots(1, len(figures), subplot_titles=list(figures), shared_yaxes=True, horizontal_spacing=0.16)
    for column, figure in enumerate(figures.values(), start=1):
        made.add_traces(figure.data, rows=1, cols=column)
        right = made.layout["xaxis" if column == 1 else f"xaxis{column}"].domain[1]
        made.data[-1].update(colorbar={"x": right + 0.005, "xanchor": "left", "thickness": 14})
    first: Any = next(iter(figures.values())).layout
    made = laid_out(made, title, first.xaxis.title.text, "")
    made.update_layout(
        _axes(made, CELLS, DOWNWARDS),
        margin={"t": made.layout.margin.t + LINE_HEIGHT},  # room for the names, the title above them
        title={"yref": "container", "y": 0.95, "yanchor": "top"},
    )
    return made.update_layout(yaxis={"title": {"text": first.yaxis.title.text}})


def spectrum(
    table: pd.DataFrame,
    x: str = "rate_hz",
    y: str = "amplitude",
    color: str | None = "condition",
    *,
    marks: Mapping[str, float] | None = None,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    colors: Mapping[str, str] | None = None,
) -> go.Figure:
    """Amplitude against rate, with named rates marked by vertical lines."""
    titles: dict[str, Any] = {"title": title, "x_title": x_title or "rate (Hz)", "y_title": y_title or "amplitude"}
    figure = lines(table, x, y, color, markers=False, colors=colors, **titles)
    for name, rate_hz in (marks or {}).items():
        figure.add_vline(rate_hz, line={"color": GREY, "width": 1, "dash": "dot"})
        label = {"showarrow": False, "xanchor": "right", "yanchor": "top", "textangle": -90, "font": {"color": GREY}}
        figure.add_annotation(x=rate_hz, y=1.0, yref="paper", text=f"{name}, {rate_hz:g} Hz", **label)
    return figure


def histogram(
    table: pd.DataFrame,
    x: str,
    color: str | None = None,
    *,
    bins: int = 20,
    span: tuple[float, float] | None = None,
    level: float | None = None,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    colors: Mapping[str, str] | None = None,
) -> go.Figure:
    """Share of rows per bin, of those with a value inside `span`; one outline per value of `color`.

    span    the values between which the bins lie; None: the smallest and the largest     level   a line to compare with
    """
    values = table[x].to_numpy(dtype=float)
    finite = values[np.isfinite(values)]
    span = span or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    figure = go.Figure()
    for i, (name, rows, shade) in enumerate(_groups(table, color, colors)):
        counts, edges = np.histogram(rows[x].dropna(), bins=bins, range=span)
        share = counts / max(1, counts.sum())
        style = {"color": shade, "width": 2, "shape": "hv", "dash": DASHES[i % len(DASHES)]}
        figure.add_trace(go.Scatter(x=edges, y=np.append(share, share[-1:]), name=name, mode="lines", line=style))
    if level is not None:
        figure.add_hline(level, line={"color": GREY, "width": 1, "dash": "dot"})
    return laid_out(figure, title, x if x_title is None else x_title, y_title or "share of rows").update_yaxes(
        rangemode="tozero"
    )


def passages(
    rows: Sequence[tuple[str, Sequence[tuple[str, str | None]]]], *, title: str = "", width: int = 84
) -> go.Figure:
    """Texts one below the other: (name, pieces), a piece being (text, colour); coloured pieces are bold as well."""
    figure, top = laid_out(go.Figure(), title, "", ""), LINE_HEIGHT * (2 + len(wrapped(title)))
    lines = [(name if k == 0 else "", line) for name, pieces in rows for k, line in enumerate(_broken(pieces, width))]
    for k, (name, line) in enumerate(lines):
        place = {"yref": "y", "y": -k, "showarrow": False, "yanchor": "top", "xref": "paper", "xanchor": "left"}
        figure.add_annotation(x=0.0, text=f"<b>{html.escape(name)}</b>", font={"color": GREY}, **place)
        figure.add_annotation(x=0.16, text=line, align="left", font={"family": "monospace"}, **place)
    figure.update_xaxes(visible=False, range=[0, 1])
    figure.update_yaxes(visible=False, range=[-len(lines), 0.2])
    return figure.update_layout(margin={"t": top, "l": 20, "b": 10}, height=top + LINE_HEIGHT * (1 + len(lines)))


def laid_out(
    figure: go.Figure, title: str, x_title: str, y_title: str, *, log_x: bool = False, log_y: bool = False
) -> go.Figure:
    """The project's layout: the finding on top in lines of at most 74 characters, axes with titles, white ground.

    The legend stands to the right of the axes, where it can meet neither title nor curves.
    """
    rows = wrapped(title)
    x_axis, y_axis = (
        {"title": {"text": name}} | ({"type": "log"} if is_log else {})
        for name, is_log in ((x_title, log_x), (y_title, log_y))
    )
    return figure.update_layout(  # all at once: every call validates and copies anew
        _axes(figure, x_axis, y_axis),
        template=_template(),
        title={"text": "<br>".join(rows)},
        margin={"t": 34 + LINE_HEIGHT * max(1, len(rows)), "l": 70, "r": 30, "b": 60},
        height=380 + LINE_HEIGHT * len(rows),
    )


@functools.cache
def _template() -> go.layout.Template:
    """What all figures share. Small, as each figure holds a copy of it."""
    axis = {
        **{"showline": True, "linecolor": BLACK, "ticks": "outside", "zeroline": False, "gridcolor": "#E5E5E5"},
        **{"automargin": True, "title": {"standoff": 15}},
    }
    title = {
        **{"x": 0.0, "xref": "container", "xanchor": "left", "font": {"size": 15}},
        "pad": {"l": 36},  # right of the title of the y axis, which may be longer than the axis
    }
    layout = {
        **{"paper_bgcolor": "white", "plot_bgcolor": "white", "hovermode": "closest", "hoverlabel": {"align": "left"}},
        **{"font": {"size": 13, "color": BLACK}, "colorway": list(PALETTE)},
        **{"title": title, "xaxis": axis, "yaxis": axis},
        "legend": {"x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"},
        "autotypenumbers": "strict",  # names that look like numbers stay names
    }
    return go.layout.Template(layout=layout, data={"heatmap": [{"colorbar": {"outlinewidth": 0}}]})


def _axes(figure: go.Figure, x_axis: dict[str, Any], y_axis: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of every axis that a figure has, by its key in the layout."""
    keys = [key for key in figure.layout if re.fullmatch(r"[xy]axis\d*", key)]
    return {key: x_axis if key.startswith("x") else y_axis for key in keys}


def wrapped(title: str) -> list[str]:
    """A title in lines of at most 74 characters; line breaks that are in it stay."""
    return [row for part in title.split("<br>") for row in textwrap.wrap(part, TITLE_WIDTH)]


def html_div(figure: go.Figure | Mapping[str, Any]) -> str:
    """A figure, or its JSON data, as an HTML fragment that needs `plotly_js()` once in the page and no network."""
    from plotly.io import to_html, to_json

    text = to_json(figure if isinstance(figure, go.Figure) else go.Figure(dict(figure)))
    canonical = json.dumps(json.loads(str(text)), sort_keys=True)  # a figure lists its properties in no fixed order
    name = "figure-" + hashlib.sha256(canonical.encode()).hexdigest()[:16]
    config = {"responsive": True, "displaylogo": False}
    data = json.loads(canonical)
    return to_html(data, full_html=False, include_plotlyjs=False, div_id=name, config=config, validate=False)


def plotly_js() -> str:
    """The plotly library as a script element, to be put once into a page that must open offline."""
    from plotly.offline import get_plotlyjs  # 4 MB of text, read only when a report is written

    return f'<script type="text/javascript">{get_plotlyjs()}</script>'


def _groups(
    table: pd.DataFrame, color: str | None, colors: Mapping[str, str] | None
) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """(name, rows, colour) of each group, in the order in which the groups come in the table."""
    if color is None:
        yield "", table, PALETTE[0]
        return
    for i, (name, rows) in enumerate(table.groupby(color, sort=False, observed=True, dropna=False)):
        yield str(name), rows, (colors or {}).get(str(name), PALETTE[i % len(PALETTE)])


def _broken(pieces: Sequence[tuple[str, str | None]], width: int) -> list[str]:
    """The pieces as lines of markup with at most `width` characters each; a longer word stands alone."""
    lines, used = [""], 0
    for text, shade in pieces:
        for word in re.findall(r"\s*\S+|\s+$", text):
            if used and used + len(word) > width:
                lines, used = [*lines, ""], 0
            word = word if used else word.lstrip()
            shown = html.escape(word)
            lines[-1] += shown if shade is None else f'<span style="color:{shade}"><b>{shown}</b></span>'
            used += len(word)
    return lines


def _whiskers(rows: pd.DataFrame, y: str, low: str | None, high: str | None) -> dict[str, Any] | None:
    if low is None or high is None:
        return None
    up, down = rows[high] - rows[y], rows[y] - rows[low]  # plotly wants lengths, both positive
    return {"type": "data", "symmetric": False, "array": up.clip(lower=0), "arrayminus": down.clip(lower=0)}


def _band(rows: pd.DataFrame, x: str, low: str, high: str, shade: str, name: str) -> go.Scatter:
    around = np.concatenate(
        [rows[x].to_numpy(), rows[x].to_numpy()[::-1]]
    )  # there along the top, back along the bottom
    edge = np.concatenate([rows[high].to_numpy(), rows[low].to_numpy()[::-1]])
    red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    fill = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.18)", "line": {"width": 0}}
    quiet = {"showlegend": False, "hoverinfo": "skip", "legendgroup": name, "mode": "lines"}
    return go.Scatter(x=around, y=edge, name=name, **fill, **quiet)
