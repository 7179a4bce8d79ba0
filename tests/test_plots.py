"""Figures are functions of tables: right data, titled axes, a wrapped title, no network."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench import plots

TABLE = pd.DataFrame(
    {
        "x": [2, 1, 3, 1, 2, 3],
        "y": [2.0, 1.0, 3.0, 4.0, 5.0, 6.0],
        "low": [1.5, 0.5, 2.5, 3.5, 4.5, 5.5],
        "high": [3.0, 1.5, 3.5, 4.5, 5.5, 6.5],
        "who": ["a", "a", "a", "b", "b", "b"],
    }
)
DRAWN = {
    "lines": lambda: plots.lines(
        TABLE, "x", "y", "who", "low", "high", title="Up", x_title="time (s)", y_title="height (m)"
    ),
    "bars": lambda: plots.bars(
        TABLE, "x", "y", "low", "high", "who", title="Up", x_title="time (s)", y_title="height (m)"
    ),
    "scatter": lambda: plots.scatter(TABLE, x="x", y="y", color="who", text="who", title="Up"),
    "heatmap": lambda: plots.heatmap(TABLE, "x", "who", "y", title="Up", value_title="height (m)"),
    "spectrum": lambda: plots.spectrum(TABLE, "x", "y", "who", marks={"sentence": 1.0}, title="Up"),
    "histogram": lambda: plots.histogram(TABLE, "y", "who", bins=3, level=0.33, title="Up"),
}
drawn = pytest.mark.parametrize("name", DRAWN)


@drawn
def test_every_figure_has_a_title_and_titled_axes(name):
    layout = DRAWN[name]().layout
    assert layout.title.text == "Up"
    assert layout.xaxis.title.text and layout.yaxis.title.text


@drawn
def test_every_figure_is_the_same_html_twice_and_loads_nothing(name):
    html = plots.html_div(DRAWN[name]())
    assert html == plots.html_div(DRAWN[name]().to_plotly_json())
    assert "<script src" not in html and "cdn" not in html.lower()


def test_lines_sort_by_x_and_carry_a_band_per_group():
    figure = DRAWN["lines"]()
    band, line = figure.data[0], figure.data[1]
    assert list(line.x) == [1, 2, 3] and list(line.y) == [1.0, 2.0, 3.0]
    assert list(band.y) == [1.5, 3.0, 3.5, 2.5, 1.5, 0.5] and band.fill == "toself" and band.showlegend is False
    assert len(figure.data) == 4


def test_groups_differ_in_colour_and_in_dash():
    lines = [trace for trace in DRAWN["lines"]().data if trace.fill is None]
    assert lines[0].line.color != lines[1].line.color and lines[0].line.dash != lines[1].line.dash
    chosen = plots.lines(TABLE, "x", "y", "who", colors={"a": plots.BLACK})
    assert chosen.data[0].line.color == plots.BLACK


def test_rows_without_a_group_are_drawn_and_do_not_vanish():
    figure = plots.scatter(TABLE.assign(who=["a", None, "a", "b", "b", None]), "x", "y", "who")
    assert sum(len(trace.x) for trace in figure.data) == len(TABLE) and len(figure.data) == 3


def test_whiskers_are_lengths_from_the_bar_to_the_interval():
    bar = DRAWN["bars"]().data[0]
    np.testing.assert_allclose(bar.error_y.array, [1.0, 0.5, 0.5])
    np.testing.assert_allclose(bar.error_y.arrayminus, [0.5, 0.5, 0.5])


def test_a_heatmap_keeps_the_order_of_the_table_and_its_gaps():
    figure = plots.heatmap(TABLE.drop(index=0), "x", "who", "y")
    assert list(figure.data[0].x) == ["1", "3", "2"] and list(figure.data[0].y) == ["a", "b"]
    np.testing.assert_array_equal(figure.data[0].z, [[1.0, 3.0, np.nan], [4.0, 6.0, 5.0]])


def test_a_histogram_shows_shares():
    counts = plots.histogram(TABLE, "y", bins=5, span=(1.0, 6.0)).data[0].y
    np.testing.assert_allclose(sum(counts[:-1]), 1.0)


def test_logarithmic_axes_are_those_that_were_asked_for():
    for draw in (plots.lines, plots.scatter):
        layout = draw(TABLE, "x", "y", log_x=True).layout
        assert (layout.xaxis.type, layout.yaxis.type) == ("log", None)
    assert plots.bars(TABLE, "x", "y", log_y=True).layout.yaxis.type == "log"


def test_heat_maps_beside_each_other_keep_their_names_their_values_and_their_scales():
    maps = {name: plots.heatmap(TABLE, "x", "who", name, x_title="time (s)") for name in ("y", "low", "high")}
    figure = plots.beside(maps, title="Up")
    assert [note.text for note in figure.layout.annotations] == list(maps) and figure.layout.title.text == "Up"
    for trace, alone in zip(figure.data, maps.values(), strict=True):
        np.testing.assert_array_equal(trace.z, alone.data[0].z)
    bars = [trace.colorbar.x for trace in figure.data]
    assert bars == sorted(set(bars)), "each map has a scale of its own, right of it"
    axes = [figure.layout[name] for name in ("xaxis", "xaxis2", "xaxis3")]
    assert all(axis.type == "category" and axis.title.text == "time (s)" for axis in axes)
    assert figure.layout.yaxis.title.text == "who" and figure.layout.yaxis3.autorange == "reversed"


def test_a_figure_drawn_after_others_is_the_same():
    before = plots.html_div(DRAWN["lines"]())
    plots.beside({"a": DRAWN["heatmap"](), "b": DRAWN["heatmap"]()}).update_layout(
        template={"layout": {"font": {"size": 40}}}
    )
    DRAWN["bars"]().layout.template.layout.font.size = 40
    assert plots.html_div(DRAWN["lines"]()) == before, "figures share no template and no axes"


def test_a_long_title_is_wrapped_and_gets_room():
    title = "A finding that goes on and on, " * 8
    figure = plots.lines(TABLE, "x", "y", title=title)
    rows = figure.layout.title.text.split("<br>")
    assert len(rows) > 2 and max(map(len, rows)) <= plots.TITLE_WIDTH
    assert figure.layout.margin.t > plots.lines(TABLE, "x", "y", title="Short").layout.margin.t


def test_the_palette_has_eight_different_colours():
    assert len(set(plots.PALETTE)) == 8


def test_plotly_comes_as_one_inline_script():
    script = plots.plotly_js()
    assert script.startswith("<script") and len(script) > 1_000_000 and "<script src" not in script
