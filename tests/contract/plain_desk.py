"""A desk whose pictures need no model, with a text that a page must not execute: for tests of exported pages."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from workbench import plots
from workbench.widgets.controls import Choice, Control, Slider, Text
from workbench.widgets.desk import Desk
from workbench.widgets.picture import Fact, Pane, Picture

HOSTILE = "</script><script>alert(1)</script>"


@dataclass(frozen=True)
class Plain(Desk):
    """A desk without a model's work; size 2 can't be shown as lines."""

    kind: str = "bars"
    size: int = 1
    words: str = HOSTILE

    notebook = "99_plain_desk"
    question = "How large?"

    def controls(self) -> tuple[Control, ...]:
        kinds = Choice("kind", "kind", options=("bars", "lines"))
        return kinds, Slider("size", "size", low=0, high=4, step=1), Text("words", "words")

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return "kind", "size"

    def picture(self) -> Picture:
        if (self.kind, self.size) == ("lines", 2):
            raise ValueError("size 2 can't be drawn as lines. Choose another.")
        draw = plots.bars if self.kind == "bars" else plots.lines
        figure = draw(pd.DataFrame({"x": [0, 1], "y": [0, self.size]}), "x", "y", title=f"{self.kind} {self.size}")
        return Picture(
            figure, (Pane("words", ((self.words, ""),)),), facts=(Fact("size", self.size, "units"),), code="f()"
        )
