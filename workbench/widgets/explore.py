"""explore(result): one figure and a control for each view argument of the result's plot.

A result's views are the settings of a small desk: the same face as any desk's draws them. In a batch run nothing
interactive is stored (a FigureWidget is about 5 MB): the static figure says what there is. Source: own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.folder import RUN_VARIABLE
from workbench.result import Result
from workbench.widgets.controls import Choice, Control
from workbench.widgets.picture import Picture


@dataclass(frozen=True)
class Exploration:
    """What is shown of a result: one choice per view argument of its plot. Knows no widget.

    chosen   view argument -> what it is; what is left out is the first of its choices
    """

    result: Result
    chosen: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        offered = {control.name: control for control in self.controls()}
        for name, value in self.chosen.items():
            if name not in offered:
                raise ValueError(
                    f"explore: got view argument {name!r}, expected one of {', '.join(offered) or 'none'}."
                )
            offered[name].check(value)

    def controls(self) -> tuple[Control, ...]:
        views = self.result.views().items()
        return tuple(Choice(name, name.replace("_", " "), options=tuple(options)) for name, options in views if options)

    @property
    def settings(self) -> dict[str, Any]:
        """View argument -> what it is."""
        return {control.name: control.some()[0] for control in self.controls()} | dict(self.chosen)

    def changed(self, **settings: Any) -> Exploration:
        """The same result with other view arguments; ValueError where they are no choices."""
        return replace(self, chosen={**self.settings, **settings})

    def picture(self) -> Picture:
        return Picture(self.result.plot(**self.settings), code=self.call())

    def call(self) -> str:
        """The line of code that draws this figure."""
        return f"result.plot({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


def explore(result: Result) -> Any:
    """A widget that browses `result.plot` by its view arguments; in a batch run, a line that says so."""
    exploration = Exploration(result)
    if os.environ.get(RUN_VARIABLE):
        offered = (f"{item.name}: {', '.join(map(str, item.some()[:6]))}" for item in exploration.controls())
        print(f"Interactive in JupyterLab. It draws {exploration.call()}; {'; '.join(offered) or 'one view'}.")
        return None
    from workbench.widgets.face import Face

    return Face(exploration)
