"""explore(result): the views of a result as a small desk, with the face that every desk has."""

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


class Still(Waves):
    """One view, nothing to choose."""

    def views(self) -> dict[str, list[Any]]:
        return {}


def test_an_exploration_starts_at_the_defaults_and_follows_choices() -> None:
    state = Exploration(Waves())
    assert state.settings == {"view": "line", "layer": 0}
    bars = state.changed(view="bars")
    assert bars.picture().figure.layout.title.text == "bars of layer 0" and state.settings["view"] == "line"
    assert bars.call() == "result.plot(view='bars', layer=0)"
    with pytest.raises(ValueError, match="got 'pie', expected one of 'line', 'bars'"):
        state.changed(view="pie")
    with pytest.raises(ValueError, match="got view argument 'colour'"):
        state.changed(colour="red")


def test_the_face_redraws_in_place_and_answers_an_impossible_choice_in_words() -> None:
    face = explore(Waves())
    figure, menu, slider = face.figure, face._controls["view"], face._controls["layer"]
    menu.value = "bars"
    assert figure.layout.title.text == "bars of layer 0" and figure.data[0].type == "bar" and len(figure.data) == 1
    slider.value = 13
    assert "layer 13 has no bars" in face.message.value and figure.layout.title.text == "bars of layer 0"
    slider.value = 14
    assert face.message.value == "" and figure.layout.title.text == "bars of layer 14"
    assert "layer=14" in face.end.value and face.figure is figure


def test_a_result_of_one_view_has_a_face_without_controls() -> None:
    face = explore(Still())
    assert not face._controls and face.figure.layout.title.text == "line of layer 0"


def test_a_batch_run_stores_no_widget(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "somewhere")
    assert explore(Waves()) is None and explore(Still()) is None
    assert "Interactive in JupyterLab" in capsys.readouterr().out
