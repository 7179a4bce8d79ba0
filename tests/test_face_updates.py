"""What a face sends to the page when a slider moves: a little, to widgets that are there already."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from ipywidgets import Widget
from ipywidgets import comm as comms

from workbench import Subject, plots
from workbench.widgets.controls import Choice, Control, Slider
from workbench.widgets.desk import Desk
from workbench.widgets.dice import DiceDesk
from workbench.widgets.face import Face, redraw
from workbench.widgets.picture import Picture
from workbench.widgets.steering import SteeringDesk

N_POINTS = 2_000
MOST_BYTES = 100_000  # that a step of a slider may send


@dataclass
class Sent:
    """The messages that widgets sent to the page, with their size."""

    opened: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    n_bytes: int = 0

    def clear(self) -> None:
        self.opened, self.messages, self.n_bytes = [], [], 0

    def take(self, kind: str, data: Any, buffers: Any) -> None:
        text = json.dumps(data, default=lambda value: f"buffer {type(value).__name__}")
        self.n_bytes += len(text) + sum(memoryview(buffer).nbytes for buffer in buffers or ())
        (self.opened if kind == "comm_open" else self.messages).append(data.get("state", {}))

    @property
    def whole(self) -> int:
        """How often all traces of a figure were sent."""
        return sum(bool(state.get("_widget_data")) for state in self.messages)

    @property
    def commands(self) -> dict[str, list[Any]]:
        """What plotly.js was told, by command."""
        found: dict[str, list[Any]] = {}
        for state in self.messages:
            for name, told in state.items():
                if name.startswith("_py2js_") and told:
                    found.setdefault(name, []).append(told)
        return found


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sent]:
    sent = Sent()
    kind = type(comms.create_comm(target_name="jupyter.widget", data={"state": {}}))

    class Listening(kind):
        def publish_msg(
            self, msg_type: str, data: Any = None, metadata: Any = None, buffers: Any = None, **_: Any
        ) -> None:
            sent.take(msg_type, data, buffers)

    monkeypatch.setattr(comms, "create_comm", Listening)
    yield sent
    Widget.close_all()


@dataclass(frozen=True)
class Curve(Desk):
    """Many points, a slider that moves them, and one that moves only the title."""

    shape: str = "line"
    height: int = 1
    name: int = 0

    notebook = "99_curve_desk"
    question = "How high?"

    def controls(self) -> tuple[Control, ...]:
        return (
            Choice("shape", "shape", options=("line", "bars")),
            Slider("height", "height", True, 0, 9, 1),
            Slider("name", "name", True, 0, 9, 1),
        )

    def picture(self) -> Picture:
        x = np.arange(N_POINTS)
        table = pd.DataFrame({"x": x, "y": np.sin(x / 100.0) * self.height})
        draw = plots.lines if self.shape == "line" else plots.bars
        return Picture(draw(table, "x", "y", title=f"name {self.name}"))


def moved(face: Face, sent: Sent, **settings: Any) -> None:
    sent.clear()
    face.change(**settings)


def test_a_face_opens_one_figure_and_no_other_when_it_changes(sent: Sent) -> None:
    face = Face(Curve(Subject.tiny("llama", verify=False)))
    (opened,) = [state for state in sent.opened if "_widget_data" in state]
    assert len(opened["_widget_data"][0]["y"]["shape"]) == 1 and opened["_widget_layout"]["title"]["text"] == "name 0"
    assert not sent.whole, "a page that is told of a figure before its traces may draw empty axes"
    for settings in ({"height": 2}, {"name": 1}, {"shape": "bars"}, {"shape": "line"}):
        moved(face, sent, **settings)
        assert (len(sent.opened), sent.whole) == (0, 0), settings


def test_where_only_heights_changed_only_they_are_sent(sent: Sent) -> None:
    face = Face(Curve(Subject.tiny("llama", verify=False)))
    moved(face, sent, height=2)
    (told,) = sent.commands["_py2js_update"]
    assert set(told["style_data"]) == {"y"} and told["layout_data"] == {} and set(sent.commands) == {"_py2js_update"}
    assert N_POINTS * 8 < sent.n_bytes < N_POINTS * 8 + 2_000, "heights in float64, and little around them"


def test_where_only_the_title_changed_no_point_is_sent(sent: Sent) -> None:
    face = Face(Curve(Subject.tiny("llama", verify=False)))
    moved(face, sent, name=1)
    (told,) = sent.commands["_py2js_update"]
    assert told["style_data"] == {} and all(key.startswith("title") for key in told["layout_data"])
    assert sent.n_bytes < 2_000


def test_what_is_shown_already_is_not_sent_again(sent: Sent) -> None:
    face = Face(Curve(Subject.tiny("llama", verify=False)))
    moved(face, sent, name=0)
    assert sent.n_bytes < 1_000 and not any(told.get("style_data") for told in sent.commands.get("_py2js_update", []))


@pytest.mark.parametrize("desk_class", [SteeringDesk, DiceDesk])
def test_a_step_of_a_slider_sends_less_than_a_tenth_of_a_megabyte(sent: Sent, desk_class: type[Desk]) -> None:
    face = Face(desk_class(Subject.tiny("llama", verify=False)))
    for control in face.desk.controls():
        if isinstance(control, Slider) and control.shown:
            moved(face, sent, **{control.name: control.some()[0]})
            moved(face, sent, **{control.name: control.some()[-1]})
            assert 0 < sent.n_bytes < MOST_BYTES and not sent.opened and not sent.whole, control.name


def test_a_figure_that_was_redrawn_many_times_has_the_layout_of_a_fresh_one() -> None:
    table = pd.DataFrame({"x": [1, 2, 3], "y": [0.1, 0.5, 0.2]})
    marked = plots.lines(table, "x", "y", title="marked").add_hline(0.3).add_vline(2)
    marked.update_xaxes(tickvals=np.array([1, 3]), range=[0, 4])
    figures = [
        plots.bars(table, "x", "y", title="bars", log_y=True),
        marked,
        plots.heatmap(table.assign(z=[1, 2, 3]), "x", "y", "z", title="a map"),
        plots.scatter(table, "x", "y", title="points", log_x=True),
        plots.lines(table, "x", "y", title="plain"),
    ]
    for first in figures:
        for then in figures:
            shown = go.FigureWidget(first)
            redraw(shown, then)
            found, wanted = (json.loads(str(figure.to_json()))["layout"] for figure in (shown, then))
            assert {name: part for name, part in found.items() if part != []} == wanted | {"autosize": True}


def test_what_a_trace_had_and_the_next_lacks_is_gone() -> None:
    table = pd.DataFrame({"x": [1, 2], "y": [0.1, 0.5], "low": [0.0, 0.4], "high": [0.2, 0.6]})
    with_whiskers = plots.bars(table, "x", "y", "low", "high", title="with whiskers")
    shown = go.FigureWidget(with_whiskers)
    redraw(shown, plots.bars(table, "x", "y", title="without"))
    assert with_whiskers.data[0].error_y.array is not None and shown.data[0].error_y.array is None
