"""Sweeps with real processes: Ctrl-C as a terminal sends it, one GPU per run, an existing scheduler, a runner alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from workbench.leases import lease
from workbench.run import all_runs, plan
from workbench.sweep import sweep
from workbench.sweep.gpus import VARIABLE
from workbench.sweep.runner import Runner
from workbench.sweep.task import Task

PATIENCE_S = 240
START = """
import os
with open({file!r}, "a") as file:
    gpu, threads = (os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
    file.write(f"{{seed}} {{os.getpid()}} {{gpu}} {{threads}}\\n")
"""
SEED = "seed: int = 0"


@pytest.fixture
def popen(tmp_path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that leads its own group, as a terminal's command does; the group is gone afterwards."""
    with ExitStack() as undo:

        def begin(*words: str, **environment: str) -> subprocess.Popen[bytes]:
            log = undo.enter_context((tmp_path / "log").open("ab"))
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            undo.callback(end, process)
            return process

        def end(process: subprocess.Popen[bytes]) -> None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        yield begin


@pytest.fixture
def notebook(tmp_path, write_notebook) -> Callable[..., Path]:
    """Writes a notebook that records each start of its kernel: seed, process, GPUs, threads."""

    def write(code: str = "") -> Path:
        return write_notebook(tmp_path / "tiny.ipynb", START.format(file=str(tmp_path / "starts")) + code, params=SEED)

    return write


def starts(folder: Path) -> list[list[str]]:
    file = folder / "starts"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_ctrl_c_in_a_terminal_interrupts_the_runs_and_their_manifests_say_so(tmp_path, notebook, popen):
    words = ["workbench.cli", "sweep", str(notebook("import time; time.sleep(300)")), "--runs", str(tmp_path / "runs")]
    process = popen(*words, "-p", "seed=0..5", "--workers", "2")
    _wait(lambda: len(starts(tmp_path)) == 2, process)
    os.killpg(process.pid, signal.SIGINT)  # to the command and its workers alike
    assert process.wait(PATIENCE_S) == 130
    runs = all_runs(tmp_path / "runs")
    assert [run.status for run in runs] == ["interrupted", "interrupted"] and all(run.manifest["ended"] for run in runs)
    assert not [pid for _, pid, *_ in starts(tmp_path) if _alive(int(pid))], "no kernel goes on"
    log = (tmp_path / "log").read_text()
    assert "0 of 6 runs done, 6 not made" in log and log.endswith("interrupted; the same command resumes\n")
    (record,) = (tmp_path / "runs" / "tiny" / "sweeps").glob("*.json")
    assert json.loads(record.read_text())["status"] == "interrupted" and "Traceback" not in log


def test_every_run_sees_one_gpu_and_no_two_at_once_the_same(tmp_path, notebook, popen):
    words = ["workbench.cli", "sweep", str(notebook("import time; time.sleep(0.5)")), "--runs", str(tmp_path / "runs")]
    process = popen(*words, "-p", "seed=0..4", "--gpus", "2", "--threads", "3", **{VARIABLE: "5,GPU-7,9"})
    assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    seen = [gpu for _, _, gpu, _ in starts(tmp_path)]
    assert len(seen) == 5 and set(seen) <= {"5", "GPU-7", "9"} and len(set(seen)) == 2
    assert {threads for *_, threads in starts(tmp_path)} == {"3"}
    environments = [json.loads((run.folder / "environment.json").read_text()) for run in all_runs(tmp_path / "runs")]
    assert sorted(facts["cuda_visible_devices"] for facts in environments) == sorted(seen)


def test_an_existing_scheduler_makes_the_runs_and_goes_on_living(tmp_path, notebook, popen):
    address = tmp_path / "scheduler.json"
    popen("distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(address))
    worker = ["distributed.cli.dask_worker", "--scheduler-file", str(address), "--nthreads", "1", "--no-dashboard"]
    popen(*worker, "--memory-limit", "0", "--local-directory", str(tmp_path))
    _wait(address.exists)
    scheduler = json.loads(address.read_text())["address"]
    made = sweep(notebook("assert seed != 1"), {"seed": [0, 1]}, scheduler=scheduler, threads=1, runs=tmp_path / "runs")
    assert made.status == "failed" and made.table()["status"].tolist() == ["done", "failed"]
    assert made.table()["attempts"].tolist() == [1, 1], "a failed cell is not tried again"
    assert [run.status for run in made.runs] == ["done", "failed"] and made.runs[0].manifest["worker"]
    again = sweep(tmp_path / "tiny.ipynb", {"seed": [0]}, scheduler=scheduler, threads=1, runs=tmp_path / "runs")
    assert again.status == "done" and again.table()["cached"].tolist() == [True]
    assert len(starts(tmp_path)) == 2
    with pytest.raises(ValueError, match="no worker of this scheduler offers one"):
        sweep(tmp_path / "tiny.ipynb", {"seed": [2]}, scheduler=scheduler, gpus=1, runs=tmp_path / "runs")


def test_an_address_where_nobody_answers_is_refused(tmp_path, notebook, monkeypatch):
    monkeypatch.setattr("workbench.sweep.clusters.CONNECT_S", 0.5)
    with pytest.raises(ValueError, match=r"--scheduler: tcp://127\.0\.0\.1:9 does not answer"):
        sweep(notebook(), scheduler="tcp://127.0.0.1:9", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner("here")
    yield made
    made.close()


def test_a_runner_works_on_what_it_is_sent_and_refuses_another_key(tmp_path, notebook, runner):
    path, runs = notebook(), tmp_path / "runs"
    planned = plan(path, {"seed": 7}, runs=runs)
    sent: dict[str, Any] = {"notebook": str(path), "source": path.read_text(), "folder": "/no/such/folder"}
    sent |= {"given": {"seed": 7}, "key": planned.run.key, "command": "the command", "runs": str(runs), "threads": 1}
    path.unlink()  # as on another machine
    refused = runner.perform(Task(**sent | {"key": "another"}))
    assert refused.kind == "another package" and "was changed since" in " ".join(refused.error["lines"])
    with lease(planned.run.folder):
        assert runner.perform(Task(**sent)).status == "held"
    made = runner.perform(Task(**sent))
    assert (made.status, made.made) == ("done", True) and planned.run.manifest["command"] == "the command"
    found = runner.perform(Task(**sent))
    assert (found.status, found.made) == ("done", False) and len(starts(tmp_path)) == 1


def test_a_runner_that_is_killed_is_an_outcome_and_leaves_no_kernel(tmp_path, notebook, runner):
    path = notebook(f"import time; os.kill({runner._process.pid}, 9); time.sleep(300)")
    planned = plan(path, runs=tmp_path / "runs")
    sent = Task(str(path), path.read_text(), str(tmp_path), {}, planned.run.key, "c", str(tmp_path / "runs"), threads=1)
    assert runner.perform(sent).kind == "runner failed" and not runner.alive
    _wait(lambda: not _alive(int(starts(tmp_path)[0][1])))
    assert planned.run.status == "lost"


def _wait(state: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not state():
        assert time.monotonic() < deadline, "it did not come to that"
        assert process is None or process.poll() is None, f"the command ended with {process and process.returncode}"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
