"""explore(result): one figure and a control for each view argument of the result's plot.

The figure is one FigureWidget, redrawn in place; an impossible choice is answered in words, and the last figure stays.
In a batch run nothing interactive is stored (a FigureWidget is about 5 MB): the static figure says what there is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from workbench.folder import RUN_VARIABLE
from workbench.result import Result


@dataclass
class Exploration:
    """What is shown of a result: one choice per view argument. Knows no widget.

    choices   view argument -> what it can be, the default first
    chosen    view argument -> what it is
    """

    result: Result
    choices: dict[str, list[Any]] = field(init=False)
    chosen: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = {name: list(options) for name, options in self.result.views().items() if options}
        self.chosen = {name: options[0] for name, options in self.choices.items()}

    def choose(self, name: str, value: Any) -> None:
        """Set one view argument; ValueError if it is not among the choices."""
        if name not in self.choices:
            raise ValueError(f"explore: got view argument {name!r}, expected one of {', '.join(self.choices)}.")
        if value not in self.choices[name]:
            raise ValueError(f"explore: got {name}={value!r}, expected one of {self.choices[name][:8]}.")
        self.chosen[name] = value

    def figure(self) -> go.Figure:
        return self.result.plot(**self.chosen)

    def call(self) -> str:
        """The line of code that draws this figure."""
        return f"result.plot({', '.join(f'{name}={value!r}' for name, value in self.chosen.items())})"


def explore(result: Result) -> Any:
    """A widget that browses `result.plot` by its view arguments; in a batch run, a line that says so."""
    state = Exploration(result)
    if os.environ.get(RUN_VARIABLE):
        views = "; ".join(f"{name}: {', '.join(map(str, options[:6]))}" for name, options in state.choices.items())
        print(f"Interactive in JupyterLab. It draws {state.call()}; {views or 'one view'}.")
        return None
    return _face(state)


def _face(state: Exploration) -> Any:
    import ipywidgets

    figure = go.FigureWidget(state.figure())
    code = ipywidgets.HTML(_code(state))
    message = ipywidgets.HTML()
    controls = {name: _control(name, options) for name, options in state.choices.items()}

    def redraw(change: Mapping[str, Any], name: str) -> None:
        before = state.chosen[name]
        try:
            state.choose(name, change["new"])
            drawn = state.figure()
        except ValueError as error:  # the user's choice can't be drawn: say so and keep what is there
            state.chosen[name] = before
            message.value = f"<span role='alert' style='color:#b00'>{_escaped(str(error))}</span>"
            return
        message.value, code.value = "", _code(state)
        with figure.batch_update():
            figure.data = ()
            figure.layout = drawn.layout
            figure.add_traces(drawn.data)

    for name, control in controls.items():
        control.observe(lambda change, name=name: redraw(change, name), names="value")
    row = ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    return ipywidgets.VBox([row, message, figure, code])


def _control(name: str, options: list[Any]) -> Any:
    """A menu for few choices; a slider with the arrow keys for many."""
    import ipywidgets

    label = name.replace("_", " ")
    style = {"description_width": "initial"}
    if len(options) > 20:
        return ipywidgets.SelectionSlider(options=options, description=label, style=style, continuous_update=False)
    return ipywidgets.Dropdown(options=options, description=label, style=style)


def _code(state: Exploration) -> str:
    return f"<code style='color:#555'>{_escaped(state.call())}</code>"


def _escaped(text: str) -> str:
    import html

    return html.escape(text)
