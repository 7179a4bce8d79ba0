"""The report: one page, everything in it, nothing fetched, nothing run that a notebook printed."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workbench.report import PLOTLY, WIDGET, page, title_of, write_report
from workbench.run import Run
from workbench.safe_html import safe_html

FIGURE = {"data": [{"type": "scatter", "x": [1, 2], "y": [3, 4]}], "layout": {"title": {"text": "Two rise"}}}
EVIL = "<script>alert(1)</script>"
TABLE = f"""<div><style scoped>td {{ color: red }}</style><table border="1" onclick="alert(2)"><tr><th colspan="2">one
</th></tr><tr><td>{EVIL}3.5</td><td><a href="http://x.example/">link</a><img src="http://x.example/i.png"></td></tr></table>
<iframe src="http://x.example/"></iframe></div>"""
PROSE = f"""# Does it *rise*?

As in [the paper](https://arxiv.org/abs/1), {EVIL} ![remote](https://x.example/p.png), $a < b$.
[bad](javascript:alert(3))

<details><summary>hint</summary>Look <b onclick="alert(4)">below</b>.</details> ![dot](data:image/png;base64,aGk=)

| a | b |
|---|---|
| 1 | 2 |
"""


def made_run(folder: Path, *outputs: nbformat.NotebookNode, **manifest: object) -> Run:
    """A run on disk whose one code cell gave these outputs."""
    folder.mkdir(parents=True)
    code = new_code_cell("shown = '<code>'", outputs=list(outputs))
    nbformat.write(new_notebook(cells=[new_markdown_cell(PROSE), code]), folder / "notebook.ipynb")
    facts = {"status": "done", "started": "2026-01-01T00:00:00+00:00", "command": "workbench run a.ipynb -p n='3 4'"}
    (folder / "manifest.json").write_text(json.dumps(facts | manifest))
    (folder / "params.json").write_text('{"n": "3 4"}')
    Run(folder).finding("Two points rise & shine")
    return Run(folder)


@pytest.fixture
def run(tmp_path) -> Run:
    return made_run(
        tmp_path / "10_hftp" / "0123abcd",
        new_output("display_data", {PLOTLY: FIGURE, "text/html": f"<div>{EVIL}</div>", "text/plain": "Figure()"}),
        new_output("display_data", {PLOTLY: FIGURE}),
        new_output("execute_result", {"text/html": TABLE, "text/plain": "table"}),
        new_output("execute_result", {"text/html": f"<b>{EVIL}</b>", "text/plain": "plain & simple"}),
        new_output("display_data", {"image/png": "aGVsbG8=\n"}),
        new_output("display_data", {WIDGET: {"model_id": "1"}, "text/plain": "VBox(children=1)"}),
        new_output("stream", name="stdout", text=f"printed {EVIL}"),
        new_output("stream", name="stderr", text="a progress bar"),
    )


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.words += data


def test_the_page_fetches_nothing(run):
    elements = Elements(page([run], "Page")).found
    for tag, attributes in elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert (attributes.get("src") or "data:").startswith("data:"), (tag, attributes)
        assert "href" not in attributes or tag == "a", (tag, attributes)  # a link is followed only when clicked
        assert "url(" not in (attributes.get("style") or "")
    assert "cdn" not in "".join(str(item) for item in elements)
    style = page([run], "Page").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_what_a_notebook_printed_never_runs(run):
    source = page([run], "Page")
    assert EVIL not in source
    elements = Elements(source).found
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    assert not [1 for _, attributes in elements if (attributes.get("href") or "").startswith("javascript")]
    assert "printed &lt;script&gt;alert(1)&lt;/script&gt;" in source


def test_everything_worth_reading_is_there(run):
    source = page([run], "Page")
    for expected in ("Two points rise &amp; shine", "workbench run a.ipynb -p n=&#x27;3 4&#x27;", "0123abcd", "3 4"):
        assert expected in source
    assert '<th colspan="2">one' in source and "<td>3.5</td>" in source, "tables keep their cells and spans"
    assert "plain &amp; simple" in source and "data:image/png;base64,aGVsbG8=" in source
    assert "<em>rise</em>" in source and "$a &lt; b$" in source and "<table>\n<thead>" in source, "prose is rendered"
    assert "<details><summary>hint</summary>Look <b>below</b>.</details>" in source and "base64,aGk=" in source
    assert "shown = &#x27;&lt;code&gt;&#x27;" in source and "<details><summary>code" in source
    assert "in JupyterLab" in source and "VBox" not in source and "progress bar" not in source


def test_figures_are_drawn_once_each_and_the_library_is_there_once(run, tmp_path):
    again = made_run(tmp_path / "10_hftp" / "4567", new_output("display_data", {PLOTLY: FIGURE}))
    elements = Elements(page([run, again], "Page")).found
    ids = [attributes["id"] for _, attributes in elements if attributes.get("id")]
    figures = [name for name in ids if name.startswith("figure-")]
    assert len(figures) == 3 and len(set(ids)) == len(ids)
    assert page([run, again], "Page").count("plotly.js v") == page([run], "Page").count("plotly.js v") > 0


def test_a_page_without_figures_needs_no_library(tmp_path):
    run = made_run(tmp_path / "a" / "b", new_output("stream", name="stdout", text="words"))
    assert "<script" not in page([run], "Page") and len(page([run], "Page")) < 20_000


def test_the_contents_lead_to_every_run(run, tmp_path):
    other = made_run(tmp_path / "20" / "89")
    elements = Elements(page([run, other], "Page")).found
    links = {
        attributes["href"]
        for tag, attributes in elements
        if tag == "a" and (attributes["href"] or "").startswith("#run")
    }
    assert links == {"#run-1", "#run-2"} <= {f"#{attributes.get('id')}" for _, attributes in elements}


def test_a_comment_in_code_is_no_title(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    cells = [new_code_cell("# set up\nx = 1"), new_markdown_cell("# Does it rise?")]
    nbformat.write(new_notebook(cells=cells), folder / "notebook.ipynb")
    assert title_of(Run(folder)) == "Does it rise?"


def test_a_parameter_that_is_called_like_a_fact_of_the_run_hides_nothing(tmp_path):
    run = made_run(tmp_path / "a" / "b")
    (run.folder / "params.json").write_text('{"status": "fast", "run": 7}')
    source = page([run], "Page")
    for name, value in (("run", "b"), ("status", "done"), ("status", "fast"), ("run", "7")):
        assert f"<tr><th scope=row>{name}</th><td>{value}</td></tr>" in source


@pytest.mark.parametrize("name", ["notebook.ipynb", "figures/rise.json"])
def test_a_file_that_was_cut_is_named(tmp_path, name):
    run = made_run(tmp_path / "a" / "b")
    (run.folder / "notebook.ipynb").unlink()
    (run.folder / "figures").mkdir()
    (run.folder / name).write_text('{"cells": [')
    with pytest.raises(ValueError, match=rf"{name}: not JSON .* Bring the file back"):
        page([run], "Page")


def test_a_failed_run_shows_its_error(tmp_path):
    error = {"kind": "cell failed", "lines": ["Trace", "ValueError: <none>"]}
    trace = new_output("error", ename="ValueError", evalue="none", traceback=["\x1b[31mValueError\x1b[0m: <none>"])
    source = page([made_run(tmp_path / "a" / "b", trace, status="failed", error=error)], "Page")
    assert "cell failed" in source and source.count("ValueError: &lt;none&gt;") == 2


def test_an_interactive_run_shows_the_figures_it_kept(tmp_path):
    folder = tmp_path / "a" / "interactive-1"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "rise.json").write_text(json.dumps(FIGURE))
    source = page([Run(folder)], "Page")
    assert "figure-1-0" in source and "<li>Two rise</li>" in source


def test_very_long_output_is_cut_and_says_so(tmp_path):
    run = made_run(tmp_path / "a" / "b", new_output("stream", name="stdout", text="x" * 30_000))
    assert "10000 characters more" in page([run], "Page")


def test_a_report_is_written_where_it_is_wanted(run, tmp_path):
    path = write_report([run], tmp_path / "new folder" / "r.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="got no runs"):
        write_report([], path)
    with pytest.raises(ValueError, match="is a folder"):
        write_report([run], tmp_path)


def test_what_a_desk_shows_keeps_its_colours_and_frames() -> None:
    token = "<span style='background-color:#D55E00;color:#000000;background:url(x);position:fixed'>word</span>"
    shown = f"<style>p {{}}</style><section class='workbench-pane'><h4 class='other'>pushed</h4>{token}</section>"
    made = safe_html(shown)
    assert '<section class="workbench-pane"><h4>pushed</h4>' in made
    assert '<span style="background-color:#D55E00;color:#000000">word</span>' in made and "url" not in made
