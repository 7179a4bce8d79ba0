"""Many runs: what is read of them, which are chosen, their tables by SQL and over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from workbench import storage
from workbench.run import Run
from workbench.runs.records import latest, matching, moment, records, spells, varying
from workbench.runs.runs import Runs
from workbench.runs.seeds import over_seeds, seeds_figure
from workbench.runs.sql import Database
from workbench.stats import mean_interval

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path) -> Make:
    """Writes a run with tables as a runner would leave it; each begins a minute after the one before."""
    count = iter(range(1000))

    def write(
        root: object = tmp_path / "runs",
        notebook: str = "a",
        status: str = "done",
        tables: dict[str, pd.DataFrame] | None = None,
        findings: tuple[str, ...] = (),
        **params: object,
    ) -> Run:
        number = next(count)
        folder = storage.place(str(root)) / notebook / f"{number:012x}"
        folder.mkdir(parents=True)
        artefacts = {}
        for name, table in (tables or {}).items():
            (folder / "results" / name).mkdir(parents=True)
            (folder / "results" / name / "table-0.parquet").write_bytes(table.to_parquet(index=False))
            artefacts[f"results/{name}/table-0.parquet"] = {"sha256": "", "bytes": 1}
        started = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)).isoformat(timespec="seconds")
        facts = {"status": status, "started": started, "seconds": 1.5, "command": f"workbench run {notebook}.ipynb"}
        for name, data in {
            "manifest": facts | {"artefacts": artefacts},
            "params": params,
            "findings": list(findings),
        }.items():
            (folder / f"{name}.json").write_text(json.dumps(data))
        return Run(folder)

    return write


def shares(*values: float, layer: int = 2) -> dict[str, pd.DataFrame]:
    """One result with a column of numbers, `layer` of them in each layer."""
    return {"hftp": pd.DataFrame({"layer": [n // layer for n in range(len(values))], "share": values})}


def test_records_are_in_the_order_in_which_the_runs_began_and_one_notebook_may_be_asked_for(make, tmp_path):
    runs = [make(notebook=name) for name in "bab"]
    assert [record.run for record in records(tmp_path / "runs")] == runs
    assert [record.run for record in records(tmp_path / "runs", "b")] == runs[::2]
    assert records(tmp_path / "none") == []


def test_no_table_and_no_figure_is_opened_for_a_list_of_runs(make, tmp_path, monkeypatch):
    make(tables=shares(1.0), findings=("one",))
    opened = []
    monkeypatch.setattr(storage, "read_all", lambda paths, read=storage.read_all: opened.extend(paths) or read(paths))
    (record,) = records(tmp_path / "runs")
    assert {path.name for path in opened} == {"manifest.json", "params.json", "findings.json"}
    assert record.findings == ["one"] and list(record.tables()) == ["hftp"]


def test_the_table_that_counts_is_the_one_that_the_result_names(make):
    """A kill in the middle of a save leaves two."""
    run = make(tables=shares(1.0))
    folder = run.folder / "results" / "hftp"
    (folder / "table-1.parquet").write_bytes(b"")
    (folder / "result.json").write_text('{"files": {"table": "table-0.parquet"}}')
    manifest = {"status": "interactive", "started": "2026-01-01T00:00:00+00:00"}  # without a list of files
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    (record,) = records(run.folder.parent.parent)
    assert record.tables() == {"hftp": folder / "table-0.parquet"}


def test_runs_are_matched_by_status_parameters_and_time(make, tmp_path):
    make(seed=0, keep=0.5)
    make(seed=1, keep=0.5, status="failed")
    make(notebook="b", seed=1)
    found = records(tmp_path / "runs")
    assert [r.params["seed"] for r in matching(found, status="done")] == [0, 1]
    assert matching(found, params={"keep": "5e-1", "seed": "1"}) == [found[1]]
    assert matching(found, since=datetime(2026, 1, 1, 0, 1, tzinfo=UTC)) == found[1:]
    with pytest.raises(ValueError, match=r"parameter sed: no run has one of that name\. Known: seed, keep\."):
        matching(found, params={"sed": "1"})


@pytest.mark.parametrize(
    ("text", "value", "same"),
    [
        *[("1", 1, True), ("1.0", 1, True), ("1", 1.0, True), ("1", "1", True), ("1", True, False), ("0.1", 0.1, True)],
        *[("True", True, True), ("true", True, True), ("None", None, True), ("", "", True), ("x", 1, False)],
    ],
)
def test_text_spells_a_value(text, value, same):
    assert spells(text, value) == same


def test_a_moment_is_an_age_or_a_date():
    assert abs(datetime.now(UTC) - moment("2d") - timedelta(days=2)) < timedelta(minutes=1)
    assert moment("2026-01-31") == datetime(2026, 1, 31, tzinfo=UTC)
    assert moment("2026-01-31T12:00:00+02:00") == datetime(2026, 1, 31, 10, tzinfo=UTC)
    with pytest.raises(ValueError, match="time: got 'yesterday', expected an age"):
        moment("yesterday")


def test_only_what_varies_within_a_notebook_gets_a_column(make, tmp_path):
    make(seed=0, model="organism", flag=True)
    make(seed=1, model="organism", flag=1)
    make(notebook="b", seed=0, model="tiny:gpt2")
    assert varying(records(tmp_path / "runs")) == ["seed", "flag"], "True and 1 are two values"


def test_the_latest_of_equal_runs_stands_for_all(make, tmp_path):
    runs = [make(seed=0), make(seed=1), make(seed=0), make(notebook="b", seed=0)]
    assert [record.run for record in latest(records(tmp_path / "runs"))] == runs[1:]


def test_the_views_join_each_row_with_its_run(make, tmp_path):
    runs = [make(tables=shares(0.1, 0.2), seed=seed, model="organism") for seed in (3, 4)]
    rows = Database(records(tmp_path / "runs")).query("SELECT * FROM hftp ORDER BY seed, share")
    assert list(rows.columns) == ["notebook", "key", "seed", "model", "layer", "share"]
    assert rows["key"].tolist() == [runs[0].key] * 2 + [runs[1].key] * 2 and rows["seed"].tolist() == [3, 3, 4, 4]


def test_tables_of_different_columns_and_types_stand_below_each_other(make, tmp_path):
    make(tables={"x": pd.DataFrame({"n": [1], "old": ["a"]})}, seed=1)
    make(tables={"x": pd.DataFrame({"n": [2.5], "new": [True]})}, seed="b")
    rows = Runs("a", tmp_path / "runs").results("x")
    assert rows["n"].tolist() == [1.0, 2.5] and rows["seed"].tolist() == ["1", "b"]
    assert rows["old"].isna().tolist() == [False, True] and rows["new"].isna().tolist() == [True, False]


def test_a_column_never_hides_a_parameter_or_whose_run_it_is(make, tmp_path):
    table = pd.DataFrame({"KEY": ["row"], "Seed": [7], "status": ["x"]})
    run = make(tables={"runs": table}, seed=1, status_="y", notebook="a")
    data = Database(records(tmp_path / "runs"))
    rows = data.query("SELECT * FROM result_runs")
    assert rows.iloc[0].to_dict() == {
        "notebook": "a",
        "key": run.key,
        "param_seed": 1,
        "status_": "y",
        "result_KEY": "row",
        "Seed": 7,
        "status": "x",
    }
    assert data.query("SELECT count(*) AS n FROM runs")["n"].tolist() == [1]


def test_names_that_sql_can_not_tell_apart_get_names_that_it_can(make, tmp_path):
    make(tables={"x": pd.DataFrame({"a": [1]}), "X": pd.DataFrame({"a": [2]})}, n=1, N=2, param_n=3)
    data = Database(records(tmp_path / "runs"))
    assert {name: data.query(f'SELECT a FROM "{name}"')["a"].tolist() for name in data.tables} == {
        "X": [1 + 1],
        "result_x": [1],
    }
    assert data.query("SELECT n, param_N, param_param_n FROM runs").to_numpy().tolist() == [[1, 2, 3]]


def test_runs_that_are_not_done_are_in_runs_but_their_tables_are_not_mixed_in(make, tmp_path):
    make(tables=shares(0.1), seed=0)
    make(tables=shares(0.9), seed=1, status="failed")
    data = Database(records(tmp_path / "runs"))
    assert data.query("SELECT share FROM hftp")["share"].tolist() == [0.1]
    assert data.query("SELECT status FROM runs ORDER BY seed")["status"].tolist() == ["done", "failed"]
    assert len(Runs(None, tmp_path / "runs", status=("done", "failed")).results("hftp")) == 2


def test_the_view_of_runs_holds_times_numbers_and_findings(make, tmp_path):
    make(findings=("it's one", "two"), seed=1, keep=0.5, big=2**70)
    make(notebook="b", seed=2.5)
    data = Database(records(tmp_path / "runs"))
    late = data.query("SELECT seed FROM runs WHERE started > '2026-01-01 00:00:30'")
    assert late["seed"].tolist() == [2.5], "a whole and a real number make a column of real numbers"
    assert data.query("SELECT findings[2] AS f, big FROM runs WHERE notebook = 'a'").to_numpy().tolist() == [
        ["two", str(2**70)]
    ]


def test_awkward_names_of_folders_and_results_are_no_trouble(make, tmp_path):
    root = tmp_path / "a [b] {n} * q'x"
    make(root, tables={"my.res-1 b": pd.DataFrame({"x": [1]})})
    assert Runs("a", root).results("my.res-1 b")["x"].tolist() == [1]
    assert Runs("a", root).sql('SELECT x FROM "my.res-1 b"')["x"].tolist() == [1]


def test_runs_on_object_storage_are_asked_in_the_same_way(make):
    for seed in (0, 1):
        make("memory://sql/runs", tables=shares(0.1, 0.2), seed=seed)
    runs = Runs("a", "memory://sql/runs")
    assert runs.results("hftp", ["seed", "share"], "share > 0.15").to_numpy().tolist() == [[0, 0.2], [1, 0.2]]
    assert runs.sql("SELECT sum(share) AS s FROM hftp")["s"].tolist() == [pytest.approx(0.6)]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT * FROM htfp", r'Table with name htfp does not exist.*"hftp" \(notebook, key, seed, layer, share\)'),
        ("SELECT shares FROM hftp", 'column "shares" not found.*There is: "runs"'),
        ("SELEC 1", "syntax error"),
        ("", "got no statement, expected one SELECT"),
        ("SELECT 1; SELECT 2", "got SELECT, then SELECT, expected one SELECT"),
        ("COPY (SELECT 1) TO '{file}'", "got COPY, expected one SELECT"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO '{file}'", "got EXPLAIN, expected one SELECT"),
        ("CREATE TABLE x AS SELECT 1", "got CREATE"),
        ("ATTACH '{file}'", "got ATTACH"),
        ("SET enable_external_access = true", "got SET"),
        ("INSTALL httpfs", "got LOAD"),
        ("SELECT * FROM read_text('{other}')", "operations are disabled"),
        ("SELECT * FROM read_parquet('https://example.org/x.parquet')", "operations are disabled"),
        ("SELECT * FROM glob('/*')", "operations are disabled"),
        ("SELECT * FROM table", "syntax error"),
    ],
)
def test_a_query_reads_the_runs_and_nothing_else(make, tmp_path, sql, message):
    make(tables=shares(0.5), seed=0)
    table = pd.DataFrame({"x": [1]})  # a variable of this name must not become a table
    (tmp_path / "other").write_text("secret")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        Database(records(tmp_path / "runs")).query(sql.format(file=tmp_path / "file", other=tmp_path / "other"))
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before and len(table) == 1


def test_a_variable_is_no_table(make, tmp_path):
    make(tables=shares(0.5))
    secret = pd.DataFrame({"x": [1]})
    with pytest.raises(ValueError, match="secret does not exist"):
        Database(records(tmp_path / "runs")).query("SELECT * FROM secret")
    assert len(secret) == 1


def test_a_broken_table_is_named(make, tmp_path):
    run = make(tables=shares(0.5))
    (run.folder / "results" / "hftp" / "table-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"table-0\.parquet"):
        Database(records(tmp_path / "runs")).query("SELECT * FROM hftp")


def test_a_condition_is_one_condition(make, tmp_path):
    make(tables=shares(0.5, 0.6))
    runs = Runs("a", tmp_path / "runs")
    assert len(runs.results("hftp", where="share > 0.55")) == 1
    with pytest.raises(ValueError, match="results:"):
        runs.results("hftp", where="true; SELECT 1")
    with pytest.raises(ValueError, match=r"'none' was kept by none of these runs\. There is: "):
        runs.results("none")


def test_runs_are_a_value_that_shows_itself(make, tmp_path):
    for seed in range(25):
        make(seed=seed, status="failed" if seed == 0 else "done", findings=(f"<found> {seed}",))
    runs = Runs("a", tmp_path / "runs")
    assert runs == Runs("a", tmp_path / "runs") and len(runs) == 25 and repr(runs) == "Runs of a: 24 done, 1 failed"
    page = runs._repr_html_()
    assert page.count("<tr>") == 21 and "the latest 20 below" in page and "&lt;found&gt; 24" in page
    assert runs.table()["findings"][3] == ["<found> 3"] and runs.table()["seed"].tolist() == list(range(25))
    assert runs.run(f"{24:012x}").params == {"seed": 24}
    with pytest.raises(ValueError, match="names 25 runs, expected one"):
        runs.run("0")
    assert repr(Runs("none", tmp_path / "runs")) == "Runs of none: none"
    assert Runs("none", tmp_path / "runs").table().empty


def test_a_parameter_that_is_called_like_a_fact_of_the_run_is_shown_beside_it(make, tmp_path):
    for status in ("fast", "slow"):
        make(seconds=60, key=status)
    page = Runs("a", tmp_path / "runs")._repr_html_()
    assert "<th>seconds</th><th>key</th>" in page and "<td>1.5</td><td>fast</td>" in page


def test_equal_runs_of_other_code_are_refused_or_only_the_latest_counts(make, tmp_path):
    for share in (0.1, 0.9):
        make(tables=shares(share), seed=0)
    with pytest.raises(ValueError, match="2 rows share one seed and one layer; they are of runs with equal parameters"):
        Runs("a", tmp_path / "runs").plot("hftp", "share", "layer")
    figure = Runs("a", tmp_path / "runs", latest=True).plot("hftp", "share", "layer")
    assert list(figure.data[0].y) == [0.9]


def test_an_interval_is_students_and_covers_the_mean_as_often_as_it_says():
    """Of 4 draws; 2000 intervals of true level .95 hold the mean in .95 +- 3 sqrt(.95 x .05 / 2000) = .015."""
    draws = np.random.default_rng(0).normal(size=(2000, 4))
    held = [low <= 0 <= high for _, low, high in map(mean_interval, draws)]
    assert abs(np.mean(held) - 0.95) < 0.015
    mean, low, high = mean_interval(np.array([1.0, 2.0, 3.0]))
    half = student.ppf(0.975, 2) / np.sqrt(3)  # the standard deviation of 1, 2, 3 is 1
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert np.isnan(mean_interval(np.array([1.0]))[1:]).all()


def seeds_table(n_seeds: int) -> pd.DataFrame:
    rows = [(seed, keep, seed + keep) for seed in range(n_seeds) for keep in (0.25, 0.5)]
    return pd.DataFrame(rows, columns=["seed", "keep", "y"])


def test_means_over_seeds_do_not_depend_on_the_order_of_rows():
    table = seeds_table(3)
    means = over_seeds(table, "y", ["keep"])
    assert means["y"].tolist() == [1.25, 1.5] and means["n_seeds"].tolist() == [3, 3]
    again = over_seeds(table.iloc[::-1], "y", ["keep"]).sort_values("keep", ignore_index=True)
    pd.testing.assert_frame_equal(means, again, rtol=1e-12)  # the order of a sum of three


def test_a_missing_value_is_not_counted_as_a_seed():
    table = seeds_table(3)
    table.loc[0, "y"] = np.nan
    assert over_seeds(table, "y", ["keep"]).set_index("keep")["n_seeds"].to_dict() == {0.25: 2, 0.5: 3}


def test_a_column_without_a_number_is_refused_where_it_should_be_drawn():
    means = over_seeds(seeds_table(2).assign(y=np.nan), "y", ["keep"])
    assert means.empty
    with pytest.raises(ValueError, match="y is NaN in every row, expected a number somewhere"):
        seeds_figure(means, "keep", "y")


def test_what_else_differs_is_named_and_not_averaged_away():
    with pytest.raises(
        ValueError, match=r"up to 2 rows share one seed and one seed_; they differ in keep. Choose with"
    ):
        over_seeds(seeds_table(2).assign(seed_=1), "y", ["seed_"])
    with pytest.raises(ValueError, match="got column 'z', expected one of seed, keep, y"):
        over_seeds(seeds_table(2), "z", ["keep"])
    with pytest.raises(ValueError, match=r"column y holds .*, expected numbers"):
        over_seeds(seeds_table(2).assign(y="text"), "y", ["keep"])


@pytest.mark.parametrize(
    ("n_seeds", "words"), [(1, "one seed only, so there is no interval"), (3, "mean of 3 seeds with 95 % intervals")]
)
def test_the_title_says_on_how_many_seeds_the_figure_rests(n_seeds, words):
    figure = seeds_figure(over_seeds(seeds_table(n_seeds), "y", ["keep"]), "keep", "y")
    title = str(figure.layout.title.text).replace("<br>", " ")
    assert title.startswith("y is highest at keep 0.5") and title.endswith(words)
    assert (len(figure.data) == 2) == (n_seeds > 1), "a band stands where there is an interval"


def test_names_get_points_and_a_colour_has_its_name(make, tmp_path):
    for seed in range(3):
        for model in ("organism", "twin"):
            make(tables=shares(0.1 * seed, 0.2, layer=1), seed=seed, model=model)
    figure = Runs("a", tmp_path / "runs").plot("hftp", "share", "model", "layer")
    assert {trace.mode for trace in figure.data} == {"markers"} and figure.layout.legend.title.text == "layer"
    assert figure.data[0].error_y.array is not None
    with pytest.raises(ValueError, match="no row of hftp is left"):
        Runs("a", tmp_path / "runs").plot("hftp", "share", "model", where="layer = 9")


def test_one_question_goes_over_hundreds_of_runs(make, tmp_path):
    table = shares(0.1, 0.2)
    for seed in range(300):
        make(tables=table, seed=seed)
    assert Runs("a", tmp_path / "runs").sql("SELECT count(*) AS n FROM hftp")["n"].tolist() == [600]


def test_root_may_be_a_path_or_text(make, tmp_path):
    make(seed=0)
    assert len(Runs("a", str(tmp_path / "runs"))) == len(Runs("a", Path(tmp_path / "runs"))) == 1
