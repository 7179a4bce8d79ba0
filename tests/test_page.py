"""A desk as one file: the grid that is worked out, what is refused, and that nothing is fetched or executed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plain_desk import HOSTILE, Plain

from workbench import Subject, plots
from workbench.widgets.controls import Control


@pytest.fixture
def desk() -> Plain:
    return Plain(Subject.tiny("llama", verify=False))


def grid_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="grid">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_every_place_of_the_grid_has_its_picture_or_its_words(desk: Plain, tmp_path: Path) -> None:
    grid = grid_of(desk.export_html(tmp_path / "new" / "desk.html"))
    assert [setting["values"] for setting in grid["settings"]] == [["bars", "lines"], ["0", "1", "2", "3", "4"]]
    assert [setting["numbers"] for setting in grid["settings"]] == [False, True] and grid["start"] == [0, 1]
    titles = [picture.get("refused") or picture["figure"]["layout"]["title"]["text"] for picture in grid["pictures"]]
    assert titles[:5] == [f"bars {size}" for size in range(5)]
    assert titles[7] == "size 2 can't be drawn as lines. Choose another."


def test_values_can_be_named_and_the_desks_own_is_among_them(desk: Plain, tmp_path: Path) -> None:
    grid = grid_of(desk.changed(size=3).export_html(tmp_path / "desk.html", size=[4, 0]))
    assert grid["settings"][0]["values"] == ["0", "3", "4"] and grid["start"] == [1]
    grid = grid_of(desk.export_html(tmp_path / "desk.html", words=["some", "words"]))
    assert grid["settings"][0]["values"] == ["some", "words", HOSTILE] and not grid["settings"][0]["numbers"]


def test_a_page_fetches_nothing_and_runs_no_text(desk: Plain, tmp_path: Path) -> None:
    page = desk.export_html(tmp_path / "desk.html").read_text()
    own = page.replace(plots.plotly_js(), "")
    assert HOSTILE not in own and "default-src 'none'" in own
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", own)
    assert own.count("<script") == own.count("</script>") == 2


def test_a_setting_of_the_grid_that_can_not_be_moved_now_is_left_out(desk: Plain, tmp_path: Path) -> None:
    class Hiding(Plain):
        def controls(self) -> tuple[Control, ...]:
            return tuple(replace(control, shown=control.name != "size") for control in super().controls())

    grid = grid_of(Hiding(desk.subject).export_html(tmp_path / "desk.html"))
    assert [setting["label"] for setting in grid["settings"]] == ["kind"] and len(grid["pictures"]) == 2
    with pytest.raises(ValueError, match="got setting 'size', expected one that can be moved: kind, words"):
        Hiding(desk.subject).export_html(tmp_path / "desk.html", "size")


def test_what_can_not_be_laid_out_is_refused_in_words(desk: Plain, tmp_path: Path) -> None:
    for settings, values, words in (
        (("colour",), {}, "got setting 'colour', expected one that can be moved: kind, size, words"),
        (("words",), {}, r"words can be anything. Name values: words=\["),
        ((), {"size": range(9)}, "size: got 5, expected a number from 0 to 4"),
        ((), {"size": ["large"]}, "parameter size: got 'large', expected int"),
        ((), {"words": [str(n) for n in range(600)]}, "601 words are 601 pictures, expected at most 500"),
    ):
        with pytest.raises(ValueError, match=words):
            desk.export_html(tmp_path / "desk.html", *settings, **values)
    with pytest.raises(ValueError, match="is a folder, expected the name of a file"):
        desk.export_html(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is written before all is known"
