"""What one run costs beyond the notebook's own work, part by part, cold and warm, and many at a time.

    python bench/overhead.py                  the parts, and runs beside plain papermill, in turns
    python bench/overhead.py 200              also 200 runs of a trivial notebook, eight at a time, cold and warm

`opens the organism` imports the workbench and loads a model, as nearly every notebook does in its first cells.
"""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import nbformat
import papermill
from jupyter_core.paths import jupyter_runtime_dir
from nbformat.v4 import new_code_cell, new_notebook

from bench._match import Match, timed, version_of
from bench._timing import medians, record
from workbench.environment import deterministic_variables, environment
from workbench.kernel import PREFIX, KernelStart, short_folder
from workbench.run import Run, plan
from workbench.warm import WarmKernels

ROUNDS = 7
AT_ONCE = 8
BARE = "a new interpreter"
IMPORTS = {
    BARE: "pass",
    "import the runner": "import workbench.run",
    "import papermill, on the first run": "import papermill",
    "import an empty kernel": "import ipykernel.kernelapp",
    "import the workbench's menu": "from workbench import *",
}
OPENS = "from workbench import Subject\nsubject = Subject.organism()\nsubject"
Row = dict[str, object]


def notebook(path: Path, code: str) -> Path:
    parameters = new_code_cell("n: int = 0", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(code)]), path)
    return path


def import_rows() -> list[Row]:
    """Median seconds of a fresh interpreter for each import, less those of one that imports nothing."""
    rivals: dict[str, Callable[[], object]] = {
        name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)
        for name, code in IMPORTS.items()
    }
    seconds = medians(rivals, repeats=ROUNDS)
    bare = seconds.pop(BARE)
    rows: list[Row] = [{"what": name, "seconds": spent - bare} for name, spent in seconds.items()]
    return [{"what": BARE, "seconds": bare}, *rows]


def part_rows(trivial: Path, runs: Path, warm: WarmKernels) -> list[Row]:
    """What surrounds the cells, in this process: keys, records, a kernel's start and end."""
    variables = deterministic_variables()
    done = plan(trivial, runs=runs).execute(warm=warm)
    parts: dict[str, Callable[[], object]] = {
        "key, with the package's digest": lambda: plan(trivial, {"n": 1}, runs=runs),
        "environment.json": lambda: environment(variables),
        "find a run done": lambda: plan(trivial, runs=runs).execute(),
    }
    rows: list[Row] = [{"what": name, "seconds": spent} for name, spent in medians(parts, repeats=ROUNDS).items()]
    assert done.status == "done"
    for name, parent in (("cold", None), ("warm", warm)):
        spent = [kernel_seconds(variables, parent) for _ in range(ROUNDS)]
        for place, what in enumerate(("until its process is there", "until it answers", "until it has ended")):
            seconds = statistics.median(times[place] for times in spent)
            rows.append({"what": f"a kernel {what}", "start": name, "seconds": seconds})
    return rows


def kernel_seconds(variables: dict[str, str], warm: WarmKernels | None) -> tuple[float, float, float]:
    """Seconds until a kernel's process exists, until it answers, and until it has ended, each after the one before."""

    async def measure() -> tuple[float, float, float]:
        times = [time.perf_counter()]
        with short_folder() as folder:
            manager = KernelStart(variables, folder, warm).manager_class(kernel_name="python3")
            await manager.start_kernel(extra_arguments=["--HistoryManager.hist_file=:memory:"])
            times.append(time.perf_counter())
            client = manager.client()
            client.start_channels()
            await client.wait_for_ready(60)
            times.append(time.perf_counter())
            await manager.shutdown_kernel()
            client.stop_channels()
            times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1], times[3] - times[2]

    return asyncio.run(measure())


def run_rows(notebooks: dict[str, Path], runs: Path, warm: WarmKernels) -> list[Row]:
    """Whole runs beside plain papermill with a kernel of the same variables, in turns."""
    rows: list[Row] = []
    for name, path in notebooks.items():
        seconds = medians(rivals(path, runs, warm), repeats=ROUNDS)
        rows += [
            {"what": name, "start": start, "seconds": spent, "ratio": spent / seconds["papermill"]}
            for start, spent in seconds.items()
        ]
    return rows


def rivals(path: Path, runs: Path, warm: WarmKernels) -> dict[str, Callable[[], object]]:
    """One run of a notebook: by plain papermill, and by the project with a cold and with a warm kernel."""
    os.environ.update(deterministic_variables())  # for plain papermill's kernels
    numbers = count()  # a run that is there already would not be made again

    def through(parent: WarmKernels | None) -> Run:
        return plan(path, {"n": next(numbers)}, runs=runs).execute(warm=parent)

    def plain() -> None:
        runs.mkdir(exist_ok=True)
        named = {"kernel_name": "python3", "language": "python", "progress_bar": False}
        papermill.execute_notebook(path, runs / "plain.ipynb", parameters={"n": 1}, **named)

    return {"papermill": plain, "cold": lambda: through(None), "warm": lambda: through(warm)}


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, WarmKernels(deterministic_variables()) as warm:
        for name, path in list(written(Path(folder)).items())[: 1 if quick else None]:
            ways = rivals(path, Path(folder) / "runs", warm)
            for start in ("warm", "cold"):
                sides = timed(ways[start]), timed(ways["papermill"])
                what, often = f"one run of {name}", (1, False) if quick else (5, True)
                yield Match(what, f"run, {start} kernel", "papermill", *sides, version_of("papermill"), None, *often)


def written(folder: Path) -> dict[str, Path]:
    """The notebooks that are run."""
    return {
        "a trivial notebook": notebook(folder / "trivial.ipynb", "n + 1"),
        "a notebook that opens the organism": notebook(folder / "opens.ipynb", OPENS),
    }


def crowd_rows(trivial: Path, runs: Path, warm: WarmKernels, n_runs: int) -> list[Row]:
    """Many runs at a time: none may be lost, nothing may be left behind."""
    rows: list[Row] = []
    for start, parent in (("cold", None), ("warm", warm)):

        def one(n: int, start: str = start, parent: WarmKernels | None = parent) -> bool:
            done = plan(trivial, {"n": n}, runs=runs / start).execute(warm=parent)
            return (done.status, done.manifest["kernel"]) == ("done", start)

        started, before = time.perf_counter(), left_over()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            n_done = sum(pool.map(one, range(n_runs)))
        spent = time.perf_counter() - started
        what = f"{n_runs} runs, {AT_ONCE} at a time: seconds per run"
        row: Row = {"what": what, "start": start, "seconds": spent / n_runs, "n_lost": n_runs - n_done}
        rows.append(row | {"n_left": left_over() - before})
    return rows


def left_over() -> int:
    """Kernels' folders in the temporary and in Jupyter's own place, and open files of this process."""
    places = (Path(tempfile.gettempdir()).glob(f"{PREFIX}*"), Path(jupyter_runtime_dir()).glob("*"))
    return sum(len(list(found)) for found in (*places, Path("/proc/self/fd").iterdir()))


def main() -> None:
    logging.getLogger("papermill").addHandler(logging.NullHandler())
    n_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    rows = import_rows()
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, WarmKernels(deterministic_variables()) as warm:
        runs = Path(folder) / "runs"
        notebooks = written(Path(folder))
        trivial = notebooks["a trivial notebook"]
        rows += part_rows(trivial, runs, warm)
        rows += run_rows(notebooks, runs, warm)
        if n_runs:
            rows += crowd_rows(trivial, runs, warm, n_runs)
    for row in rows:
        ratio = f"{row['ratio']:8.2f} x papermill" if "ratio" in row else ""
        lost = f"   {row['n_lost']} lost, {row['n_left']} files more than before" if "n_lost" in row else ""
        print(f"{row['what']:<46} {row.get('start', ''):<10} {1e3 * float(str(row['seconds'])):9.1f} ms{ratio}{lost}")
    record("overhead", rows)


if __name__ == "__main__":
    main()
