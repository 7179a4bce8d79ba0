"""A signature stays with its figure: in the data, in the picture, once, and without touching the rest."""

from __future__ import annotations

import json

import plotly.graph_objects as go
import pytest

from workbench.plots import lines
from workbench.signature import LONGEST, signature_of, signed, unsigned

PLAIN = {"data": [{"type": "scatter", "y": [1, 2]}], "layout": {"title": {"text": "Two rise"}, "margin": {"t": 56}}}


def test_a_signed_figure_tells_its_run_and_is_otherwise_the_same():
    figure = signed(PLAIN, "0123abcd", "workbench run a.ipynb -p n=3")
    assert signature_of(figure) == {"key": "0123abcd", "command": "workbench run a.ipynb -p n=3"}
    (note,) = figure["layout"]["annotations"]
    assert note["text"] == "run 0123abcd · workbench run a.ipynb -p n=3"
    assert signature_of(PLAIN) is None and "annotations" not in PLAIN["layout"], "the figure that was given stays"


@pytest.mark.parametrize(
    "layout", [{}, {"meta": [1, 2]}, {"meta": {"own": 1}}, {"annotations": [{"text": "mine"}]}, PLAIN["layout"]]
)
def test_taking_the_signature_off_gives_the_figure_back(layout):
    figure = {"data": [], "layout": layout}
    assert unsigned(signed(figure, "key", "command")) == figure and unsigned(figure) == figure


def test_signing_twice_keeps_the_first_signature():
    once = signed(PLAIN, "first", "a")
    assert signed(once, "second", "b") == once


def test_plotly_accepts_a_signed_figure_and_keeps_the_signature():
    import pandas as pd

    figure = json.loads(str(lines(pd.DataFrame({"x": [1, 2], "y": [3, 4]}), "x", "y", title="Up").to_json()))
    again = json.loads(str(go.Figure(signed(figure, "key", "command")).to_json()))
    assert signature_of(again) == {"key": "key", "command": "command"}
    assert again["layout"]["annotations"][0]["yshift"] == figure["layout"]["margin"]["t"], "at the picture's upper edge"


def test_a_long_command_is_cut_in_the_picture_only_and_markup_is_text():
    command = "workbench run a.ipynb -p name='<b>" + "x" * 500 + "'"
    figure = signed(PLAIN, "key", command)
    text = figure["layout"]["annotations"][0]["text"]
    assert "<b>" not in text and "&lt;b&gt;" in text and len(text) < LONGEST + 20 and text.endswith("…")
    assert signature_of(figure) == {"key": "key", "command": command}
