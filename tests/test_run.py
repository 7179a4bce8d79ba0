"""Runs: what is refused, what is recorded, what is never computed twice, and what a kill leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from workbench import keys, leases
from workbench.leases import LeaseLost, held
from workbench.parameters import declared, merged
from workbench.result import Result
from workbench.run import Plan, Run, all_runs, execute, plan
from workbench.signature import signature_of

GREET = """
import os
from workbench.run import Run
run = Run.start("any name")
run.finding(f"{n} of {name}")
print(os.environ["PYTHONHASHSEED"], os.environ["PLOTLY_RENDERER"], os.environ["OMP_NUM_THREADS"])
run
"""
COUNT = 'with open("{file}", "a") as file: file.write("x")'
SLEEP = 'import os, pathlib, time; pathlib.Path("{file}").write_text(str(os.getpid())); time.sleep(60)'


@dataclass(frozen=True, eq=False, kw_only=True)
class Counted(Result):
    n: int
    columns = ("n",)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"n": [self.n]})

    def plot(self, **view: object) -> go.Figure:
        return go.Figure(layout={"title": {"text": f"There are {self.n}"}})


@pytest.fixture
def start(tmp_path, root) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Path]]]:
    """Starts `workbench run` in a process of its own; gives the process and the file with its messages."""
    with ExitStack() as undo:

        def begin(notebook: Path, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
            messages = tmp_path / f"messages-{time.monotonic_ns()}"
            words = [
                sys.executable,
                "-m",
                "workbench.cli",
                "run",
                str(notebook),
                "--runs",
                str(tmp_path / "runs"),
            ]
            file = undo.enter_context(messages.open("wb"))
            process = subprocess.Popen(words, cwd=root, env=os.environ | environment, stderr=file, stdout=file)
            undo.callback(process.wait)
            undo.callback(process.kill)
            return process, messages

        yield begin


@pytest.fixture(scope="module")
def greeted(tmp_path_factory, write_notebook) -> Run:
    """One finished run, in a folder whose name holds what shells, templates and format strings trip over."""
    folder = tmp_path_factory.mktemp("a b {n} $HOME")
    return execute(write_notebook(folder / "greet.ipynb", GREET), {"n": "4"}, runs=folder / "r u n s", threads=1)


def test_a_run_is_done_and_its_outputs_are_kept(greeted):
    cells = json.loads((greeted.folder / "notebook.ipynb").read_text())["cells"]
    assert greeted.status == "done" and greeted.notebook == "greet" and greeted.findings == ["4 of a"]
    assert "".join(cells[-1]["outputs"][0]["text"]) == "0 plotly_mimetype 1\n"
    assert greeted.params == {"n": 4, "rate_hz": 1.5, "name": "a", "many": False}
    assert greeted.command.endswith("-p n=4") and greeted.key in "".join(cells[-1]["outputs"][1]["data"]["text/html"])


def test_the_manifest_states_every_file_with_its_true_hash_and_size(greeted):
    artefacts = greeted.manifest["artefacts"]
    found = {path.relative_to(greeted.folder).as_posix() for path in greeted.folder.rglob("*") if path.is_file()}
    assert set(artefacts) == found - {"manifest.json"}
    assert {"params.json", "environment.json", "findings.json", "notebook.ipynb"} == set(artefacts)
    for name, fact in artefacts.items():
        content = (greeted.folder / name).read_bytes()
        assert fact == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_the_environment_is_recorded(greeted):
    recorded = json.loads((greeted.folder / "environment.json").read_text())
    assert recorded["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert recorded["variables"]["PYTHONHASHSEED"] == "0" and len(recorded["lock_sha256"]) == 64
    assert {"torch", "numpy", "papermill", "pyarrow"} <= set(recorded["versions"])
    assert recorded["cpu"] and recorded["cpus"] >= 1 and isinstance(recorded["gpus"], list)
    assert keys.key_of(recorded["key_parts"]) == greeted.key, "what the key was made of is recorded"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"naem": "b"}, "parameter naem: this notebook has none of that name. Did you mean name?"),
        ({"zzz": "1"}, "parameter zzz: this notebook has none of that name. Known: n, rate_hz, name, many."),
        ({"n": "three"}, "parameter n: got 'three', expected int."),
        ({"n": 3.5}, "parameter n: got 3.5, expected int."),
        ({"n": True}, "parameter n: got True, expected int."),
        ({"rate_hz": "fast"}, "parameter rate_hz: got 'fast', expected float."),
        ({"many": "yes"}, "parameter many: got 'yes', expected bool."),
        ({"name": 3}, "parameter name: got 3, expected str."),
        ({"n": None}, "parameter n: got None, expected int."),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(tmp_path, write_notebook, given, message):
    notebook = write_notebook(tmp_path / "greet.ipynb", GREET)
    with pytest.raises(ValueError) as caught:
        execute(notebook, given, runs=tmp_path / "runs")
    assert str(caught.value) == message
    assert not (tmp_path / "runs").exists()


def test_files_that_are_no_parametrised_notebook_are_refused(tmp_path, write_notebook):
    (tmp_path / "text.ipynb").write_text("hello")
    (tmp_path / "other.ipynb").write_text('{"worksheets": []}')
    (tmp_path / "bytes.ipynb").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "shape.ipynb").write_text('{"cells": [{"cell_type": "code", "source": "1", "metadata": null}]}')
    (tmp_path / "tags.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "source": "1", "metadata": {"tags": null}}]}'
    )
    with pytest.raises(FileNotFoundError, match="no such notebook"):
        plan(tmp_path / "none.ipynb")
    for name in ("text", "other", "bytes", "shape"):
        with pytest.raises(ValueError, match="not a notebook"):
            plan(tmp_path / f"{name}.ipynb")
    for path in (write_notebook(tmp_path / "bare.ipynb", "1", params=None), tmp_path / "tags.ipynb"):
        with pytest.raises(ValueError, match="0 code cells are tagged 'parameters', expected one"):
            plan(path)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("n: int = 3\nimport os", "line 2: got 'import os', expected NAME: TYPE = LITERAL"),
        ("n: int = len('abc')", "line 1: got .* expected NAME: TYPE = LITERAL"),
        ("n: int = {[]: 1}", "line 1: got .* expected NAME: TYPE = LITERAL"),
        ("n: list[int] = [1]", r"n is declared list\[int\], expected one of int, float, str, bool"),
        ("n: int = '3'", "parameter n: got '3', expected int"),
        ("n = m = 3", "expected NAME: TYPE = LITERAL"),
        ("n: int", "expected NAME: TYPE = LITERAL"),
        ("n: int = (", "line 1 is not Python"),
        ("n += 1", "expected NAME: TYPE = LITERAL"),
    ],
)
def test_a_parameters_cell_holds_typed_scalars_only(cell, message):
    with pytest.raises(ValueError, match=message):
        declared(cell)


def test_text_becomes_the_declared_type():
    lines = ['"""text"""', "n: int = 1", "x: float = 2", "flag: bool = True", "name: str = ''"]
    cell = declared("\n".join([*lines, "limit: int | None = None", "k = 7"]))
    assert merged(cell, {}) == {"n": 1, "x": 2.0, "flag": True, "name": "", "limit": None, "k": 7}
    text = {"n": "-3", "x": "1e-3", "flag": "false", "name": "3", "limit": "5", "k": "8"}
    assert merged(cell, text) == {"n": -3, "x": 0.001, "flag": False, "name": "3", "limit": 5, "k": 8}
    assert merged(cell, {"limit": "None"})["limit"] is None and type(merged(cell, {"x": 4})["x"]) is float


def test_the_key_holds_what_decides_the_numbers_and_nothing_else(tmp_path, write_notebook, monkeypatch):
    def key(*code: str, given: dict | None = None, **settings: str) -> str:
        return plan(write_notebook(tmp_path / "k.ipynb", *code, **settings), given, runs=tmp_path).run.key

    base = key("1")
    assert key("1", prose="# Another title?") == base
    assert key("1", given={"n": "3"}) == base, "a default spelled out is the same run"
    assert key("1  \n") == base, "white space at the end of a line decides nothing"
    assert len({base, key("2"), key("1", "1"), key("1", given={"n": 4}), key("1", given={"name": "b"})}) == 5
    monkeypatch.setattr(keys, "package_digest", lambda: "another source")
    assert key("1") != base


def test_the_parts_of_a_key_tell_which_of_them_changed(tmp_path, write_notebook):
    def parts(*code: str, **given: str) -> dict:
        return dict(plan(write_notebook(tmp_path / "k.ipynb", *code), given, runs=tmp_path).key_parts)

    base, changed = parts("1", "2"), parts("1", "3", n="4")
    assert [a == b for a, b in zip(base["code"], changed["code"], strict=True)] == [True, False]
    assert {name for name in base["params"] if base["params"][name] != changed["params"][name]} == {"n"}
    assert keys.run_key(["1", "2"], {"n": 1}) == keys.key_of(keys.key_parts(["1", "2"], {"n": 1}))


def test_the_key_knows_the_files_behind_a_parameter(tmp_path, write_notebook, monkeypatch):
    notebook, model = write_notebook(tmp_path / "k.ipynb"), tmp_path / "model"
    model.mkdir()

    def key(name: str) -> str:
        return plan(notebook, {"name": name}, runs=tmp_path).run.key

    (model / "config.json").write_text("{}")
    first = key(str(model))
    (model / "config.json").touch()
    assert key(str(model)) == first, "the time of a file decides nothing"
    (model / "model.safetensors").write_bytes(b"1")
    assert key(str(model)) != first
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    before = key("owner/name")
    ref = tmp_path / "hub" / "models--owner--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("abc123")
    assert key("owner/name") != before


def test_the_package_digest_sees_every_source_file(tmp_path, monkeypatch):
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(keys, "PACKAGE", tmp_path)
    first = keys.package_digest()
    (tmp_path / "__pycache__" / "a.pyc").write_text("1")
    (tmp_path / "card.md").write_text("prose")
    assert keys.package_digest() == first
    (tmp_path / "a.py").write_text("22")
    assert keys.package_digest() != first


def test_the_same_key_is_computed_once_unless_forced(tmp_path, write_notebook):
    file = tmp_path / "count"
    notebook = write_notebook(tmp_path / "count.ipynb", COUNT.format(file=file))
    first = execute(notebook, runs=tmp_path / "runs").manifest
    assert execute(notebook, runs=tmp_path / "runs").manifest == first and file.read_text() == "x"
    forced = execute(notebook, runs=tmp_path / "runs", force=True)
    assert forced.status == "done" and file.read_text() == "xx"
    assert not forced.folder.with_name(f".{forced.key}.previous").exists() and all_runs(tmp_path / "runs") == [forced]


def test_a_forced_run_that_fails_leaves_the_old_one_whole(tmp_path, write_notebook):
    file = tmp_path / "fail"
    notebook = write_notebook(tmp_path / "once.ipynb", f"import os\nassert not os.path.exists({str(file)!r})")
    done = execute(notebook, runs=tmp_path / "runs").manifest
    file.touch()
    failed = execute(notebook, runs=tmp_path / "runs", force=True)
    assert failed.status == "failed" and Run(failed.folder.with_name(f".{failed.key}.previous")).manifest == done
    file.unlink()
    assert execute(notebook, runs=tmp_path / "runs").status == "done", "a failed run is made again"


def test_a_failing_cell_is_recorded_with_its_source_and_last_lines(tmp_path, write_notebook):
    run = execute(write_notebook(tmp_path / "bad.ipynb", "x = 1", "print('here')\n1 / 0", "x"), runs=tmp_path / "runs")
    error = run.manifest["error"]
    assert run.status == "failed" and (error["kind"], error["cell"]) == ("cell failed", 3)
    assert error["source"].endswith("1 / 0") and error["lines"][-1] == "ZeroDivisionError: division by zero"
    assert "here" in (run.folder / "notebook.ipynb").read_text() and "notebook.ipynb" in run.manifest["artefacts"]


def test_a_disk_that_fills_up_is_recorded_also_where_it_cut_the_notebook(tmp_path, write_notebook, monkeypatch):
    def cut(planned: Plan, *_: object) -> None:
        (planned.run.folder / "notebook.ipynb").write_text('{"cells": [')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workbench.run._papermill", cut)
    run = execute(write_notebook(tmp_path / "full.ipynb", "1"), runs=tmp_path / "runs")
    error = run.manifest["error"]
    assert run.status == "failed" and (error["kind"], run.manifest["cell_seconds"]) == ("runner failed", None)
    assert error["lines"] == ["OSError: [Errno 28] No space left on device"]


def test_a_killed_kernel_is_a_failed_run(tmp_path, write_notebook):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    run = execute(write_notebook(tmp_path / "dies.ipynb", "1", code, "2"), runs=tmp_path / "runs")
    assert run.status == "failed" and run.manifest["error"]["kind"] == "kernel died"
    assert run.manifest["error"]["cell"] == 3 and run.manifest["error"]["source"] == code


def test_the_last_words_of_a_crashed_kernel_are_kept(tmp_path, write_notebook):
    run = execute(write_notebook(tmp_path / "crashes.ipynb", "import os; os.abort()"), runs=tmp_path / "runs")
    error = run.manifest["error"]
    assert error["kind"] == "kernel died" and "Fatal Python error: Aborted" in error["lines"]


def test_leaving_the_kernel_in_the_middle_is_not_success(tmp_path, write_notebook):
    run = execute(write_notebook(tmp_path / "exits.ipynb", "import sys; sys.exit(0)", "2"), runs=tmp_path / "runs")
    assert run.status == "failed" and run.manifest["error"]["cell"] == 2


def test_a_run_out_of_time_fails_and_its_kernel_ends(tmp_path, write_notebook):
    file = tmp_path / "pid"
    notebook = write_notebook(tmp_path / "slow.ipynb", SLEEP.format(file=file))
    run = execute(notebook, runs=tmp_path / "runs", timeout=4)
    assert run.status == "failed" and run.manifest["error"]["kind"] == "out of time"
    assert file.exists() and not _alive(int(file.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_no_kernel(tmp_path, write_notebook, start, number):
    file = tmp_path / "pid"
    process, messages = start(write_notebook(tmp_path / "slow.ipynb", SLEEP.format(file=file)))
    _wait_for(file)
    process.send_signal(number)
    assert process.wait(30) == 130 and messages.read_text() == "interrupted\n"
    (run,) = all_runs(tmp_path / "runs")
    assert run.status == "interrupted" and run.manifest["ended"] and (run.folder / "notebook.ipynb").exists()
    assert not _alive(int(file.read_text()))


def test_a_run_whose_runner_was_killed_is_made_again(tmp_path, write_notebook, start):
    file = tmp_path / "pid"
    code = SLEEP.replace("time.sleep(60)", f"time.sleep(60 * os.path.exists({str(tmp_path / 'slow')!r}))")
    notebook = write_notebook(tmp_path / "slow.ipynb", code.format(file=file))
    (tmp_path / "slow").touch()
    process, _ = start(notebook)
    _wait_for(file)
    process.kill()
    process.wait(30)
    (run,) = all_runs(tmp_path / "runs")
    assert run.manifest["status"] == "running" and run.status == "lost"
    (tmp_path / "slow").unlink()
    os.kill(int(file.read_text()), signal.SIGKILL)  # a kernel would notice by itself, seconds later
    planned = plan(notebook, runs=tmp_path / "runs")
    made = dataclasses.replace(planned, run=run).execute()  # the same run, also while the package is edited
    assert made == run and run.status == "done"
    (earlier,) = run.manifest["earlier"]
    assert run.manifest["attempt"] == 2 and earlier["reason"] == "lost" and earlier["host"] == run.manifest["host"]


@pytest.mark.parametrize("moment", [".*.lease/*", "*/params.json", "*/manifest.json", "*/findings.json"])
def test_a_kill_of_the_runner_at_any_moment_leaves_a_true_manifest(tmp_path, write_notebook, start, moment):
    process, _ = start(write_notebook(tmp_path / "greet.ipynb", GREET))
    while process.poll() is None and not any((tmp_path / "runs").glob(f"greet/{moment}")):
        time.sleep(0.001)
    process.kill()
    process.wait(30)
    for run in all_runs(tmp_path / "runs"):
        assert run.status in ("lost", "done")
        for name in run.manifest.get("artefacts", {}):
            assert (run.folder / name).exists()
    planned = plan(tmp_path / "greet.ipynb", runs=tmp_path / "runs")
    assert planned.execute().status == "done"


def test_a_run_at_work_is_running_for_others(tmp_path, write_notebook, start):
    file = tmp_path / "pid"
    process, _ = start(write_notebook(tmp_path / "slow.ipynb", SLEEP.format(file=file)))
    _wait_for(file)
    (run,) = all_runs(tmp_path / "runs")
    assert run.status == "running" and held(run.folder).pid == process.pid == run.manifest["pid"]


def test_a_run_that_another_took_over_stops_and_records_nothing(tmp_path, write_notebook, monkeypatch):
    monkeypatch.setattr("workbench.files.fcntl", None)  # as between two machines
    monkeypatch.setattr("workbench.run.lease", functools.partial(leases.lease, ttl_s=0.8))
    file = tmp_path / "pid"
    planned = plan(write_notebook(tmp_path / "slow.ipynb", SLEEP.format(file=file)), runs=tmp_path / "runs")
    seen = []

    def take_over() -> None:
        _wait_for(file)
        place = leases._leases_of(planned.run.folder)
        top = leases._top(place)
        leases._write(place, dataclasses.replace(top, number=top.number + 1, owner="another", pid=1))
        (planned.run.folder / "manifest.json").write_text('{"status": "running", "host": "another"}')
        seen.append(True)

    other = threading.Thread(target=take_over)
    other.start()
    with pytest.raises(LeaseLost, match=r"lease lost: process 1 on .* took over"):
        planned.execute()
    other.join()
    assert seen and planned.run.manifest == {"status": "running", "host": "another"}
    assert not _alive(int(file.read_text()))


def test_the_manifest_tells_who_made_it_how_often_and_for_how_long(greeted, tmp_path, write_notebook, monkeypatch):
    manifest = greeted.manifest
    assert (manifest["attempt"], manifest["earlier"], manifest["worker"]) == (1, [], None)
    assert 0 < manifest["cell_seconds"] < manifest["seconds"]
    monkeypatch.setenv("WORKBENCH_WORKER", "worker-7")
    planned = plan(write_notebook(tmp_path / "bad.ipynb", "1 / 0"), runs=tmp_path / "runs")
    for attempt in (1, 2, 3):
        manifest = planned.execute().manifest
        assert (manifest["attempt"], manifest["worker"]) == (attempt, "worker-7")
        assert [each["reason"] for each in manifest["earlier"]] == ["cell failed"] * (attempt - 1)


def test_two_processes_at_one_key_compute_it_once(tmp_path, write_notebook, start):
    file = tmp_path / "count"
    code = COUNT.format(file=file) + "\nimport time; time.sleep(2)"
    notebook = write_notebook(tmp_path / "count.ipynb", code)
    started = [start(notebook) for _ in range(2)]
    assert [process.wait(60) for process, _ in started] == [0, 0]
    assert file.read_text() == "x" and sum("waiting: " in messages.read_text() for _, messages in started) == 1


def test_a_run_needs_no_home_and_no_installed_kernel(tmp_path, write_notebook, start):
    notebook = write_notebook(tmp_path / "where.ipynb", "import sys\nprint(sys.executable)")
    process, messages = start(notebook, HOME="/proc/none", JUPYTER_DATA_DIR="/proc/none")
    assert process.wait(60) == 0, messages.read_text()
    (run,) = all_runs(tmp_path / "runs")
    assert sys.executable in (run.folder / "notebook.ipynb").read_text()


def test_a_run_starts_inside_a_running_event_loop_as_jupyter_has(tmp_path, write_notebook):
    async def inside() -> Run:
        return execute(write_notebook(tmp_path / "one.ipynb", "1"), runs=tmp_path / "runs")

    assert asyncio.run(inside()).status == "done"


@pytest.fixture
def interactive(tmp_path, monkeypatch) -> Run:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))
    return Run.start("10_hftp", seed=1)


def test_an_interactive_kernel_gets_a_folder_of_its_own(interactive):
    assert interactive.key.startswith("interactive-") and interactive.status == "interactive"
    assert interactive.params == {"seed": 1} and all_runs() == [interactive]
    assert interactive.command == "workbench run notebooks/10_hftp.ipynb -p seed=1"
    assert interactive.command in repr(interactive) and interactive.command in interactive._repr_html_()


def test_a_kept_result_comes_back_and_may_be_replaced(interactive):
    interactive.keep("counted", Counted(n=3))
    interactive.keep("counted", Counted(n=4))
    assert interactive.results()["counted"].table()["n"].tolist() == [4]
    figure = interactive.figures()["counted"]
    assert figure["layout"]["title"]["text"] == "There are 4"
    assert signature_of(figure) == {"key": interactive.key, "command": interactive.command}
    assert interactive.findings == ["There are 4"], "without a recorded finding, the titles speak"


def test_findings_are_single_lines_recorded_once(interactive):
    for sentence in ("one\n  two", "one two", "three"):
        interactive.finding(sentence)
    assert interactive.findings == ["one two", "three"]
    with pytest.raises(ValueError, match="empty sentence"):
        interactive.finding(" ")


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a\\b", ".hidden", "a.", "x" * 101, "tab\t", "end\n"])
def test_names_that_no_folder_should_have_are_refused(interactive, name):
    with pytest.raises(ValueError, match="name: got"):
        interactive.keep(name, Counted(n=1))
    with pytest.raises(ValueError, match="name: got"):
        Run.start(name)


def _wait_for(file: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
