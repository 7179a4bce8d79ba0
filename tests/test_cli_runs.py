"""`workbench runs ...` and `workbench rerun`: what is printed for people and for programs, and the exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from workbench.cli import main, saying
from workbench.cli.saying import bytes_said, print_table
from workbench.run import Run, all_runs

KEYS = ("aa0000000000", "ab0000000000", "ba0000000000")


@pytest.fixture
def root_of_runs(tmp_path) -> Path:
    """Two done runs of one notebook and a failed one of another."""
    for number, (notebook, key) in enumerate(zip("xxy", KEYS, strict=True)):
        run = Run(tmp_path / notebook / key)
        folder = run.folder / "results" / "shares"
        folder.mkdir(parents=True)
        pd.DataFrame({"layer": [0, 1], "share": [0.1 * number, 0.5]}).to_parquet(
            folder / "table-0.parquet", index=False
        )
        failed = notebook == "y"
        error = {"kind": "cell failed", "cell": 2, "source": "1 / 0", "lines": ["ZeroDivisionError: \x1b[31mno\x1b[0m"]}
        facts = {"status": "failed" if failed else "done", "started": f"2026-01-0{number + 1}T10:00:00+00:00"}
        facts |= {"seconds": 1.25, "command": f"workbench run {notebook}.ipynb -p seed={number}", "host": "h"}
        facts |= {"artefacts": {"results/shares/table-0.parquet": {"bytes": 2048, "sha256": ""}}}
        facts |= {"error": error} if failed else {}
        environment = {"versions": {"torch": "2.0"}, "cpu": "chip", "cpus": 2, "lock_sha256": "c" * 64}
        environment |= {"git": {"commit": "d" * 40, "dirty": True}, "variables": {"OMP_NUM_THREADS": "2"}}
        params = {"seed": number, "model": "organism"}
        for name, data in {"manifest": facts, "params": params, "environment": environment}.items():
            (run.folder / f"{name}.json").write_text(json.dumps(data))
        if not failed:
            run.finding(f"found {number} \t of it")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints; its exit code must be `code`."""
    assert main([str(word) for word in words]) == code
    return capsys.readouterr().out


def test_the_list_has_a_column_for_what_varies_and_filters(root_of_runs, capsys):
    lines = said(capsys, "runs", "list", "--runs", root_of_runs).splitlines()
    assert lines[0].split() == ["notebook", "key", "status", "started", "seconds", "seed", "finding"]
    assert lines[1].split() == ["x", KEYS[0], "done", "2026-01-01", "10:00:00", "1.2", "0", "found", "0", "of", "it"]
    assert len(lines) == 4 and "\x1b" not in "".join(lines)

    def keys(*words: str) -> list[str]:
        return [
            line.split()[1] for line in said(capsys, "runs", "list", *words, "--runs", root_of_runs).splitlines()[1:]
        ]

    assert keys("x") == [*KEYS[:2]] and keys("--status", "failed") == [KEYS[2]] and keys("none") == []
    assert keys("-p", "seed=1") == [KEYS[1]] and keys("--since", "2026-01-02") == [*KEYS[1:]]


def test_the_list_for_programs_holds_everything(root_of_runs, capsys):
    rows = json.loads(said(capsys, "runs", "list", "--json", "--runs", root_of_runs))
    assert [row["key"] for row in rows] == [*KEYS] and rows[0]["params"] == {"seed": 0, "model": "organism"}
    assert rows[2]["error"]["cell"] == 2 and rows[0]["findings"] == ["found 0 of it"] and rows[1]["command"]


def test_a_run_is_shown_with_all_that_is_known(root_of_runs, capsys):
    shown = said(capsys, "runs", "show", "aa", "--runs", root_of_runs)
    for text in (KEYS[0], "workbench run x.ipynb -p seed=0", "2026-01-01 10:00:00 UTC, 1.2 s, on h", "model  organism"):
        assert text in shown
    for text in (
        "torch 2.0",
        "chip, 2 cores, no GPU",
        "dddddddddddd, with changes",
        "cccccccccccc",
        "found 0 of it",
        "2.0 KiB",
    ):
        assert text in shown
    failed = said(capsys, "runs", "show", "y", "--runs", root_of_runs)
    assert "failed in cell 2: cell failed" in failed and "  1 / 0\n" in failed


def test_diff_exits_with_0_for_equal_and_1_for_different_runs(root_of_runs, capsys):
    assert "equal: " in said(capsys, "runs", "diff", "aa", "aa", "--runs", root_of_runs)
    assert "seed: 0 and 1" in said(capsys, "runs", "diff", "aa", "ab", "--runs", root_of_runs, code=1)


def test_sql_answers_as_a_table_csv_or_json(root_of_runs, capsys):
    query = "SELECT seed, share, NULL AS nothing FROM shares WHERE layer = 0 ORDER BY seed"
    table = said(capsys, "runs", "sql", query, "--runs", root_of_runs).splitlines()
    assert [line.split() for line in table] == [["seed", "share", "nothing"], ["0", "0"], ["1", "0.1"]]
    csv = pd.read_csv(io.StringIO(said(capsys, "runs", "sql", query, "--csv", "--runs", root_of_runs)))
    assert csv["share"].tolist() == [0.0, 0.1] and csv["nothing"].isna().all()
    rows = json.loads(said(capsys, "runs", "sql", query, "--json", "--runs", root_of_runs))
    assert rows[1] == {"seed": 1, "share": 0.1, "nothing": None}
    empty = said(capsys, "runs", "sql", "SELECT 1 AS a WHERE false", "--runs", root_of_runs)
    assert empty == "a\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs", "show", "zz"], "workbench: runs: 'zz' names 0 runs, expected one"),
        (["runs", "show", "a"], "workbench: runs: 'a' names 2 runs, expected one; give more of the key"),
        (["runs", "list", "-p", "seed"], "workbench: -p: got 'seed', expected NAME=VALUE."),
        (
            ["runs", "list", "-p", "sead=1"],
            "workbench: parameter sead: no run has one of that name. Known: seed, model.",
        ),
        (["runs", "list", "--since", "then"], "workbench: time: got 'then', expected an age"),
        (
            ["runs", "sql", "SELECT * FROM share"],
            "workbench: sql: Catalog Error: Table with name share does not exist!",
        ),
        (["runs", "sql", "DROP TABLE runs"], "workbench: sql: got DROP, expected one SELECT"),
        (["runs", "gc", "aa"], "workbench: gc: 'aa' is the key of 0 runs, expected one"),
        (["rerun", "aa"], "workbench: rerun: aa0000000000 stored no notebook"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(root_of_runs, capsys, words, message):
    assert main([*words, "--runs", str(root_of_runs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_gc_says_first_and_removes_only_with_yes(root_of_runs, capsys):
    for words in ((), ("--dry-run",), ("--yes", "--dry-run")):
        output = said(capsys, "runs", "gc", *words, "--runs", root_of_runs)
        assert KEYS[2] in output and "1 item" in output and output.endswith("can go (--yes removes)\n")
        assert len(all_runs(root_of_runs)) == 3
    assert said(capsys, "runs", "gc", "--yes", "--runs", root_of_runs).endswith("removed\n")
    assert [run.key for run in all_runs(root_of_runs)] == [*KEYS[:2]]
    said(capsys, "runs", "gc", KEYS[0], "--yes", "--runs", root_of_runs)
    assert [run.key for run in all_runs(root_of_runs)] == [KEYS[1]]
    assert said(capsys, "runs", "gc", "--runs", root_of_runs) == "0 items, 0 bytes can go (--yes removes)\n"


def test_a_gallery_prints_its_path(root_of_runs, capsys, tmp_path):
    output = said(capsys, "runs", "gallery", "--all", "--runs", root_of_runs)
    assert output == f"gallery of 3 runs, opens offline: {root_of_runs / 'gallery' / 'index.html'}\n"
    said(capsys, "runs", "gallery", "aa", "--out", tmp_path / "else", "--runs", root_of_runs)
    assert len(list((tmp_path / "else" / "runs").iterdir())) == 1
    assert len(all_runs(root_of_runs)) == 3, "its pages are no runs"


def test_rerun_exits_with_0_where_the_same_comes_out_and_1_where_it_does_not(tmp_path, write_notebook, capsys):
    file = tmp_path / "file"
    file.write_text("old")
    code = (
        f"from pathlib import Path\nfrom workbench import Run\nRun.start('x').finding(Path({str(file)!r}).read_text())"
    )
    notebook = write_notebook(tmp_path / "x.ipynb", code)
    said(capsys, "run", notebook, "--runs", tmp_path / "runs")
    same = said(capsys, "rerun", "x", "--runs", tmp_path / "runs")
    assert "equal: " in same and "the new one is kept in" in same
    file.write_text("new")
    assert "only the second: new" in said(capsys, "rerun", "x", "--runs", tmp_path / "runs", code=1)


def test_a_line_never_runs_over_the_edge_of_a_terminal_nor_moves_its_cursor(capsys, monkeypatch):
    print_table(["a", "b"], [["x" * 100, "y\n\x1b[2J"]])
    assert capsys.readouterr().out.splitlines()[1] == "x" * 100 + "  y  [2J"
    monkeypatch.setattr(saying.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(saying.shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    print_table(["a", "b"], [["x" * 100, "y"]])
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [20, 20]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_bytes_are_said_in_a_fitting_unit(size, text):
    assert bytes_said(size) == text


def test_a_list_needs_no_model_and_no_table_library(root, root_of_runs):
    code = (
        "import sys; from workbench.cli import main; main(['runs', 'list', '--runs', sys.argv[1]]); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root_of_runs)], cwd=root, capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.splitlines()[-1].split()) & {
        "torch",
        "transformers",
        "pandas",
        "duckdb",
        "plotly",
        "dask",
    }
