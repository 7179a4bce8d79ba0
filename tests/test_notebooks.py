"""Every notebook keeps the common form, and runs offline: on the organism, on a tiny random GPT-2, on a real model.

The form: title as a question, imports, parameters, set-up, idea, predict, measure, check, play, keep, limits, next.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest

from workbench import Subject
from workbench.files import write_json
from workbench.parameters import TAG, declared
from workbench.run import Run, execute
from workbench.studies.compressions import kinds
from workbench.studies.cross import CrossStudy
from workbench.studies.mechanisms import Fluency

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
SECTIONS = ("idea", "predict", "measure", "check", "play", "keep", "limits", "next")  # words of headings, in order
NEEDED = {"check", "limits", "next"}
LONGEST_CELL = 12  # lines
REAL = os.environ.get("WORKBENCH_REAL")
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)


def code_cells(notebook: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def tree(cell: nbformat.NotebookNode) -> ast.Module:
    """The cell's Python, without its magics."""
    return ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in cell.source.splitlines()))


def test_the_notebooks_are_numbered():
    assert {"00_start_here", "10_hftp"} <= set(NAMES)
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", name) for name in NAMES), "two digits give the reading order"


@each_notebook
def test_a_notebook_is_valid_has_ids_and_no_outputs(notebook):
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    assert (content.nbformat, content.nbformat_minor) >= (4, 5), "cells of older formats have no ids"
    ids = [cell.get("id") for cell in content.cells]
    assert all(ids) and len(set(ids)) == len(ids)
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None, "clear the outputs before a commit"
    assert "widgets" not in content.metadata and "papermill" not in content.metadata


@each_notebook
def test_a_notebook_opens_with_a_question(notebook):
    first = nbformat.read(notebook, as_version=4).cells[0]
    title, *rest = first.source.strip().splitlines()
    assert first.cell_type == "markdown" and re.fullmatch(r"# .+\?", title), f"{title!r} is no question"
    assert rest, "below the title: what you will see, what it costs, the paper"


@each_notebook
def test_imports_parameters_and_set_up_come_first_and_in_this_order(notebook):
    imports, parameters, set_up = code_cells(notebook)[:3]
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in tree(imports).body)
    assert TAG in parameters.metadata.get("tags", []) and "Run.start(" in set_up.source
    tagged = [cell for cell in code_cells(notebook) if TAG in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    later = [node for cell in code_cells(notebook)[1:] for node in tree(cell).body]
    assert not [node for node in later if isinstance(node, ast.Import | ast.ImportFrom)], "imports stand together"


@each_notebook
def test_parameters_are_typed_and_commented_and_default_to_the_organism(notebook):
    cell = code_cells(notebook)[1]
    assert declared(cell.source)["model"].default == "organism"
    for node, line in zip(tree(cell).body, cell.source.strip().splitlines(), strict=True):
        assert isinstance(node, ast.AnnAssign) and re.search(r"  # \S", line), (
            f"{line!r}: expected a type and a comment"
        )


@each_notebook
def test_sections_are_there_in_order(notebook):
    prose = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]
    headings = [line.lower() for source in prose for line in source.splitlines() if re.match(r"##+ ", line)]
    found = [word for line in headings for word in SECTIONS if re.search(rf"\b{word}\b", line)]
    first_seen = list(dict.fromkeys(found))
    assert first_seen == [word for word in SECTIONS if word in first_seen], f"order of {first_seen}"
    assert set(first_seen) >= NEEDED, f"headings lack {NEEDED - set(first_seen)}"


@each_notebook
def test_code_cells_are_short_and_hold_no_classes(notebook):
    for cell in code_cells(notebook):
        n_lines = len(cell.source.strip().splitlines())
        assert n_lines <= LONGEST_CELL, f"{n_lines} lines: {cell.source[:60]!r}"
        nodes = list(ast.walk(tree(cell)))
        assert not [node for node in nodes if isinstance(node, ast.ClassDef | ast.While)], "that belongs in the package"


@each_notebook
def test_a_notebook_asserts_what_it_claims_and_keeps_what_it_found(notebook):
    nodes = [node for cell in code_cells(notebook) for node in ast.walk(tree(cell))]
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert any(isinstance(node, ast.Assert) for node in nodes), "the check is an assertion"
    assert {"run.keep", "run.finding"} <= calls


@pytest.mark.parametrize("model", ["organism", "tiny:gpt2"])
@each_notebook
def test_a_notebook_runs_offline(notebook, model, tmp_path_factory, monkeypatch):
    if model == "organism" and os.environ.get("CI"):  # where a browser is a must, and opens it as well
        pytest.skip("tests/browser/test_lab.py opens this notebook and runs all of it on the organism")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = execute(notebook, {"model": model}, runs=tmp_path_factory.mktemp("runs"), timeout=600)
    assert run.status == "done", "\n".join([run.manifest["error"]["source"], *run.manifest["error"]["lines"]])
    assert run.results() and run.figures() and run.findings


@pytest.mark.skipif(not REAL, reason="WORKBENCH_REAL names no folder of real models")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_on_a_real_model(name, tmp_path):
    model = Path(str(REAL)).resolve() / "models" / "stories260k"
    run = execute(ROOT / "notebooks" / f"{name}.ipynb", {"model": str(model)}, runs=tmp_path, timeout=900)
    assert run.status == "done", "\n".join([run.manifest["error"]["source"], *run.manifest["error"]["lines"]])


def test_runs_of_a_sweep_are_gathered_without_those_of_other_settings_or_no_end(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path))
    notebook, model = ROOT / "notebooks" / "90_compose.ipynb", "tiny:gpt2"
    params = {name: one.default for name, one in declared(code_cells(notebook)[1].source).items()} | {"model": model}
    for seed, scale, status in ((0, 1, "done"), (1, 1, "done"), (0, 2, "done"), (2, 1, "failed")):
        study = CrossStudy((Fluency(4 * scale),), kinds(["random tokens"]), seeds=(seed,), floor=False)
        run = Run.start("90_compose", **params | {"seed": seed, "scale": scale})
        run.keep("cross", study.run(Subject.open(model)))
        write_json(run.folder / "manifest.json", run.manifest | {"status": status})
    run = execute(notebook, {"model": model, "gather": True}, runs=tmp_path, timeout=600)
    assert run.status == "done", "\n".join(run.manifest["error"]["lines"])
    assert run.results()["cross"].seeds == [0, 1]
