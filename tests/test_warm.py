"""Warm kernels: the same numbers as cold ones, nothing shared between two, nothing left of any, whoever is killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from workbench.environment import deterministic_variables
from workbench.kernel import short_folder
from workbench.run import Run, plan
from workbench.warm import ColdStart, ForkedKernel, WarmKernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")

THREADS = 2  # with one, neither OpenBLAS nor OpenMP starts threads, which are what a fork could break
MEASURE = """
from workbench import LogitLens, Run, Subject
import numpy as np, torch
run, subject = Run.start("any"), Subject.organism()
run.keep("lens", LogitLens().run(subject, ["the lamp is", "a bell"]))
x = torch.randn(700, 700, generator=torch.Generator().manual_seed(0))
print(float((x @ x).sum()), torch.get_num_threads())
y = np.random.default_rng(0).normal(size=(700, 700))
print(float((y @ y).sum()))
"""
LOOK = """
import json, locale, os, signal, sys, threading, time
hidden = {"IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JPY_PARENT_PID"}
seen = {
    "environment": {name: value for name, value in os.environ.items() if name not in hidden},
    "place": [os.getcwd(), sys.path, sys.argv[0], sys.executable, __name__],
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)],
    "blocked": [str(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "session": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
    "input": [os.read(0, 10).decode(), os.isatty(1)],
    "threads": sorted(thread.name for thread in threading.enumerate()),
    "hash": hash("a"),
    "locale": [locale.getlocale(), time.tzname],
    "umask": [mask := os.umask(0), os.umask(mask)],
    "flags": str(sys.flags),
    "files": len([fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]) < 60,
}
import torch
seen["torch"] = [torch.get_num_threads(), torch.get_default_dtype()]
print(json.dumps(seen, default=str))
"""
SPEAK = """
import os, stat, sys
import pandas as pd, plotly.io, tqdm.auto, transformers
print("out"); print("err", file=sys.stderr); print(stat.S_ISFIFO(os.fstat(1).st_mode), "for child processes")
print(tqdm.auto.tqdm.__mro__, plotly.io.renderers.default, pd.get_option("display.max_columns"))
print(pd.DataFrame([["a text of some length"] * 8]))
transformers.logging.get_logger("transformers.any").warning("a library warns")
"""
LUCK = "import random, numpy, torch; print(random.random(), numpy.random.random(), torch.rand(1).item())"
SLEEP = 'import os, pathlib, time; pathlib.Path("{file}").write_text(str(os.getpid())); time.sleep(60)'


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmKernels]:
    with WarmKernels(deterministic_variables(THREADS)) as warm:
        yield warm


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, tmp_path_factory) -> Iterator[None]:
    """Every test: its temporary folders are gone, and no process that it started is there, not even as a zombie."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = _children()
    yield
    assert not list(folder.iterdir())
    _until(lambda: _children() <= before | _of_parents())


def run(notebook: Path, folder: Path, warm: WarmKernels | None = None, **settings: Any) -> Run:
    return plan(notebook, runs=folder).execute(warm=warm, threads=THREADS, force=True, **settings)


def printed(run: Run) -> str:
    cells = json.loads((run.folder / "notebook.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return "".join("".join(output.get("text", "")) for output in outputs)


def test_results_are_the_same_bytes_warm_and_cold(tmp_path, write_notebook, warm):
    notebook, seen = write_notebook(tmp_path / "measure.ipynb", MEASURE), []
    for start in (None, warm, warm):
        done = run(notebook, tmp_path / "runs", start)
        assert done.status == "done", done.manifest
        assert done.manifest["kernel"] == ("cold" if start is None else "warm")
        files = sorted(path for path in done.folder.rglob("*") if path.is_file() and path.suffix != ".ipynb")
        tables = {path.name: path.read_bytes() for path in files if path.suffix in (".parquet", ".safetensors")}
        assert tables
        seen.append((tables, printed(done), (done.folder / "figures" / "lens.json").read_bytes()))
    assert seen[0] == seen[1] == seen[2]


def test_a_cell_sees_in_a_warm_kernel_what_it_sees_in_a_cold_one(tmp_path, write_notebook, warm):
    notebook = write_notebook(tmp_path / "look.ipynb", LOOK)
    cold, warmed = (json.loads(printed(run(notebook, tmp_path / "runs", start))) for start in (None, warm))
    assert warmed == cold and warmed["environment"]["WORKBENCH_RUN"] and warmed["flags"]


def test_what_cells_libraries_and_child_processes_print_is_kept(tmp_path, write_notebook, warm, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # under it, ipykernel leaves the output of child processes alone
    notebook = write_notebook(tmp_path / "speak.ipynb", SPEAK)
    cold, warmed = (sorted(printed(run(notebook, tmp_path / "runs", start)).split("\n")) for start in (None, warm))
    assert warmed == cold and {"out", "err", "True for child processes"} <= set(warmed)
    assert any(line.endswith("a library warns") for line in warmed)


def test_two_warm_kernels_share_no_luck_and_no_state(tmp_path, write_notebook, warm):
    luck = write_notebook(tmp_path / "luck.ipynb", LUCK)
    assert len({number for _ in range(3) for number in printed(run(luck, tmp_path / "runs", warm)).split()}) == 9
    code = (
        "import os, torch\nprint(hasattr(torch, 'mark'), os.environ.get('MARK'))\ntorch.mark = os.environ['MARK'] = 'x'"
    )
    notebook = write_notebook(tmp_path / "mark.ipynb", code)
    assert {printed(run(notebook, tmp_path / "runs", warm)) for _ in range(2)} == {"False None\n"}


def test_a_crash_is_told_with_its_last_words_and_hurts_no_other_run(tmp_path, write_notebook, warm):
    crash = run(write_notebook(tmp_path / "crash.ipynb", "import os; os.abort()"), tmp_path / "runs", warm)
    assert crash.manifest["error"]["kind"] == "kernel died"
    assert "Fatal Python error: Aborted" in crash.manifest["error"]["lines"]
    killed = run(write_notebook(tmp_path / "k.ipynb", "import os; os.kill(os.getpid(), 9)"), tmp_path / "runs", warm)
    assert killed.manifest["error"]["kind"] == "kernel died" and killed.manifest["error"]["cell"] == 2
    after = run(write_notebook(tmp_path / "after.ipynb", "1"), tmp_path / "runs", warm)
    assert (after.status, after.manifest["kernel"]) == ("done", "warm")


def test_a_warm_run_out_of_time_fails_and_its_kernel_ends(tmp_path, write_notebook, warm):
    file = tmp_path / "pid"
    slow = run(write_notebook(tmp_path / "slow.ipynb", SLEEP.format(file=file)), tmp_path / "runs", warm, timeout=4)
    assert slow.manifest["error"]["kind"] == "out of time" and not _alive(int(file.read_text()))
    assert "KeyboardInterrupt" in (slow.folder / "notebook.ipynb").read_text(), "it was asked before it was killed"


def test_files_left_open_are_written_when_a_warm_kernel_ends(tmp_path, write_notebook, warm):
    file = tmp_path / "left"
    code = f"import atexit\nfile = open({str(file)!r}, 'w'); file.write('a'); atexit.register(lambda: file.write('b'))"
    assert run(write_notebook(tmp_path / "open.ipynb", code), tmp_path / "runs", warm).status == "done"
    assert file.read_text() == "ab"


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_24_runs_eight_at_a_time_are_all_done(tmp_path, write_notebook, start):
    notebook = write_notebook(tmp_path / "one.ipynb", "print(n)")

    def one(n: int) -> tuple[str, str, str]:
        done = plan(notebook, {"n": n}, runs=tmp_path / "runs").execute(warm=warm, threads=THREADS)
        return done.status, done.manifest["kernel"], printed(done)

    with WarmKernels(deterministic_variables(THREADS), preload=["json"]) as warm, ThreadPoolExecutor(8) as pool:
        files = _open_files()
        warm = warm if start == "warm" else None
        assert list(pool.map(one, range(24))) == [("done", start, f"{n}\n") for n in range(24)]
        assert _open_files() <= files + 4  # runs keep no file open; libraries a few, once


def test_folders_of_killed_processes_are_removed_and_those_of_the_living_are_not(root, monkeypatch):
    code = (
        "from workbench.kernel import short_folder\nwith short_folder() as folder: print(folder, flush=True); input()"
    )
    environment = os.environ | {"TMPDIR": tempfile.gettempdir()}
    words = [sys.executable, "-c", code]
    with ExitStack() as undo:
        living, dead = (
            undo.enter_context(subprocess.Popen(words, cwd=root, env=environment, stdin=PIPE, stdout=PIPE, text=True))
            for _ in range(2)
        )
        folders = [Path(process.stdout.readline().strip()) for process in (living, dead) if process.stdout]
        dead.kill()
        dead.wait()
        with monkeypatch.context() as without_locks:
            without_locks.setattr("workbench.files.fcntl", None)
            with short_folder() as own:
                assert [folder.exists() for folder in (*folders, own)] == [True, True, True]
        with short_folder() as own:
            assert [folder.exists() for folder in (*folders, own)] == [True, False, True]
        living.communicate("\n")


def test_a_killed_driver_takes_its_kernels_along(tmp_path, write_notebook, root):
    file, temporary = tmp_path / "pid", tmp_path / "temporary"
    temporary.mkdir()
    notebook = write_notebook(tmp_path / "slow.ipynb", SLEEP.format(file=file))
    code = (
        "import sys\nfrom workbench.run import plan\nfrom workbench.warm import WarmKernels\n"
        "from workbench.environment import deterministic_variables\n"
        "with WarmKernels(deterministic_variables(), preload=['json']) as warm:\n"
        "    print(warm._parent.pid, flush=True)\n"
        f"    plan({str(notebook)!r}, runs={str(tmp_path / 'runs')!r}).execute(warm=warm)"
    )
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, stdout=PIPE) as driver:
        assert driver.stdout is not None
        parent = int(driver.stdout.readline())
        _until(lambda: file.exists() and file.read_text() != "")
        driver.kill()
    _until(lambda: not _alive(parent) and not _alive(int(file.read_text())))
    _until(lambda: not list(temporary.iterdir()))


def test_a_killed_parent_takes_its_kernels_along_and_the_next_start_is_cold(tmp_path, write_notebook, capfd):
    file = tmp_path / "pid"
    notebook = write_notebook(tmp_path / "slow.ipynb", SLEEP.format(file=file))
    with WarmKernels(deterministic_variables(THREADS), preload=["json"]) as warm, ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, notebook, tmp_path / "runs", warm)
        _until(lambda: file.exists() and file.read_text() != "")
        assert warm._parent is not None
        warm._parent.kill()
        assert future.result().manifest["error"]["kind"] == "kernel died"
        _until(lambda: not _alive(int(file.read_text())))
        for name in ("a", "b"):
            after = run(write_notebook(tmp_path / f"{name}.ipynb", "1"), tmp_path / "runs", warm)
            assert (after.status, after.manifest["kernel"]) == ("done", "cold")
    assert (
        capfd.readouterr().err.splitlines().count("cold start: the parent of warm kernels ended. It was killed.") == 1
    )


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(9,), name='busy').start()", "thread busy"),
        ("raise OSError('no such disk')", "OSError: no such disk"),
        ("file = open('/dev/null')", ""),
    ],
    ids=["a thread", "an error", "a harmless file"],
)
def test_an_import_that_a_fork_would_break_starts_cold(tmp_path, write_notebook, monkeypatch, capfd, source, reason):
    (tmp_path / "trap.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    notebook = write_notebook(tmp_path / "one.ipynb", "1")
    with WarmKernels(deterministic_variables(THREADS), preload=["trap"]) as warm:
        done = run(notebook, tmp_path / "runs", warm)
    assert (done.status, done.manifest["kernel"]) == ("done", "cold" if reason else "warm")
    assert reason in capfd.readouterr().err


def test_what_was_imported_before_must_be_what_would_be_imported_now(
    tmp_path, write_notebook, warm, monkeypatch, capfd
):
    notebook = write_notebook(tmp_path / "one.ipynb", "1")
    monkeypatch.setattr("workbench.warm.package_digest", lambda: "another source")
    assert run(notebook, tmp_path / "runs", warm).manifest["kernel"] == "cold"
    monkeypatch.undo()
    other = plan(notebook, runs=tmp_path / "runs").execute(warm=warm, threads=1, force=True)
    assert other.manifest["kernel"] == "cold"
    lines = capfd.readouterr().err.splitlines()
    assert "cold start: the source of workbench changed after the warm parent had imported it" in lines
    assert any(
        line.startswith("cold start: the warm parent was started with another MKL_NUM_THREADS,") for line in lines
    )


def test_a_parent_that_hangs_is_waited_for_once(tmp_path, write_notebook, monkeypatch, capfd):
    (tmp_path / "trap.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("workbench.warm.PATIENCE_S", 0.5)
    monkeypatch.setattr("workbench.warm.LAST_PATIENCE_S", 0.1)
    with WarmKernels(deterministic_variables(THREADS), preload=["trap"]) as warm:
        runs = [run(write_notebook(tmp_path / f"{name}.ipynb", "1"), tmp_path / "runs", warm) for name in "ab"]
        monkeypatch.setattr("workbench.warm.PATIENCE_S", 600.0)
        runs.append(run(write_notebook(tmp_path / "c.ipynb", "1"), tmp_path / "runs", warm))
    assert [(each.status, each.manifest["kernel"]) for each in runs] == [("done", "cold")] * 3
    assert capfd.readouterr().err.count("the parent of warm kernels gave no answer") == 1


def test_a_fork_that_the_system_refuses_is_a_cold_start():
    ours, parents = socket.socketpair()
    with ours, parents:
        parents.sendall(b'{"refused": "Cannot allocate memory"}\n')
        with pytest.raises(ColdStart, match="could not fork: Cannot allocate memory"):
            ForkedKernel(ours)


def test_without_fork_every_start_is_cold_and_says_so_once(tmp_path, write_notebook, monkeypatch, capfd):
    monkeypatch.setattr("workbench.warm.sys.platform", "darwin")
    with WarmKernels(deterministic_variables(THREADS)) as warm:
        runs = [run(write_notebook(tmp_path / f"{name}.ipynb", "1"), tmp_path / "runs", warm) for name in "ab"]
    assert [each.manifest["kernel"] for each in runs] == ["cold", "cold"]
    assert capfd.readouterr().err.splitlines().count("cold start: kernels can't be forked on darwin") == 1


def test_a_module_that_is_not_there_is_refused_at_once():
    with pytest.raises(ValueError, match="no module 'no_such_module' to preload"), WarmKernels({}, ["no_such_module"]):
        pass


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _children(pid: int | str = "self") -> set[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(word) for path in tasks for word in path.read_text().split()}


def _of_parents() -> set[int]:
    """The parents of warm kernels that this process keeps, which have no kernels now."""
    parents = {pid for pid in _children() if b"workbench.forking" in Path(f"/proc/{pid}/cmdline").read_bytes()}
    return {pid for pid in parents if not _children(pid)}
