"""Two runs side by side: equal is said of equal runs only, and what differs is named, causes before outcomes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from workbench.result import Result
from workbench.run import Run, execute
from workbench.runs.compare import CAUSES, OUTCOMES, Comparison, compare
from workbench.runs.notebooks import code_of, source_of
from workbench.runs.tables import array_differences, relative_difference, table_differences, value_differences


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured(Result):
    shares: np.ndarray
    note: str = ""
    times_ms: np.ndarray
    columns: ClassVar[tuple[str, ...]] = ("share", "time_ms")
    clocks: ClassVar[tuple[str, ...]] = ("times_ms",)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"share": self.shares, "time_ms": self.times_ms})

    def plot(self, **view: object) -> go.Figure:
        figure = go.Figure(go.Scatter(y=self.shares, name="share"))
        return figure.update_layout(title={"text": f"{self.shares[0]} in {self.times_ms[0]} ms"})


@pytest.fixture(scope="module")
def executed(tmp_path_factory, write_notebook) -> Run:
    folder = tmp_path_factory.mktemp("compare")
    code = "from workbench.run import Run\nRun.start('x').finding(f'n={n}')"
    return execute(write_notebook(folder / "greet.ipynb", code, "1 + 1"), {"n": 4}, runs=folder / "runs")


@pytest.fixture
def pair(executed, tmp_path) -> tuple[Run, Run]:
    """Two runs that are equal, and that kept one result each."""
    runs = [Run(tmp_path / place / "greet" / executed.key) for place in ("one", "two")]
    for run in runs:
        shutil.copytree(executed.folder, run.folder)
        run.keep("measured", Measured(shares=np.array([0.5, 0.25]), times_ms=np.array([1.0, 2.0])))
    return runs[0], runs[1]


def change(run: Run, file: str, **facts: object) -> None:
    path = run.folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def parts(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(item.part for item in comparison.differences))


def test_a_run_equals_itself_and_its_copy(pair):
    first, second = pair
    for compared in (compare(first, first), compare(first, second)):
        assert compared.equal and compared.same_outcome and compared.table().empty and not compared.notes
        assert "equal: the same parameters, code and environment" in str(compared)


def test_where_and_when_a_run_was_made_is_no_difference(pair):
    change(pair[1], "manifest.json", started="2030-01-01T00:00:00+00:00", seconds=99.0, host="other", pid=1)
    variables = json.loads((pair[1].folder / "environment.json").read_text())["variables"]
    change(pair[1], "environment.json", variables=variables | {"WORKBENCH_RUN": "elsewhere"})
    assert compare(*pair).equal


def test_causes_come_before_outcomes_and_each_is_named(pair):
    first, second = pair
    change(second, "params.json", n=5, name="b")
    around = json.loads((second.folder / "environment.json").read_text())
    key_parts = around["key_parts"] | {"package": "0" * 64, "inputs": {"name": "1" * 64}}
    versions = around["versions"] | {"torch": "0.1"}
    change(second, "environment.json", key_parts=key_parts, versions=versions, git=None, lock_sha256="2" * 64)
    notebook = json.loads((second.folder / "notebook.ipynb").read_text())
    notebook["cells"][-1]["source"] = "1 + 2"
    (second.folder / "notebook.ipynb").write_text(json.dumps(notebook))
    change(second, "manifest.json", status="failed", error={"kind": "cell failed", "cell": 3, "lines": ["No"]})
    (second.folder / "findings.json").write_text('["n=5"]')
    compared = compare(first, second)
    said = str(compared)
    assert parts(compared) == ["parameters", "code", "package", "inputs", "environment", "status", "findings"]
    assert set(parts(compared)) <= {*CAUSES, *OUTCOMES} and not compared.same_outcome
    for line in ("n: 4 and 5", "name: a and b", "cell 3: 1 + 1 became 1 + 2", "000000000000", "versions.torch: "):
        assert line in said
    for line in (
        "git.commit",
        "only the first: n=4",
        "last line: none and No",
        "status: done and failed",
        "222222222222",
    ):
        assert line in said


def test_one_and_true_are_two_values(pair):
    change(pair[0], "params.json", n=1)
    change(pair[1], "params.json", n=True)
    assert "n: 1 and True" in str(compare(*pair))


def test_a_cause_alone_leaves_the_outcome_the_same(pair):
    change(pair[1], "params.json", n=5)
    compared = compare(*pair)
    assert compared.same_outcome and not compared.equal
    assert compared.verdict == "the same outcome, byte for byte; parameters differ"


def test_different_results_are_described_by_column(pair):
    pair[1].keep("measured", Measured(shares=np.array([0.5, 0.2]), times_ms=np.array([1.0, 2.0]), note="new"))
    compared = compare(*pair)
    assert parts(compared) == ["results", "figures"]
    said = str(compared)
    assert "table: share: 1 of 2 rows differ, at most by 0.2 relative, 0.25 and 0.2" in said
    assert "arrays: shares: 1 of 2 values differ" in said and "field note differs" in said and "time_ms" not in said
    assert "trace 'share' differs in y" in said


def test_measured_times_are_no_difference_but_are_mentioned(pair):
    pair[1].keep("measured", Measured(shares=np.array([0.5, 0.25]), times_ms=np.array([1.5, 2.5])))
    compared = compare(*pair)
    assert compared.equal and compared.notes == ("measured holds measured times (times_ms): but for them it is equal",)


def test_a_result_or_a_figure_of_one_run_only_is_named(pair):
    pair[0].keep("more", Measured(shares=np.array([1.0]), times_ms=np.array([1.0])))
    said = str(compare(*pair))
    assert said.count("more: only the first run kept it") == 2, "the result and its figure"


def test_bytes_that_differ_although_values_do_not_are_said(pair):
    folder = pair[1].folder / "results" / "measured"
    (path,) = folder.glob("table-*.parquet")
    table = pd.read_parquet(path)
    path.write_bytes(table.to_parquet(index=False, compression="gzip"))
    assert "table: the bytes differ, every value is equal" in str(compare(*pair))


def test_a_run_on_object_storage_is_compared_with_one_on_disk(pair):
    from workbench import storage

    folder = storage.place("memory://compare/runs") / "greet" / pair[0].key
    for path in pair[0].folder.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(pair[0].folder).as_posix()
            target.write_bytes(path.read_bytes())
    assert compare(pair[0], Run(folder)).equal


def test_a_figures_signature_is_no_difference(pair):
    from workbench.signature import signed

    for run, key in zip(pair, ("one", "two"), strict=True):
        path = run.folder / "figures" / "measured.json"
        path.write_text(json.dumps(signed(json.loads(path.read_text()), key, f"command {key}")))
    assert compare(*pair).equal


def test_an_interactive_run_has_no_notebook_to_compare(pair):
    (pair[1].folder / "notebook.ipynb").unlink()
    assert "notebook: only the first run stored one" in str(compare(*pair))


def test_equal_tables_have_no_differences_whatever_they_hold():
    table = pd.DataFrame({"x": [1.0, np.nan], "s": ["a", None], "l": [[1], [2, 3]], "b": [True, False]})
    assert table_differences(table, table.copy()) == []
    assert table_differences(pd.DataFrame(), pd.DataFrame()) == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"x": [1.0, 2.0], "y": [0, 0]}, "only the second has column y"),
        ({"y": [1.0, 2.0]}, "only the first has column x"),
        ({"x": [1, 2]}, "x holds float64 in the first, int64 in the second"),
        ({"x": [1.0]}, "2 rows in the first, 1 in the second"),
        ({"x": [1.0, 2.5]}, "x: 1 of 2 rows differ, at most by 0.2 relative, 2 and 2.5"),
        ({"x": [1.0, np.nan]}, "x: 1 of 2 rows differ, none of them finite in both"),
        (
            {"x": [1.25, np.inf]},
            "x: 2 of 2 rows differ, at most by 0.2 relative, 1 and 1.25; 1 of them not finite in both",
        ),
        ({"x": ["1", "2"]}, "x: 2 of 2 rows differ, first in 0: 1.0 and '1'"),
    ],
)
def test_each_way_in_which_tables_differ_has_its_words(other, said):
    assert said in table_differences(pd.DataFrame({"x": [1.0, 2.0]}), pd.DataFrame(other))


def test_the_order_of_columns_is_seen():
    a = pd.DataFrame({"x": [1], "y": [2]})
    assert table_differences(a, a[["y", "x"]]) == ["the columns come in another order"]


def test_arrays_are_compared_by_name_shape_and_value():
    a = {"x": np.zeros((2, 2)), "y": np.ones(3), "z": np.ones(1)}
    b = {"x": np.zeros((2, 2)), "y": np.ones(4), "w": np.ones(1)}
    assert array_differences(a, a) == []
    assert array_differences(a, b) == [
        "y has shape (3,) in the first, (4,) in the second",
        "only the first has array z",
        "only the second has array w",
    ]


def test_the_relative_difference_is_symmetric_and_at_most_two():
    a, b = np.array([1.0, -1.0, 0.0, np.inf, 0.0]), np.array([2.0, 1.0, 0.0, 1.0, 5.0])
    np.testing.assert_array_equal(relative_difference(a, b), relative_difference(b, a))
    np.testing.assert_array_equal(relative_difference(a, b), [0.5, 2.0, 0.0, np.nan, 1.0])
    assert value_differences("x", a, a, "rows") == []


def test_large_whole_numbers_that_a_float_can_not_tell_apart_differ():
    a, b = np.array([2**60]), np.array([2**60 + 1])
    assert value_differences("x", a, b, "rows")[0].startswith("x: 1 of 1 rows differ")


def test_the_source_of_an_executed_notebook_is_what_was_run(executed):
    source = source_of(json.loads((executed.folder / "notebook.ipynb").read_text()))
    tags = [cell["metadata"].get("tags", []) for cell in source["cells"]]
    assert ["parameters"] in tags and ["injected-parameters"] not in tags
    assert all(cell["outputs"] == [] for cell in source["cells"] if cell["cell_type"] == "code")
    written = executed.folder.parents[2] / "greet.ipynb"
    assert code_of(executed.folder / "notebook.ipynb") == code_of(written)
