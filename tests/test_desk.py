"""What all desks are made of: controls, latest wins, pictures, the desk as a value, and its face."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from workbench import Subject, plots
from workbench.folder import RUN_VARIABLE, RUNS_VARIABLE
from workbench.memo import Memo
from workbench.widgets.controls import Choice, Control, Number, Slider, Sliders, Switch, Text
from workbench.widgets.desk import Desk
from workbench.widgets.face import Face, redraw, sendable
from workbench.widgets.newest import Newest
from workbench.widgets.picture import Fact, Pane, Picture
from workbench.widgets.strip import Strip, StripRow


@dataclass(frozen=True)
class Toy(Desk):
    """A desk whose picture needs no model; size 13 can't be shown, 14 is a defect, 15 is interrupted."""

    kind: str = "bars"
    size: int = -1
    on: bool = True
    shares: str = "1, 0.5"
    words: str = "one two"

    notebook = "99_toy_desk"
    question = "How large?"

    def fitted(self) -> dict[str, Any]:
        return {"size": 3 if self.size == -1 else self.size}

    def controls(self) -> tuple[Control, ...]:
        return (
            Choice("kind", "kind", options=("bars", "lines")),
            Slider("size", "size", low=0, high=20, step=1),
            Switch("on", "on", self.kind == "bars"),
            Sliders("shares", "shares", names=("a", "b")),
            Text("words", "words", lines=2),
        )

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("kind", "size")

    def picture(self) -> Picture:
        if self.size == 13:
            raise ValueError("size: got 13, which can't be shown. Choose another.")
        if self.size == 14:
            raise KeyError("a defect")
        if self.size == 15:
            raise KeyboardInterrupt
        table = self.once(("table", self.size), lambda: pd.DataFrame({"x": [0, 1], "y": [0.0, float(self.size)]}))
        draw = plots.bars if self.kind == "bars" else plots.lines
        row = StripRow(tuple(self.words.split()), (0.5,) * len(self.words.split()))
        panes = (Pane("<a>", (("given", "<b>came</b>"),)),)
        facts = (Fact("size", self.size, "units", 0.0, 20.0), Fact("half", 0.5, "share"))
        return Picture(
            draw(table, "x", "y", title=f"size {self.size}"), panes, Strip((row,)), "size", facts, "well", "f()"
        )


@pytest.fixture
def toy() -> Toy:
    return Toy(Subject.tiny("llama", verify=False))


def test_a_memo_computes_once_and_forgets_what_was_not_asked_for_longest() -> None:
    memo = Memo(2)
    assert [memo((name,), lambda name=name: name * 2) for name in "abab"] == ["aa", "bb", "aa", "bb"]
    assert memo.computed == {"a": 1, "b": 1}
    memo(("a",), str)
    memo(("c",), lambda: "cc")  # b was asked for before a
    assert memo(("a",), lambda: "new") == "aa" and memo(("b",), lambda: "new") == "new" and len(memo) == 2
    with pytest.raises(ValueError, match="got limit=0"):
        Memo(0)


def test_a_control_refuses_in_words_and_offers_values_over_its_range() -> None:
    layer, share = (
        Slider("layer", "layer", low=0, high=5, step=1),
        Slider("share", "share", low=0.0, high=1.0, step=0.1),
    )
    assert layer.some() == (0, 1, 2, 4, 5) and layer.whole and not share.whole
    assert share.some()[0] == 0.0 and share.some()[-1] == pytest.approx(1.0)  # a sum of tenths
    assert Slider("one", "one", low=2, high=2, step=1).some() == (2,)
    assert Slider("keep", "keep", low=0.1, high=1.0, step=0.05).some() == (0.1, 0.3, 0.55, 0.8, 1.0), (
        "as one writes them"
    )
    assert Number("words", "words", low=1, high=64).some() == (1, 4, 9, 23, 64)
    assert Number("one", "one", low=2, high=2).some() == (2,) and Number("seed", "seed").some()[-1] == 999
    for control, value, words in (
        (layer, 6, "got 6, expected a number from 0 to 5"),
        (share, float("nan"), "got nan"),
        (share, "half", "got 'half', expected a number from 0.0 to 1.0"),
        (layer, True, "got True, expected a number from 0 to 5"),
        (Number("words", "words", low=1, high=64), 65, "got 65, expected a whole number from 1 to 64"),
        (Number("words", "words", low=1, high=64), 2.5, "got 2.5, expected a whole number"),
        (Number("words", "words", low=0, high=64), True, "got True, expected a whole number"),
        (Choice("kind", "kind", options=("a", "b")), "c", "expected one of 'a', 'b'"),
        (Switch("on", "on"), 1, "expected True or False"),
        (Text("words", "words"), "  ", "expected some words"),
        (Sliders("shares", "shares", names=("a", "b")), "1", "expected 2 numbers from 0.0 to 1.0"),
        (Sliders("shares", "shares", names=("a", "b")), "1, two", "numbers with commas between"),
    ):
        with pytest.raises(ValueError, match=words):
            control.check(value)
    Text("words", "words", optional=True).check("")


def test_a_desk_is_a_value_whose_settings_are_parameters(toy: Toy) -> None:
    assert toy.settings == {"kind": "bars", "size": 3, "on": True, "shares": "1, 0.5", "words": "one two"}
    assert {name: (it.kind, it.default) for name, it in Toy.parameters().items()}["size"] == ("int", -1)
    other = toy.changed(size=5)
    assert (toy.size, other.size) == (3, 5) and other.changed(size=3) == toy and other.memo is toy.memo
    with pytest.raises(ValueError, match="got setting 'sise', expected one of kind, size"):
        toy.changed(sise=1)
    with pytest.raises(ValueError, match="size: got 21, expected a number from 0 to 20"):
        toy.changed(size=21)
    with pytest.raises(ValueError, match=r"parameter size: got 1.5, expected int"):
        Toy(toy.subject, size=1.5)  # type: ignore[arg-type]


def test_what_did_not_change_is_not_computed_again(toy: Toy) -> None:
    toy.picture(), toy.changed(kind="lines").picture(), toy.changed(size=4).picture(), toy.picture()
    assert toy.memo.computed == {"table": 2}


def test_what_is_computed_under_a_toggle_is_kept_apart(toy: Toy) -> None:
    from workbench import Clamp, Site

    plain = toy.once(("active",), lambda: toy.subject.active)
    with pytest.warns(UserWarning, match="never fired"), toy.subject.under(Clamp({Site(0, "neurons"): [1]})):
        assert toy.once(("active",), lambda: toy.subject.active) != plain


def test_a_picture_tells_its_facts_and_escapes_what_it_was_given(toy: Toy) -> None:
    picture = toy.picture()
    page = picture.html()
    assert "<b>&lt;b&gt;came&lt;/b&gt;</b>" in page and "<h4>&lt;a&gt;</h4>" in page and "<script" not in page
    assert "3 units [0, 20]" in page and "50%" in page and picture.value("half") == 0.5
    with pytest.raises(ValueError, match="got 'third', expected one of size, half"):
        picture.value("third")


def test_kept_settings_open_again_as_the_same_desk(toy: Toy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    changed = toy.changed(size=7, words="it's three 'words'")
    run = changed.to_run()
    assert (
        "workbench run notebooks/99_toy_desk.ipynb -p model=tiny:llama:0" in run.command
        and "size=7" in run.command
        and "kind" not in changed.command()
    )
    assert Toy.from_run(run.key, toy.subject) == changed
    assert Toy.from_run(run.key).subject.fingerprint == toy.subject.fingerprint
    kept = run.results()["desk"]
    assert kept.table()["value"].tolist() == [7.0, 0.5] and kept.finding == "size 7"
    assert kept.provenance is not None and kept.provenance.probe["settings"]["size"] == 7
    with pytest.raises(ValueError, match="'nothing' names 0 runs"):
        Toy.from_run("nothing")


class Queue:
    """What would be done later, done when told."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, work: Callable[[], None]) -> None:
        self.waiting.append(work)

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


def test_of_many_questions_the_newest_alone_is_answered() -> None:
    queue, worked, shown = Queue(), [], []
    newest = Newest(lambda q: (worked.append(q), 10 * q)[1], lambda q, a: shown.append((q, a)), queue)
    for question in range(5):
        newest.ask(question)
    queue.run()
    assert worked == [4] and shown == [(4, 40)]
    newest.ask(5)
    queue.run()
    assert shown[-1] == (5, 50)


def test_a_stale_answer_never_follows_a_newer_one() -> None:
    queue, shown = Queue(), []

    def answer(question: int) -> int:
        if question == 0:
            newest.ask(1)  # somebody moves the slider while 0 is being worked on
        return question

    newest: Newest[int, int] = Newest(answer, lambda q, a: shown.append(a), queue)
    newest.ask(0)
    queue.run()
    assert shown == [1]


def test_a_face_is_busy_at_once_and_shows_the_newest_picture(toy: Toy) -> None:
    queue = Queue()
    face = Face(toy, later=queue)
    assert "working" in face.busy.value and not face.figure.data
    queue.run()
    assert "answered in" in face.busy.value and face.figure.layout.title.text == "size 3"
    slider = face._controls["size"]
    slider.value = 4
    slider.value = 5
    assert "working" in face.busy.value and face.figure.layout.title.text == "size 3"
    queue.run()
    assert face.figure.layout.title.text == "size 5" and face.desk.settings["size"] == 5
    assert toy.memo.computed["table"] == 2, "size 4 was never worked on"


def test_a_face_keeps_one_figure_and_updates_it_in_place(toy: Toy) -> None:
    face = Face(toy)
    figure, trace = face.figure, face.figure.data[0]
    face.change(size=6)
    assert face.figure is figure and figure.data[0] is trace and list(trace.y) == [0.0, 6.0]
    face.change(kind="lines")
    assert face.figure is figure and figure.data[0].type == "scatter" and len(figure.data) == 1
    assert face._controls["on"].layout.display == "none", "the switch matters to bars alone"


def test_a_redrawn_figure_equals_a_fresh_one(toy: Toy) -> None:
    widget, drawn = go.FigureWidget(), toy.changed(size=9).picture().figure
    for desk in (toy, toy.changed(kind="lines"), toy.changed(size=9)):
        redraw(widget, desk.picture().figure)
    shown, wanted = (json.loads(str(figure.data[0].to_json())) for figure in (widget, drawn))
    assert shown | {"uid": ""} == wanted | {"uid": ""}
    assert widget.layout.title == drawn.layout.title


def test_what_goes_wrong_is_told_in_the_desk_and_the_last_picture_stays(toy: Toy) -> None:
    face = Face(toy)
    face._controls["size"].value = 13
    assert "which can&#x27;t be shown" in face.message.value and face.figure.layout.title.text == "size 3"
    face._controls["size"].value = 14
    assert "KeyError" in face.message.value and face.figure.layout.title.text == "size 3"
    face.change(size=99)
    assert "expected a number from 0 to 20" in face.message.value and face.desk.settings["size"] == 14
    face._controls["size"].value = 15
    assert "Interrupted" in face.message.value, "a kernel ends where it is interrupted outside of a cell"
    face._controls["size"].value = 8
    assert face.message.value == "" and face.figure.layout.title.text == "size 8"


def test_a_token_that_is_selected_sets_what_the_strip_picks(toy: Toy) -> None:
    face = Face(toy)
    assert face.strip is not None
    face.strip.selected = [0, 1]
    assert face.desk.settings["size"] == 1 and face._controls["size"].value == 1


def test_sliders_spell_their_numbers(toy: Toy) -> None:
    face = Face(toy)
    many = face._controls["shares"]
    many.sliders[1].value = 0.3
    assert face.desk.settings["shares"] == "1, 0.3"
    face.change(shares="0, 1")
    assert [slider.value for slider in many.sliders] == [0.0, 1.0]


def test_keep_this_tells_the_command_and_in_a_room_writes_nothing(
    toy: Toy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    for keeps, written in ((False, 0), (True, 1)):
        face = Face(toy, keeps=keeps)
        button, told = face.children[-1].children
        button.click()
        assert "workbench run notebooks/99_toy_desk.ipynb" in told.value
        assert len(list(tmp_path.glob("*/*/params.json"))) == written


def test_keep_this_computes_where_pictures_are_computed(
    toy: Toy, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    queue = Queue()
    face = Face(toy, later=queue)
    queue.run()
    button, told = face.children[-1].children
    button.click()
    assert told.value == "" and not list(tmp_path.iterdir()), "a message may come beside a cell that runs"
    queue.run()
    assert "workbench run notebooks/99_toy_desk.ipynb" in told.value
    face.change(size=15)
    button.click()
    queue.run()
    assert "Interrupted before all was kept" in face.message.value, (
        "a kernel ends where it is interrupted outside of a cell"
    )


def test_a_batch_run_shows_the_static_twin(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setenv(RUN_VARIABLE, "somewhere")
    monkeypatch.setattr("IPython.display.display", shown.append)
    toy._ipython_display_()
    figure, page = shown
    assert isinstance(figure, go.Figure) and not isinstance(figure, go.FigureWidget)
    assert "50%" in page.data and "<script" not in page.data
    monkeypatch.delenv(RUN_VARIABLE)
    toy._ipython_display_()
    assert isinstance(shown[-1], Face)


def test_what_json_can_not_say_is_sent_as_nothing() -> None:
    trace = go.Scatter(x=[0.0, float("nan")], y=np.array([1.0, np.inf]), customdata=[[float("inf")]])
    sent = sendable(trace)
    assert sent["x"] == [0.0, None] and sent["customdata"] == [[None]]
    assert isinstance(sent["y"], np.ndarray), "rows go as bytes, which hold every number"
    cells = sendable(go.Heatmap(z=np.array([[1.0, np.nan], [2.0, 3.0]])))
    assert cells["z"] == [[1.0, None], [2.0, 3.0]], "cells go as lists"


@dataclass(frozen=True)
class Fine(Toy):
    """A desk whose slider moves by tenths."""

    share: float = 0.1

    notebook = "99_fine_desk"

    def controls(self) -> tuple[Control, ...]:
        return (*super().controls(), Slider("share", "share", low=0.0, high=1.0, step=0.1))


def test_a_slider_under_the_readers_hand_is_not_set_back() -> None:
    face = Face(Fine(Subject.tiny("llama", verify=False)))
    slider, sent = face._controls["share"], []
    slider.observe(lambda change: sent.append(change["new"]), names="value")
    slider.value = 0.1 + 0.2  # as steps of tenths add up in a browser
    assert face.desk.settings["share"] == 0.3 and sent == [0.1 + 0.2], "the page hears nothing back"
