"""The gallery: a folder that holds all it shows, fetches nothing, and finds a run again."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from workbench.gallery import LIBRARY, MOST_ROWS, write_gallery
from workbench.run import Run

FIGURE = {"data": [{"type": "scatter", "x": [1, 2], "y": [3, 4]}], "layout": {"title": {"text": "Two rise"}}}
EVIL = "<script>alert(1)</script>"


def made_run(folder: Path, n: int, status: str = "done", rows: int = 3) -> Run:
    key = f"{n:012x}"
    run = Run(folder / "runs" / "a b" / key)
    (run.folder / "figures").mkdir(parents=True)
    (run.folder / "results" / "shares").mkdir(parents=True)
    table = pd.DataFrame({"name": [f"{EVIL}{n}"] * rows, "share": [n / 2] * rows})
    (run.folder / "results" / "shares" / "table-0.parquet").write_bytes(table.to_parquet(index=False))
    (run.folder / "figures" / "rise.json").write_text(json.dumps(FIGURE))
    (run.folder / "params.json").write_text(json.dumps({"seed": n, "model": "organism", "word": EVIL}))
    facts = {
        "status": status,
        "started": f"2026-01-01T00:0{n}:00+00:00",
        "command": f"workbench run a.ipynb -p seed={n}",
    }
    facts |= {"error": {"kind": "cell failed", "cell": 1, "lines": ["No"]}} if status == "failed" else {}
    (run.folder / "manifest.json").write_text(json.dumps(facts))
    if status == "done":
        run.finding(f"found {n} {EVIL}")
    return run


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    return [made_run(tmp_path, 1), made_run(tmp_path, 2, rows=40), made_run(tmp_path, 3, "failed")]


class Links(HTMLParser):
    """Every address in a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("href", "src")]


def test_every_link_leads_to_a_file_of_the_folder(runs, tmp_path):
    index = write_gallery(runs, tmp_path / "out")
    pages = [index, *(tmp_path / "out" / "runs").glob("*.html")]
    assert len(pages) == 4
    for page in pages:
        links = Links(page.read_text()).found
        assert links and all((page.parent / link).resolve().is_file() for link in links), links
        assert all((page.parent / link).resolve().is_relative_to(tmp_path / "out") for link in links)


def test_the_library_lies_there_once_and_pages_stay_small(runs, tmp_path):
    write_gallery(runs, tmp_path / "out")
    assert (tmp_path / "out" / LIBRARY).stat().st_size > 1_000_000
    assert not (tmp_path / "out" / LIBRARY).read_text().startswith("<")
    for page in (tmp_path / "out").rglob("*.html"):
        assert page.stat().st_size < 40_000 and "http" not in re.sub(r"https?://\S*plot\S*", "", page.read_text())


def test_the_index_holds_every_run_its_parameters_findings_and_failure(runs, tmp_path):
    source = write_gallery(runs, tmp_path / "out", title="Night of <sweeps>").read_text()
    assert source.count("<tr data-notebook=") == 3 and "Night of &lt;sweeps&gt;" in source and EVIL not in source
    assert 'data-params="seed=2 model=organism word=&lt;script&gt;' in source, "what the search looks through"
    assert "found 1 &lt;script&gt;" in source and "cell failed: No" in source
    assert re.findall(r"<th scope=col>(\w+)</th>", source) == ["run", "status", "started", "seed", "finding"]
    assert "<option>failed</option>" in source and "<form" in source and '<form role="search" hidden>' in source


def test_a_page_shows_its_run_with_signed_figures_and_the_tables_it_kept(runs, tmp_path):
    write_gallery(runs, tmp_path / "out")
    source = (tmp_path / "out" / "runs" / f"a_b-{2:012x}.html").read_text()
    assert "Two rise" in source and source.count("workbench run a.ipynb -p seed=2") >= 4
    assert f"<figcaption>run {2:012x} · <code>workbench run a.ipynb -p seed=2</code></figcaption>" in source
    assert "the first 30 of 40 rows" in source and EVIL not in source
    table = pd.read_csv(tmp_path / "out" / "tables" / f"a_b-{2:012x}-shares.csv")
    assert table["share"].tolist() == [1.0] * 40
    assert f'href="a_b-{1:012x}.html">previous' in source and f'href="a_b-{3:012x}.html">next' in source


def test_a_very_long_table_is_not_copied(tmp_path):
    run = made_run(tmp_path, 1, rows=MOST_ROWS + 1)
    write_gallery([run], tmp_path / "out")
    assert not (tmp_path / "out" / "tables").exists()
    assert "all are in the run's folder" in (tmp_path / "out" / "runs" / f"a_b-{1:012x}.html").read_text()


def test_two_tables_whose_names_look_the_same_in_a_link_are_two_files(tmp_path):
    run = made_run(tmp_path, 1)
    for n, name in enumerate(("a.b", "a_b", "a b")):
        (run.folder / "results" / name).mkdir()
        table = pd.DataFrame({"n": [n]})
        (run.folder / "results" / name / "table-0.parquet").write_bytes(table.to_parquet(index=False))
    write_gallery([run], tmp_path / "out")
    source = (tmp_path / "out" / "runs" / f"a_b-{1:012x}.html").read_text()
    for n, name in enumerate(("a.b", "a_b", "a b")):
        (file,) = re.findall(rf"<h2>Kept: {re.escape(name)}</h2>\n<p>all as <a href=\"\.\./tables/([^\"]+)\"", source)
        assert pd.read_csv(tmp_path / "out" / "tables" / file)["n"].tolist() == [n]


def test_a_parameter_that_is_called_like_a_fact_of_the_run_hides_nothing(tmp_path):
    runs = [made_run(tmp_path, n) for n in (1, 2)]
    for n, run in enumerate(runs):
        (run.folder / "params.json").write_text(json.dumps({"status": f"fast {n}"}))
    source = write_gallery(runs, tmp_path / "out").read_text()
    for n in (0, 1):
        assert f'<td data-name="status">fast {n}</td>' in source
    assert source.count('<td data-name="status">done</td>') == 2


def test_a_broken_table_costs_no_other_page(runs, tmp_path):
    (runs[0].folder / "results" / "shares" / "table-0.parquet").write_bytes(b"PAR1")
    write_gallery(runs, tmp_path / "out")
    assert "Its table is missing or broken" in (tmp_path / "out" / "runs" / f"a_b-{1:012x}.html").read_text()
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 3


def test_a_gallery_is_replaced_and_anything_else_is_left_alone(runs, tmp_path):
    write_gallery(runs, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write_gallery(runs[1:], tmp_path / "out")
    assert (
        len(list((tmp_path / "out" / "runs").iterdir())) == 2
        and len(list((tmp_path / "out" / "tables").iterdir())) == 2
    )
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("my page")
    for place in ("other", "other/index.html"):
        with pytest.raises(ValueError, match="holds something else, expected a new folder"):
            write_gallery(runs, tmp_path / place)
    assert (tmp_path / "other" / "index.html").read_text() == "my page"
    with pytest.raises(ValueError, match="got no runs"):
        write_gallery([], tmp_path / "out")


def test_equal_galleries_are_equal_to_the_byte(runs, tmp_path):
    for place in ("one", "two"):
        write_gallery(runs, tmp_path / place)
    files = [
        {path.relative_to(tmp_path / p): path.read_bytes() for path in (tmp_path / p).rglob("*.*")}
        for p in ("one", "two")
    ]
    assert files[0] == files[1]
