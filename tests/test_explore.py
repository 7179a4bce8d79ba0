"""explore(result): the view-model without widgets, and the face over it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from workbench import explore, plots
from workbench.folder import RUN_VARIABLE
from workbench.result import Result
from workbench.widgets.explore import Exploration


class Waves(Result):
    """Two views that depend on one another: one choice can't be drawn."""

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"x": [0, 1, 2], "y": [1.0, 2.0, 3.0]})

    def plot(self, view: str = "line", layer: int = 0) -> Any:
        if view == "bars" and layer == 13:
            raise ValueError("plot: layer 13 has no bars. Choose another.")
        draw = plots.bars if view == "bars" else plots.lines
        return draw(self.table(), "x", "y", title=f"{view} of layer {layer}")

    def views(self) -> dict[str, list[Any]]:
        return {"view": ["line", "bars"], "layer": list(range(30)), "nothing": []}


def test_an_exploration_starts_at_the_defaults_and_follows_choices() -> None:
    state = Exploration(Waves())
    assert state.chosen == {"view": "line", "layer": 0}
    state.choose("view", "bars")
    assert state.figure().layout.title.text == "bars of layer 0"
    assert state.call() == "result.plot(view='bars', layer=0)"
    with pytest.raises(ValueError, match="got view='pie', expected one of"):
        state.choose("view", "pie")
    with pytest.raises(ValueError, match="got view argument 'colour'"):
        state.choose("colour", "red")


def test_the_face_redraws_in_place_and_answers_an_impossible_choice_in_words() -> None:
    face = explore(Waves())
    row, message, figure, code = face.children
    menu, slider = row.children
    menu.value = "bars"
    assert figure.layout.title.text == "bars of layer 0" and figure.data[0].type == "bar" and len(figure.data) == 1
    slider.value = 13
    assert "layer 13 has no bars" in message.value and figure.layout.title.text == "bars of layer 0"
    slider.value = 14
    assert message.value == "" and figure.layout.title.text == "bars of layer 14"
    assert "layer=14" in code.value and face.children[2] is figure


def test_a_batch_run_stores_no_widget(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "somewhere")
    assert explore(Waves()) is None
    assert "Interactive in JupyterLab" in capsys.readouterr().out
