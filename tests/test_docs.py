"""The documentation is true: guides run to green laws, statistics print what they say, links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from families import invite, subclasses_in

import workbench
import workbench.probes
from workbench.probe import Probe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guide").glob("*.ipynb"))
STATISTICS = (DOCS / "statistics.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CODE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)\n```)?", flags=re.DOTALL)
each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)


def test_there_are_two_guides() -> None:
    assert [path.stem for path in GUIDES] == ["add_a_probe", "add_a_toggle"]


@each_guide
def test_a_guide_is_valid_has_ids_and_no_outputs(guide: Path) -> None:
    content = nbformat.read(guide, as_version=4)
    nbformat.validate(content)
    ids = [cell.id for cell in content.cells]
    assert len(set(ids)) == len(ids)
    for cell in content.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@each_guide
def test_a_guide_runs_from_an_empty_file_to_green_laws(guide: Path, tmp_path: Path) -> None:
    """Each asserts inside that its first version fails the laws and that its last one passes them."""
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path)]
    folders = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    surroundings = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": folders}
    done = subprocess.run([*command, str(guide)], cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / guide.name).exists()


def test_guests_with_a_taken_name_or_no_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "hftp.py").write_text("")
    with pytest.raises(ValueError, match=r"has a hftp\.py already"):
        invite(workbench.probes, tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        invite(workbench.probes, tmp_path / "nowhere")


def written(guide: Path) -> str:
    """The file that a guide writes, in its first version."""
    cells = nbformat.read(guide, as_version=4).cells
    parts = [
        re.sub(r"^%%writefile[^\n]*\n", "", cell.source) for cell in cells if cell.source.startswith("%%writefile")
    ]
    return "\n".join(part for part in parts if "import pytest" not in part) + "\n"


@each_guide
def test_what_a_guide_writes_has_the_form_of_the_house(guide: Path, tmp_path: Path) -> None:
    path = tmp_path / "written.py"
    path.write_text(written(guide))
    for check in (["format", "--check"], ["check", "--ignore=F401,F841"]):  # a first version has idle names
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_the_page_on_statistics_prints_what_it_says() -> None:
    names: dict = {}
    for number, (code, shown) in enumerate(CODE.findall(STATISTICS)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"statistics.md, block {number}", "exec"), names)
        assert printed.getvalue().rstrip() == shown, code


def test_every_number_in_the_prose_on_statistics_was_printed_or_is_a_level() -> None:
    outputs = "\n".join(shown for _, shown in CODE.findall(STATISTICS))
    prose = re.sub(r"```.*?```|\$[^$]*\$|`[^`]*`|\d{4}\.\d{5}", "", STATISTICS.replace("$$", "$"), flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
    levels = {"5 %", "95 %", ".05", "2 %"}  # of tests and intervals; where the fitted tail begins
    numbers = set(re.findall(r"\d*\.\d+|\d+ %", prose)) - levels
    assert not {number for number in numbers if number not in outputs}


def test_every_probe_has_its_row_in_the_page_on_statistics() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", STATISTICS, flags=re.MULTILINE)
    probes = [cls.__name__ for cls in subclasses_in(workbench.probes, Probe)]
    assert len(set(rows)) == len(rows) and set(rows) == set(probes), set(rows) ^ set(probes)


def test_contributing_takes_forty_lines_and_names_what_is_there() -> None:
    assert len(CONTRIBUTING.splitlines()) <= 40
    named = re.findall(r"(?:workbench|tests|notebooks|kernels|bench|docs)/[\w/]*(?:\.\w+)?", CONTRIBUTING)
    assert len(named) > 15 and not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md", *GUIDES], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    if page.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and not [link for link in links if not (page.parent / link).exists()]


class Page(HTMLParser):
    """The anchors and links of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {str(given["id"])} if given.get("id") else set()
        self.links += [str(given[name]) for name in ("href", "src") if given.get(name)]


def test_every_public_name_says_what_it_is() -> None:
    for name in workbench.__all__:
        value = getattr(workbench, name)
        text = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
        assert text and not text.startswith(f"{name}("), f"{name} has no docstring of its own"


def test_the_reference_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc, of the dev extra, is not installed: no reference can be built")
    command = [sys.executable, str(DOCS / "reference" / "build.py"), str(tmp_path)]
    folders = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": folders}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.resolve(): Page(path) for path in tmp_path.rglob("*.html")}
    assert not set(workbench.__all__) - pages[(tmp_path / "workbench.html").resolve()].anchors
    broken = []
    for path, page in pages.items():
        for link in page.links:
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if link.startswith("data:"):  # a picture inside the page
                continue
            if "://" in link or not target.exists() or (anchor and anchor not in pages[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken, broken[:10]
