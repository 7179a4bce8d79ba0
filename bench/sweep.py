"""What a sweep costs beside its runs: 10,000 sleeping runs on 200 simulated workers, and 24 small real ones.

    python bench/sweep.py

Simulated workers are Dask workers that are threads of one process, so that its memory is that of the scheduler, of
the driver and of all workers together; the bodies sleep, and the payload of every task is a real notebook. The rival of
the loop, which hands out one task per free place, submits all tasks at once. The rival of the small runs is papermill
in a loop. Each case has a process of its own.
"""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, Side, version_of
from bench._timing import peak_mb, record
from workbench.grid import axes_of
from workbench.sweep import survey
from workbench.sweep.loop import drive
from workbench.sweep.progress import Progress
from workbench.sweep.task import Outcome, Task

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "10_hftp.ipynb"
N_RUNS, N_WORKERS, N_SMALL = 10_000, 200, 24
QUIET = {  # two hundred workers that watch themselves many times a second would fill the event loop that they share
    "distributed.admin.tick.interval": "10s",
    "distributed.admin.tick.limit": "1h",
    "distributed.admin.system-monitor.interval": "60s",
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.worker.profile.enabled": False,
}


def sleeping(task: Task, name: str) -> Outcome:
    """A run that computes nothing for as long as its parameter says."""
    time.sleep(task.given["sleep_s"])
    return Outcome(task.key, "done", made=True, seconds=task.given["sleep_s"])


def tasks(n_runs: int, sleep_s: float) -> list[Task]:
    source = NOTEBOOK.read_text()
    given = {"sleep_s": sleep_s}
    return [Task("n.ipynb", source, ".", given, f"{n:012d}", f"workbench run {n}", "runs") for n in range(n_runs)]


def simulate(way: str, n_runs: int, n_workers: int, sleep_s: float) -> dict[str, object]:
    """Seconds and memory of many sleeping runs: handed out by the loop, or submitted all at once."""
    from dask import config
    from distributed import Client, LocalCluster

    from workbench.sweep.crew import Crew

    settings: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL, "memory_limit": 0}
    config.set(QUIET)
    cluster = LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=False, **settings)
    with cluster, Client(cluster, set_as_default=False) as client:
        idle_mb, started = peak_mb(), time.perf_counter()
        if way == "one task per free place":
            progress = Progress(n_runs, io.StringIO(), live=False)
            crew = Crew(client, "bench", work=sleeping)
            outcomes = list(drive(tasks(n_runs, sleep_s), crew, progress).outcomes.values())
        else:
            futures = client.map(sleeping, tasks(n_runs, sleep_s), ["bench"] * n_runs, pure=False)
            outcomes: list[Any] = list(client.gather(futures))  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        assert len(outcomes) == n_runs and all(outcome.status == "done" for outcome in outcomes)
    ideal_s = n_runs * sleep_s / n_workers
    facts: dict[str, object] = {"what": way, "n_runs": n_runs, "n_workers": n_workers, "sleep_s": sleep_s}
    facts |= {"seconds": seconds, "runs_per_s": n_runs / seconds, "ms_per_run": 1e3 * (seconds - ideal_s) / n_runs}
    return facts | {"workers_mb": idle_mb, "peak_mb": peak_mb()}


def planned(n_runs: int) -> dict[str, object]:
    """Seconds to check a grid, to compute every key and to look at what is there."""
    with tempfile.TemporaryDirectory() as runs:
        started = time.perf_counter()
        known = survey(NOTEBOOK, [axes_of([f"seed=0..{n_runs - 1}"])], runs)
        seconds = time.perf_counter() - started
    assert len(known.plans) == n_runs
    return {"what": "plan", "n_runs": n_runs, "seconds": seconds, "ms_per_run": 1e3 * seconds / n_runs}


def small(way: str, n_runs: int) -> dict[str, object]:
    """Seconds per run of a notebook that does next to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.ipynb")
        cell = nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("seed + 1")]), path)
        started = time.perf_counter()
        if way == LOOP:
            import papermill

            settings: dict[str, Any] = {"kernel_name": "python3", "language": "python", "progress_bar": False}
            for seed in range(n_runs):
                out = str(path.with_name(f"{seed}.ipynb"))
                papermill.execute_notebook(str(path), out, {"seed": seed}, **settings)
        else:
            words = [sys.executable, "-m", "workbench.cli", "sweep", str(path), "-p", f"seed=0..{n_runs - 1}"]
            words += ["--runs", folder, "--workers", way.split()[2]]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 0, f"{way}: {' '.join((done.stdout + done.stderr).split())[-300:]}"
        seconds = time.perf_counter() - started
    return {"what": way, "n_runs": n_runs, "seconds": seconds, "ms_per_run": 1e3 * seconds / n_runs}


def alone(function: str, *arguments: object) -> dict[str, object]:
    """What a function of this file returns in a process of its own, whose peak of memory is then its own too."""
    words = [sys.executable, __file__, function, json.dumps(arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{function}{arguments}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


LOOP = "papermill in a loop"


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table: seconds per run, the start of workers included."""
    n_runs = 4 if quick else N_SMALL // 2
    for workers in (2,) if quick else (1, 2):
        what = f"sweep of {n_runs} runs of a notebook that does next to nothing, start included"
        sides = per_run(f"sweep --workers {workers}", n_runs), per_run(LOOP, n_runs)
        rounds = 1 if quick else 3
        yield Match(
            what, f"workbench sweep --workers {workers}", LOOP, *sides, version_of("papermill"), None, rounds, False
        )


def per_run(way: str, n_runs: int) -> Side:
    return lambda: {"ms per run": float(str(alone("small", way, n_runs)["ms_per_run"]))}


def main() -> None:
    rows = [alone("planned", N_RUNS)]
    for sleep_s in (1.0, 0.0):
        for way in ("one task per free place", "all at once"):
            rows.append(alone("simulate", way, N_RUNS, N_WORKERS, sleep_s))
    for way in (LOOP, "sweep --workers 1 (start included)", "sweep --workers 2 (start included)"):
        rows.append(alone("small", way, N_SMALL))
    for row in rows:
        sleep = f", sleeping {row['sleep_s']} s" if "sleep_s" in row else ""
        memory = f"   {row['workers_mb']:.0f} MB before, {row['peak_mb']:.0f} MB at most" if "peak_mb" in row else ""
        name = f"{row['what']}{sleep}"
        print(f"{name:<48} {row['n_runs']:6} runs {row['seconds']:8.1f} s {row['ms_per_run']:9.2f} ms per run{memory}")
    record("sweep", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
    else:
        main()
