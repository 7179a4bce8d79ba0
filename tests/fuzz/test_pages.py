"""Whatever a notebook is called, holds and prints: its pages run nothing, fetch nothing, and show it as text."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workbench.gallery import write_gallery
from workbench.plots import plotly_js
from workbench.report import PLOTLY, page
from workbench.run import Run
from workbench.safe_html import safe_html
from workbench.signature import signature_of, signed, unsigned

EVIL = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "<a href=' java\nscript:alert(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<img src='data:image/svg+xml,<svg onload=alert(1)>'>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=1 onerror=alert(1)>'>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<style>@import 'http://x.example/'</style>",
    "<link rel=stylesheet href=http://x.example/>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "<base href=http://x.example/>",
    "<form action=javascript:alert(1)><input type=submit formaction=javascript:alert(1)>",
    "<object data=x></object><embed src=x>",
    "<b style='background:url(http://x.example/)' onclick=alert(1)>",
    "'\"><script>alert(1)</script>",
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php <script>alert(1)</script>?>",
    "<script",
    "<scr<script>ipt>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "<a href=//x.example>x</a>",
    "<td background=http://x.example/ rowspan='1\" onclick=alert(1)'>",
    "<textarea></textarea><title></title><plaintext>",
    "{% raw %} {0} {} %s ${x}",
]
PIECES = st.sampled_from(
    [*EVIL, *"<>\"'&/=! \n", "b", "table", "onclick=", "href=", "--", "]]>", "\x00", "\u2028", "é"]
)
HOSTILE = st.lists(PIECES, max_size=8).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


class Reader(HTMLParser):
    """The tags, attributes and text of a page, as a browser that runs nothing would see them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_harmless(tags: list[tuple[str, dict[str, str]]]) -> None:
    for tag, attributes in tags:
        assert tag not in (
            "script",
            "style",
            "iframe",
            "object",
            "embed",
            "svg",
            "math",
            "link",
            "meta",
            "base",
            "form",
        )
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc", "background")]
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith(("http://", "https://", "#"))


@given(HOSTILE)
def test_no_html_comes_through_that_runs_or_fetches(source: str) -> None:
    made = safe_html(source)
    assert_harmless(Reader(made).tags)
    assert safe_html(made) == made, "what is safe stays as it is"


@pytest.mark.parametrize(("one", "other"), list(itertools.product(EVIL, EVIL[:8])))
def test_no_two_hostile_pieces_together_come_through(one: str, other: str) -> None:
    assert_harmless(Reader(safe_html(one + other)).tags)
    assert_harmless(Reader(safe_html(one[:-1] + other)).tags)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>&\x00\r"), max_size=60))
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    assert Reader(safe_html(text)).text == text


def a_run(folder: Path, words: str) -> Run:
    """A run in which everything that a user can name is `words`."""
    folder.mkdir(parents=True)
    figure = {"data": [{"x": [1], "name": words}], "layout": {"title": {"text": words}}}
    outputs = [
        new_output("display_data", {PLOTLY: figure}),
        new_output("execute_result", {"text/html": words, "text/plain": words}),
        new_output("stream", name="stdout", text=words),
    ]
    cells = [new_markdown_cell(f"# {words}\n\n{words}"), new_code_cell(f"x = {words!r}", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), folder / "notebook.ipynb")
    error = {"kind": words, "cell": 1, "source": words, "lines": [words]}
    facts = {"status": "failed", "started": "2026-01-01T00:00:00+00:00", "command": words, "error": error}
    (folder / "manifest.json").write_text(json.dumps(facts))
    (folder / "params.json").write_text(json.dumps({"n": words, words: 1}))
    if words.strip():
        Run(folder).finding(words)
    return Run(folder)


def of_the_page(tags: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """The tags that a run could have brought in: not the page's own head, styles and figures."""
    own = ("html", "head", "meta", "style", "title", "body")
    return [(tag, given) for tag, given in tags if tag not in own and "plotly" not in given.get("class", "")]


def pages_of(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("workbench.report.plotly_js", lambda: "")
    monkeypatch.setattr("workbench.gallery.plotly_js", lambda: "")
    write_gallery([run], folder)
    return [page([run], "title"), *(path.read_text() for path in sorted(folder.glob("**/*.html")))]


@settings(max_examples=20)
@given(HOSTILE, st.integers(0, 10**9))
def test_a_hostile_run_runs_nothing_in_report_and_gallery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, number: int
) -> None:
    folder = tmp_path / f"{number}-{len(list(tmp_path.iterdir()))}"
    plain = pages_of(a_run(folder / "plain" / "10_a" / "k", "word"), folder / "one", monkeypatch)
    hostile = pages_of(a_run(folder / "hostile" / "10_a" / "k", words), folder / "two", monkeypatch)
    for ours, theirs in zip(plain, hostile, strict=True):
        count = [sum(tag == "script" for tag, _ in Reader(text).tags) for text in (ours, theirs)]
        assert count[0] >= count[1], "no script beside those that draw figures"
        others = [(tag, given) for tag, given in of_the_page(Reader(theirs).tags) if tag != "script"]
        assert not [given for _, given in others if any(name.startswith("on") for name in given)]
        assert not [tag for tag, _ in others if tag in ("iframe", "object", "embed", "svg", "base", "link")]


@pytest.mark.parametrize("words", EVIL)
def test_each_hostile_name_is_shown_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for text in pages_of(a_run(tmp_path / "10_a" / "k", words), tmp_path / "out", monkeypatch):
        assert words.split("\n")[0].strip("<") in Reader(text).text.replace("\u2028", "")
        others = [(tag, given) for tag, given in of_the_page(Reader(text).tags) if tag != "script"]
        assert not [given for _, given in others if any(name.startswith("on") for name in given)]


def test_the_plotting_library_is_one_script() -> None:
    assert [tag for tag, _ in Reader(plotly_js()).tags] == ["script"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=5,
)
FIGURES = st.fixed_dictionaries({"data": st.just([])}, optional={
    "layout": st.fixed_dictionaries({}, optional={
        "meta": JSON, "title": JSON, "annotations": st.lists(st.dictionaries(HOSTILE, JSON, max_size=2), max_size=2),
        "margin": st.dictionaries(st.sampled_from("tblr"), st.integers(0, 200)),
    }),
})  # fmt: skip


@given(FIGURES, HOSTILE, HOSTILE)
def test_a_signature_is_read_back_taken_off_and_put_on_once(figure: dict[str, Any], key: str, command: str) -> None:
    before = json.dumps(figure)
    made = signed(figure, key, command)
    assert signature_of(made) == {"key": key, "command": command}
    assert signed(made, "another", "command") == made
    assert json.dumps(figure) == before, "the figure itself is left alone"
    meta = (figure.get("layout") or {}).get("meta")
    if meta and (figure["layout"].get("annotations") or "annotations" not in figure["layout"]):
        assert unsigned(made) == figure
    assert "<script" not in made["layout"]["annotations"][-1]["text"]
