"""The face of a desk: one widget per control, one FigureWidget updated in place, words where something is wrong.

A change marks the face busy at once and asks for a new picture; the newest question alone is answered. Source: own.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from plotly.io.json import to_json_plotly

from workbench.widgets.controls import Choice, Control, Number, Slider, Sliders, Switch, Text
from workbench.widgets.manners import Manners
from workbench.widgets.newest import Later, Newest, soon
from workbench.widgets.picture import STYLE, Picture
from workbench.widgets.strip import TokenStrip

MANY = 20  # options: more are a slider rather than a menu
LOOK = """<style>
.workbench-desk { padding: 4px; } .workbench-desk .widget-label { white-space: nowrap; }
.workbench-controls { flex-flow: row wrap; gap: 2px 16px; }
.workbench-busy { min-height: 20px; font-size: 12px; color: var(--jp-ui-font-color2, #555); }
.workbench-message [role=alert] { color: #b00020; background: #fff0f0; border-radius: 4px; padding: 4px 8px; }
</style>"""
HINTS = {"description_width": "initial"}
TRACK_PX, BOX_PX, LETTER_PX = 210, 70, 7  # the width of a slider or a number beside its label; a letter of the label


class Moved(Protocol):
    """What a face needs of what it shows; every Desk has it."""

    def controls(self) -> tuple[Control, ...]: ...
    def picture(self) -> Picture: ...
    def changed(self, **settings: Any) -> Self: ...
    @property
    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Answer:
    """A picture or, where there is none, why; and how long it took."""

    picture: Picture | None
    error: str
    seconds: float


def answer(desk: Moved) -> Answer:
    """The picture of a desk. Whatever goes wrong becomes words: a face must outlive it."""
    started = time.perf_counter()
    try:
        picture, error = desk.picture(), ""
    except ValueError as problem:  # a setting that can't be shown
        picture, error = None, str(problem)
    except KeyboardInterrupt:  # outside of a cell it would end the kernel
        picture, error = None, "Interrupted. The last picture stays."
    except Exception as problem:
        picture, error = None, f"{type(problem).__name__}: {problem}. The last picture stays."
    return Answer(picture, error, time.perf_counter() - started)


class Face(ipywidgets.VBox):
    """A desk as a widget.

    later   calls a function soon: `soon` in a kernel; a server hands in its own
    keeps   whether "Keep this" writes a run; without, it tells the command alone
    """

    def __init__(self, desk: Moved, *, later: Later = soon, keeps: bool = True) -> None:
        self.desk, self.keeps = desk, keeps
        self.figure: Any = go.Figure()  # a FigureWidget from the first picture on
        self._figures = ipywidgets.VBox()
        self.busy = ipywidgets.HTML().add_class("workbench-busy")
        self.message = ipywidgets.HTML().add_class("workbench-message")
        self.words, self.panes, self.end = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self.strip: TokenStrip | None = None
        self._strips = ipywidgets.VBox()
        self._values: dict[str, Any] = {}  # what each control shows
        self._controls = {control.name: self._made(control) for control in desk.controls()}
        self._newest: Newest[Moved, Answer] = Newest(answer, self._show, later)
        row = ipywidgets.HBox(list(self._controls.values())).add_class("workbench-controls")
        head = ipywidgets.HTML(LOOK + STYLE + f"<b>{html.escape(getattr(desk, 'question', ''))}</b>")
        parts = [head, row, self.busy, self.message, self.words, self.panes, self._strips, self._figures, self.end]
        super().__init__([Manners(), *parts, *self._keep_row()])
        self.add_class("workbench-desk")
        self._ask()

    def change(self, **settings: Any) -> None:
        """Set settings, as the controls do; what can't be is told, and the desk stays as it was."""
        try:
            self.desk = self.desk.changed(**settings)
        except ValueError as error:
            self._tell(str(error))
            return
        self._follow()
        self._ask()

    def _ask(self) -> None:
        self.busy.value = "<span role='status'>working …</span>"
        self._newest.ask(self.desk)

    def _show(self, desk: Moved, answer: Answer) -> None:
        self.busy.value = f"<span role='status'>answered in {1000 * answer.seconds:,.0f} ms</span>"
        self._tell(answer.error)
        picture = answer.picture
        if picture is None:
            return
        if self._figures.children:
            redraw(self.figure, picture.figure)
        else:
            self._draw_first(picture.figure)
        self.words.value, self.panes.value, self.end.value = (
            picture.words_html(),
            picture.panes_html(),
            picture.end_html(),
        )
        self._show_strip(picture)

    def _draw_first(self, drawn: go.Figure) -> None:
        """The first picture comes whole: a page that still loads plotly misses what an empty figure is told."""
        layout = drawn.layout.to_plotly_json() | {"autosize": True}  # as wide as there is room
        self.figure = WholeFigure([sendable(trace) for trace in drawn.data], layout)
        self._figures.children = (self.figure,)

    def _show_strip(self, picture: Picture) -> None:
        if picture.strip is None:
            self._strips.children = ()
            return
        if self.strip is None:
            self.strip = TokenStrip(picture.strip)
            self.strip.observe(self._picked, names="selected")
        else:
            self.strip.show(picture.strip)
        self._picks = picture.picks
        self._strips.children = (self.strip,)

    def _picked(self, change: Mapping[str, Any]) -> None:
        if self._picks and change["new"]:
            self.change(**{self._picks: change["new"][1]})

    def _tell(self, error: str) -> None:
        self.message.value = f"<span role='alert'>{html.escape(error)}</span>" if error else ""

    # Controls

    def _made(self, control: Control) -> Any:
        """The widget of a control, which changes the desk when it is moved."""
        value = self.desk.settings[control.name]
        widget = _widget(control, value)
        self._values[control.name] = value
        widget.layout.display = None if control.shown else "none"

        def moved(change: Mapping[str, Any]) -> None:
            new = _plain(change["new"])
            if new != self._values[control.name]:
                self._values[control.name] = new
                self.change(**{control.name: new})

        if isinstance(widget, ManySliders):
            widget.on_change(moved)
        else:
            widget.observe(moved, names="value")
        return widget

    def _follow(self) -> None:
        """Controls tell the settings as they are, and show what can be moved now."""
        for control in self.desk.controls():
            widget, value = self._controls[control.name], self.desk.settings[control.name]
            self._values[control.name] = value
            if isinstance(control, Choice) and tuple(widget.options) != control.options:
                widget.options = control.options
            if isinstance(control, Slider | Number) and (widget.min, widget.max) != (control.low, control.high):
                with widget.hold_trait_notifications():
                    widget.min, widget.max, widget.value = control.low, control.high, value
            if _plain(widget.value) != value:  # else a slider under the reader's hand would be set back
                widget.value = value
            widget.layout.display = None if control.shown else "none"

    def _keep_row(self) -> list[Any]:
        if not hasattr(self.desk, "command"):
            return []
        button = ipywidgets.Button(description="Keep this", tooltip="write these settings as a batch run's parameters")
        told = ipywidgets.HTML().add_class("workbench-kept")

        def keep() -> None:
            desk: Any = self.desk
            try:
                said = str(desk.to_run()) if self.keeps else desk.command()
            except KeyboardInterrupt:  # outside of a cell it would end the kernel
                self._tell("Interrupted before all was kept.")
            except (ValueError, OSError) as error:
                self._tell(str(error))
            else:
                told.value = f"<code class='workbench-code'>{html.escape(said)}</code>"

        # A run keeps a picture, and that is computed where pictures are; a command is words.
        button.on_click(lambda _: self._newest.later(keep) if self.keeps else keep())
        return [ipywidgets.HBox([button, told])]


class WholeFigure(go.FigureWidget):
    """A FigureWidget that is first told of with all that it shows; plotly's own sends it a moment after, and a page
    that still loads what draws it may miss that: its axes then stay empty."""

    def __init__(self, data: list[dict[str, Any]], layout: dict[str, Any]) -> None:
        self._is_whole = False
        super().__init__(data, layout)
        self._config = {"responsive": True}  # or it keeps its first width, and a narrower window cuts it
        self._is_whole = True
        self.open()

    def open(self) -> None:
        if self._is_whole:  # called within the constructor of all widgets, too
            super().open()


class ManySliders(ipywidgets.HBox):
    """One upright slider per number of a setting; `value` is the setting as it is spelt."""

    def __init__(self, control: Sliders, value: str) -> None:
        self.control = control
        size = {"height": "150px", "width": "46px", "overflow": "visible"}
        options = {"min": control.low, "max": control.high, "step": control.step, "orientation": "vertical"}
        self.sliders = [
            ipywidgets.FloatSlider(number, description=name, continuous_update=False, layout=size, **options)
            for name, number in zip(control.names, control.numbers(value), strict=True)
        ]
        super().__init__([ipywidgets.Label(control.label), *self.sliders])

    @property
    def value(self) -> str:
        return self.control.spelt([slider.value for slider in self.sliders])

    @value.setter
    def value(self, spelt: str) -> None:
        for slider, number in zip(self.sliders, self.control.numbers(spelt), strict=True):
            slider.value = number

    def on_change(self, moved: Any) -> None:
        for slider in self.sliders:
            slider.observe(lambda _: moved({"new": self.value}), names="value")


def sendable(trace: Any) -> dict[str, Any]:
    """A trace with None for what JSON can't say: NaN and infinity. Plotly sends rows of numbers as bytes, which can
    say them; all else, such as the cells of a heat map, as lists."""
    return _said(trace.to_plotly_json())


def _said(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _said(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_said(inner) for inner in value]
    if isinstance(value, np.ndarray):
        as_bytes = value.ndim == 1 and value.dtype.kind in "iuf"
        return value if as_bytes or value.dtype.kind in "iub" else _said(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def redraw(figure: Any, drawn: Any) -> None:
    """Let a FigureWidget show what the figure `drawn` shows; traces of the same kinds are updated, others replaced.

    What did not change is not sent: a layout whole is 8 kB, and the page lays everything out again for it.
    """
    before, after = _parts(figure), _parts(drawn) | {"autosize": True}  # as wide as there is room
    layout = {name: after.get(name) for name in {*before, *after} if not _alike(before.get(name), after.get(name))}
    if [trace.type for trace in figure.data] != [trace.type for trace in drawn.data]:
        figure.data = ()  # then the axes, then the new traces: cells on the axes of lines have no place
        figure.update_layout(layout, overwrite=True)
        figure.add_traces([sendable(trace) for trace in drawn.data])
        return
    with figure.batch_update():
        for old, new in zip(figure.data, drawn.data, strict=True):
            given = sendable(new)
            gone = {name: None for name in old.to_plotly_json() if name not in given and name != "uid"}
            old.update(gone | given, overwrite=True)
        figure.update_layout(layout, overwrite=True)


def _parts(figure: Any) -> dict[str, Any]:
    """The layout by name."""
    return figure.layout.to_plotly_json()


def _alike(before: Any, after: Any) -> bool:
    """Whether a page would show the same: lists, tuples and arrays of the same numbers are."""
    return to_json_plotly(before) == to_json_plotly(after)


def _plain(value: Any) -> Any:
    """A slider's number without the noise of its steps: 0.3, where they add up to 0.30000000000000004."""
    return round(value, 9) if isinstance(value, float) else value


def _widget(control: Control, value: Any) -> Any:
    named = {"description": control.label, "style": HINTS}
    track = {"width": f"{TRACK_PX + LETTER_PX * len(control.label)}px"}
    if isinstance(control, Slider):
        kind = ipywidgets.IntSlider if control.whole else ipywidgets.FloatSlider
        ends = {"min": control.low, "max": control.high, "step": control.step}
        shown = {} if control.whole else {"readout_format": ".3g"}
        return kind(value=value, layout=track, **ends, **shown, **named)
    if isinstance(control, Number):
        box = {"width": f"{BOX_PX + LETTER_PX * len(control.label)}px"}
        return ipywidgets.BoundedIntText(value=value, min=control.low, max=control.high, layout=box, **named)
    if isinstance(control, Choice):
        if len(control.options) > MANY:
            return ipywidgets.SelectionSlider(options=control.options, value=value, layout=track, **named)
        return ipywidgets.Dropdown(options=control.options, value=value, **named)
    if isinstance(control, Switch):
        return ipywidgets.Checkbox(value=value, indent=False, **named)
    if isinstance(control, Sliders):
        return ManySliders(control, value)
    assert isinstance(control, Text)
    wide = {"width": "100%", "max_width": "900px"}
    kind = ipywidgets.Textarea if control.lines > 1 else ipywidgets.Text
    rows = {"rows": control.lines} if control.lines > 1 else {}
    return kind(value=value, continuous_update=False, layout=wide, **rows, **named)
