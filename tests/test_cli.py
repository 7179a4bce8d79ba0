"""The command line: exit codes, one-line errors, quick help, closed pipes and narrow terminals."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from workbench.cli import main
from workbench.cli import runs as runs_command
from workbench.cli.saying import print_findings
from workbench.run import Run
from workbench.runs.records import chosen_runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_notebook):
    """A folder of runs with one finished run, and its notebook."""
    folder = tmp_path_factory.mktemp("cli")
    notebook = write_notebook(
        folder / "greet.ipynb", "from workbench.run import Run\nRun.start('x').finding(f'n={n} ≥ 3')"
    )
    assert main(["run", str(notebook), "--runs", str(folder / "runs"), "-p", "n=5"]) == 0
    return folder / "runs", notebook


def test_a_run_prints_its_folder_and_findings_and_is_not_made_twice(finished, capsys):
    runs, notebook = finished
    assert main(["run", str(notebook), "--runs", str(runs), "-p", "n=5"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("done before, nothing to compute") and "n=5 ≥ 3" in output
    assert len(list(runs.glob("greet/[!.]*"))) == 1


def test_a_failed_run_exits_1_and_prints_the_cell_and_its_last_lines(tmp_path, write_notebook, capsys):
    notebook = write_notebook(tmp_path / "bad.ipynb", "x = 0", "1 / x")
    assert main(["run", str(notebook), "--runs", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("failed in cell 3: cell failed") and "  1 / x\n" in message
    assert message.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.ipynb"], "workbench: none.ipynb: no such notebook."),
        (
            ["run", "{notebook}", "-p", "zz=1"],
            "workbench: parameter zz: this notebook has none of that name.",
        ),
        (["run", "{notebook}", "-p", "n"], "workbench: -p: got 'n', expected NAME=VALUE."),
        (["run", "{notebook}", "-p", "n=1", "-p", "n=2"], "workbench: -p: n is given twice"),
        (
            ["runs", "report", "nothing", "--runs", "{runs}"],
            "workbench: runs: 'nothing' names 0 runs, expected one",
        ),
        (["runs", "report", "--runs", "{runs}/none"], "workbench: --runs: there is no folder"),
        (["runs", "report", "--runs", "{runs}", "--out", "{runs}"], "workbench: report: {runs} is a folder"),
        (["lab", "no-such-folder"], "workbench: no-such-folder: no such folder."),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(finished, capsys, words, message):
    names = {"runs": finished[0], "notebook": finished[1]}
    assert main([word.format(**names) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message.format(**names)) and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["run", "a.ipynb", "--timeout", "-1"], ["run", "a.ipynb", "--timeout", "x"]]
)
def test_a_wrong_command_line_shows_the_usage(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "usage: workbench" in capsys.readouterr().err


def test_an_interruption_exits_130(monkeypatch, finished):
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs_command, "list_runs", interrupted)
    assert main(["runs", "list"]) == 130


def test_runs_are_listed_with_key_status_and_finding(finished, capsys):
    assert main(["runs", "list", "--runs", str(finished[0])]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["notebook", "key", "status", "started", "seconds", "finding"]
    assert row.split()[0] == "greet" and row.split()[2] == "done" and row.endswith("n=5 ≥ 3")


def test_a_report_prints_its_path_and_the_findings(finished, capsys):
    assert main(["runs", "report", "--runs", str(finished[0])]) == 0
    output = capsys.readouterr().out
    assert str(finished[0] / "report.html") in output and "n=5 ≥ 3" in output


def test_runs_are_chosen_by_key_by_its_start_or_as_a_notebooks_latest(monkeypatch):
    def fake(notebook: str, key: str, status: str = "done") -> SimpleNamespace:
        return SimpleNamespace(notebook=notebook, key=key, status=status)

    runs = [
        fake("a", "11aa"),
        fake("a", "22aa"),
        fake("a", "33aa", "interrupted"),
        fake("b", "11bb", "failed"),
    ]
    assert chosen_runs(runs, []) == [runs[1], runs[3]]
    assert chosen_runs(runs, ["a"]) == [runs[1]] and chosen_runs(runs, ["33"]) == [runs[2]]
    assert chosen_runs(runs, ["b", "11a"]) == [runs[3], runs[0]] and chosen_runs(runs, [], every=True) == runs
    with pytest.raises(ValueError, match="'11' names 2 runs, expected one; give more of the key"):
        chosen_runs(runs, ["11"])


def test_five_findings_are_shown_and_every_run_has_its_first(tmp_path, capsys):
    runs = [Run(tmp_path / name) for name in "abc"]
    for run in runs:
        run.folder.mkdir()
        for n in range(3):
            run.finding(f"{run.key}{n}")
    print_findings(runs)
    assert capsys.readouterr().out.split() == ["a0", "a1", "b0", "b1", "c0"]


def test_help_imports_nothing_heavy(root):
    lines = [
        "import sys, workbench.cli",
        "try: workbench.cli.main(['--help'])",
        "except SystemExit: print(*sys.modules)",
    ]
    words = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = {"torch", "numpy", "pandas", "plotly", "transformers", "papermill", "nbformat", "jupyter_client"}
    assert "argparse" in loaded and not loaded & heavy


def test_planning_a_run_imports_no_model_library(root, finished):
    code = f"import sys; from workbench.run import plan; plan({str(finished[1])!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "papermill"}


def test_a_closed_pipe_and_an_ascii_terminal_are_no_errors(root, finished):
    command = f'"{sys.executable}" -m workbench.cli runs list --runs "{finished[0]}"'
    piped = subprocess.run(["sh", "-c", f"{command} | true"], cwd=root, capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stderr == ""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    narrow = subprocess.run(["sh", "-c", command], cwd=root, env=environment, capture_output=True, text=True)
    assert narrow.returncode == 0 and "n=5 ? 3" in narrow.stdout


def test_doctor_prints_versions_devices_and_the_card_of_a_model(capsys):
    assert main(["doctor", "tiny:llama"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("versions  python") and "\ncpu " in output and "\ncuda" in output and "llama" in output


def test_doctor_refuses_what_is_no_model(capsys):
    assert main(["doctor", "./no/such/model"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("workbench: ") and "no/such/model" in error
