"""The laws of every desk: its settings are its notebook's parameters, any of them gives a picture or words, and the
subject is as it was."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nbformat
import pytest
from families import subclasses_in, subject_of

import workbench.widgets
from workbench import Result, Subject
from workbench.folder import RUNS_VARIABLE
from workbench.parameters import TAG, declared
from workbench.widgets.desk import Desk
from workbench.widgets.face import Face

ROOT = Path(__file__).parents[2]
DESKS = subclasses_in(workbench.widgets, Desk)
FAMILIES = ("llama", "gpt2", "mixtral")  # the last has no neurons
each_desk = pytest.mark.parametrize("desk_class", DESKS, ids=lambda cls: cls.__name__)


def drawn(desk: Desk) -> str:
    """All that a picture shows, as text."""
    picture = desk.picture()
    return json.dumps(json.loads(str(picture.figure.to_json())), sort_keys=True) + picture.html()


def count_forwards(subject: Subject, undo: ExitStack) -> list[int]:
    """A list that gets an item per forward of the whole model or of one of its blocks."""
    seen: list[int] = []
    blocks = subject.model.get_submodule(subject.anatomy.blocks)
    for module in (subject.model, *blocks.children()):
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        undo.callback(handle.remove)
    return seen


def test_there_are_desks() -> None:
    kinds = ("Steering", "Cache", "Pruning", "Neuron", "Lens", "Dice", "Compose")
    assert {f"{kind}Desk" for kind in kinds} <= {cls.__name__ for cls in DESKS}


@each_desk
def test_the_settings_are_the_parameters_of_its_notebook(desk_class: type[Desk]) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{desk_class.notebook}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])]
    of_notebook = declared(cell.source)
    assert of_notebook.pop("model").default == "organism"
    assert of_notebook == desk_class.parameters(), "a slider, papermill and a sweep must set the same things"


@each_desk
def test_every_setting_has_one_control_and_a_default_that_it_allows(desk_class: type[Desk], organism: Subject) -> None:
    desk = desk_class(organism)
    names = [control.name for control in desk.controls()]
    assert sorted(names) == sorted(desk.settings) and desk.question.endswith("?")
    assert set(desk.grid()) <= set(names) and desk.grid()
    for control in desk.controls():
        control.check(desk.settings[control.name])


@each_desk
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_desk_shows_something_on_any_family_or_says_why_not(desk_class: type[Desk], family: str) -> None:
    try:
        picture = desk_class(subject_of(family)).picture()
    except ValueError as error:
        assert family == "mixtral" and len(str(error)) > 20, error
        return
    assert len(picture.figure.layout.title.text) > 20, "the title is the finding"
    assert picture.figure.data and picture.facts and picture.code


@each_desk
def test_every_value_of_every_control_gives_a_picture_or_words(desk_class: type[Desk], organism: Subject) -> None:
    desk = desk_class(organism)
    shown = 0
    for control in desk.controls():
        for value in control.some() if control.shown else ():
            try:
                shown += bool(desk.changed(**{control.name: value}).picture().figure.data)
            except ValueError as error:
                assert len(str(error)) > 20, f"{control.name}={value!r}: {error}"
    assert shown > 3


@each_desk
def test_equal_settings_show_the_same_to_the_letter(desk_class: type[Desk], organism: Subject) -> None:
    assert drawn(desk_class(organism)) == drawn(desk_class(organism))


@each_desk
def test_what_was_shown_once_is_shown_again_without_a_forward(desk_class: type[Desk], organism: Subject) -> None:
    desk = desk_class(organism)
    first = drawn(desk)
    with ExitStack() as undo:
        seen = count_forwards(organism, undo)
        assert drawn(desk.changed(**desk.settings)) == first and not seen
        fresh = drawn(desk_class(organism))
        assert fresh == first and seen, "a fresh desk has to ask the model"


@each_desk
def test_a_desk_leaves_the_subject_as_it_was(desk_class: type[Desk]) -> None:
    subject = subject_of("llama")
    before = {name: (id(value), value.clone()) for name, value in subject.model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in subject.model.modules()]
    desk_class(subject).picture()
    assert not subject.active
    now = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in subject.model.modules()]
    assert now == hooks
    for name, value in subject.model.named_parameters():
        assert (id(value), bool((value == before[name][1]).all())) == (before[name][0], True)


@each_desk
def test_the_static_twin_holds_no_script_and_the_result_is_kept_whole(
    desk_class: type[Desk], organism: Subject, tmp_path: Path
) -> None:
    desk = desk_class(organism)
    assert "<script" not in desk.picture().html()
    result: Any = Result.load(desk.result().save(tmp_path / "desk"))
    assert result.settings == desk.settings and len(result.finding) > 20
    assert list(result.table().columns) == list(result.columns) and len(result.table())
    assert f"notebooks/{desk.notebook}.ipynb" in desk.command()


@each_desk
def test_keep_this_writes_a_run_that_opens_as_the_same_desk(
    desk_class: type[Desk], organism: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path))
    assert not [name for name in desk_class.parameters() if hasattr(Desk, name)], "a setting would hide a method"
    face = Face(desk_class(organism))
    button, told = face.children[-1].children
    button.click()
    (folder,) = (tmp_path / desk_class.notebook).iterdir()
    assert folder.name in told.value and face.message.value == ""
    assert desk_class.from_run(folder.name, organism) == face.desk


@each_desk
def test_a_face_shows_every_control_and_the_first_picture(desk_class: type[Desk], organism: Subject) -> None:
    face = Face(desk_class(organism))
    assert face.message.value == "" and face.figure.data
    assert set(face._controls) == set(face.desk.settings)
