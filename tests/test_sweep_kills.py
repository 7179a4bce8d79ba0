"""The night shift: 24 runs through the real command, a kill -9 of a kernel, of a worker and of the command itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from workbench.run import Run, all_runs

N_RUNS = 24
PATIENCE_S = 240  # for a state that comes within seconds on a quiet machine
CODE = """
import os, time
with open({file!r}, "a") as file:
    file.write(f"{{seed}} {{keep}} {{os.getpid()}}\\n")
time.sleep(0.6)
from workbench.run import Run
Run.start("tiny").finding(f"seed {{seed}} keeps {{keep}}")
"""


@pytest.fixture
def start(tmp_path, root, write_notebook) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the same sweep in a process of its own; whatever is left of it afterwards is killed."""
    notebook = write_notebook(
        tmp_path / "tiny.ipynb",
        CODE.format(file=str(tmp_path / "starts")),
        params="seed: int = 0\nkeep: float = 1.0",
    )
    words = [sys.executable, "-m", "workbench.cli", "sweep", str(notebook), "--runs", str(tmp_path / "runs")]
    words += ["-p", "seed=0..11", "-p", "keep=0.25,0.5", "--workers", "3"]
    with ExitStack() as undo:

        def begin() -> subprocess.Popen[bytes]:
            log = undo.enter_context((tmp_path / "log").open("ab"))
            process = subprocess.Popen(
                words, cwd=root, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            undo.callback(end, process)
            return process

        def end(process: subprocess.Popen[bytes]) -> None:
            family = [process.pid, *(child.pid for child in _family(process.pid))]
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

        yield begin


def test_a_sweep_outlives_the_kill_of_a_kernel_of_a_worker_and_of_itself(tmp_path, start):
    runs, starts = tmp_path / "runs", tmp_path / "starts"
    first = start()
    kernel = _wait(lambda: _a_kernel_at_work(starts, set()), first)
    os.kill(kernel, signal.SIGKILL)
    _wait(lambda: len(_done(runs)) >= 4, first)
    victim = _wait(lambda: _a_kernel_at_work(starts, {kernel}), first)
    worker = next(parent for parent in psutil.Process(victim).parents() if parent.ppid() == first.pid)
    worker.kill()
    _wait(lambda: len(_done(runs)) >= 11, first)

    family = _family(first.pid)
    first.kill()
    first.wait()
    _wait(lambda: not [process for process in family if _works(process)])  # nobody goes on computing
    finished, started = _done(runs), _starts(starts)
    assert 11 <= len(finished) < N_RUNS

    assert start().wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    done, log = _done(runs), (tmp_path / "log").read_text()
    assert len(done) == N_RUNS and {key: done[key] for key in finished} == finished, "a finished run was made again"
    again = Counter({name: n - started[name] for name, n in _starts(starts).items()})
    for run in all_runs(runs):
        attempts, begun = run.manifest["attempt"], _starts(starts)[_name(run)]
        assert begun <= attempts, "a start that no manifest knows"
        assert again[_name(run)] == (0 if run.key in finished else 1), "the second command starts what was left, once"
        if attempts == 1:
            assert begun == 1
    assert "kernel died" in log and "worker lost" in log
    assert f"cached      {len(finished)}" in log and f"{N_RUNS} of {N_RUNS} runs done" in log
    (record,) = (runs / "tiny" / "sweeps").glob("*.json")
    assert json.loads(record.read_text())["status"] == "done" and record.with_suffix(".html").exists()


def _done(runs: Path) -> dict[str, bytes]:
    """The manifests of the finished runs, byte for byte."""
    manifests = {path.parent.name: path.read_bytes() for path in runs.glob("tiny/[!.]*/manifest.json")}
    return {key: data for key, data in manifests.items() if json.loads(data)["status"] == "done"}


def _starts(file: Path) -> Counter[str]:
    """How often each run was started, as its own cells recorded it."""
    return Counter(line.rpartition(" ")[0] for line in file.read_text().splitlines())


def _name(run: Run) -> str:
    return f"{run.params['seed']} {run.params['keep']}"


def _a_kernel_at_work(starts: Path, but: set[int]) -> int | None:
    """The process of the run that started last, if it is still there."""
    lines = starts.read_text().splitlines() if starts.exists() else []
    pid = int(lines[-1].split()[-1]) if lines else 0
    return pid if pid and pid not in but and psutil.pid_exists(pid) else None


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _works(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(state: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """The first answer of `state` that is one, as long as the process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := state()):
        assert time.monotonic() < deadline, "it did not come to that"
        assert process is None or process.poll() is None, f"the command ended with {process and process.returncode}"
        time.sleep(0.02)
    return found
