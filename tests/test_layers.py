"""Imports go down only: a module may import from its own layer and from those below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUBJECT = {
    "subject",
    "prefix",
    "capture",
    "card",
    "generation",
    "loading",
    "reading",
    "remote",
    "stack",
    "step",
    "tokens",
}
CACHES = {"cache", "fused", "pruned"}
LAYERS = (  # from the top; a name stands for the module and, for a folder, for everything in it
    {"cli"},
    {"room"},
    {"widgets"},
    {"sweep"},
    {"gallery"},
    {"runs"},
    {"run", "report"},
    {"folder"},
    {"studies"},
    {"probes"},
    {"toggles"},
    {"methods"},
    {"toggle", "probe", "result", "directions", "strength", "memory", "unembedding"} | SUBJECT | CACHES,
    {
        "anatomy",
        "swap",
        "clock",
        "memo",
        "discovery",
        "site",
        "values",
        "settings",
        "organism",
        "files",
        "environment",
        "parameters",
        "keys",
        "kernel",
        "forking",
        "warm",
        "leases",
        "storage",
        "signature",
        "grid",
        "safe_html",
        "dice",
    },
    {"plots", "stats", "corpora", "look"},
)
ONLY_IN = {  # a library, and the only places that may import it
    "plotly": {"plots", "widgets"},
    "ipywidgets": {"widgets"},
    "anywidget": {"widgets"},
    "solara": {"room"},
    "reacton": {"room"},
    "starlette": {"room"},
    "uvicorn": {"room"},
    "papermill": {"run"},
    "dask": {"sweep"},
    "distributed": {"sweep"},
    "dask_jobqueue": {"sweep"},
    "duckdb": {"runs"},
    "workbench_kernels": {"fused"},
    "fsspec": {"storage"},
    "upath": {"storage"},
    "transformers": {"discovery", "cache", "organism", "pruned"} | SUBJECT,
}


def imports(source: str, package: tuple[str, ...] = ()) -> Iterator[str]:
    """The modules that a source in `package` imports, anywhere in it; not those for type checkers alone."""
    tree = ast.parse(source)
    typing_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {child for node in typing_only for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in skipped:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in skipped:
            around = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*around, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrongs(path: str, source: str) -> Iterator[str]:
    """Every import in the module at `path`, relative to the package, that its place does not allow."""
    *folders, file = path.removesuffix(".py").split("/")
    place = (folders or [file])[0]
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for name in imports(source, ("workbench", *folders)):
        library, *inner = name.split(".")
        target = inner[0] if inner else ""
        if library in ONLY_IN and place not in ONLY_IN[library]:
            yield f"{path} imports {library}, which belongs in {', '.join(sorted(ONLY_IN[library]))}"
        if library == "workbench" and target in layer and place != "__init__" and layer[target] < layer[place]:
            yield f"{path} imports {name} from a higher layer"
        if library == "workbench" and place == target == "probes" and inner[1] != file:
            yield f"{path} imports {name}: probes do not import each other"


def test_imports_go_down_only():
    paths = sorted(ROOT.glob("workbench/**/*.py"))
    places = {path.relative_to(ROOT / "workbench").parts[0].removesuffix(".py") for path in paths}
    assert places - {"__init__"} <= set().union(*LAYERS), "each module needs a layer"
    found = [w for p in paths for w in wrongs(p.relative_to(ROOT / "workbench").as_posix(), p.read_text())]
    assert not found, "\n".join(found)


def test_kernels_know_nothing_of_the_workbench():
    sources = {path: path.read_text() for path in ROOT.glob("kernels/**/*.py")}
    assert not [path for path, text in sources.items() if any(i.split(".")[0] == "workbench" for i in imports(text))]


@pytest.mark.parametrize(
    ("path", "source"),
    [(f"stats{end}", f"import {library}.x") for library in ONLY_IN for end in (".py", "/inner.py")]
    + [
        ("toggles/a.py", "from workbench.probes.b import B"),
        ("probes/a.py", "def f():\n import workbench.probes.b"),
    ]
    + [("probes/a.py", "from workbench.probes import b"), ("stats.py", "from workbench import site")]
    + [("probes/a.py", "from .b import B"), ("toggles/a.py", "from ..probes import b")]
    + [("probe.py", "from workbench.run import Run"), ("run.py", "if x:\n import workbench.cli")],
)
def test_each_clause_can_fail(path, source):
    assert list(wrongs(path, source))


def test_type_checkers_may_look_up():
    assert not list(wrongs("probe.py", "if TYPE_CHECKING:\n    from workbench.run import Run"))
