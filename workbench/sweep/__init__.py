"""Many runs of one notebook over a grid of parameters: planned as a whole, made in parallel, none made twice.

    sweep("notebooks/10_hftp.ipynb", {"seed": range(10), "model": ["organism", "tiny:gpt2"]}, workers=4)

The same call resumes: what is done stays done, whatever was killed. This package alone imports Dask.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from workbench.grid import grid_of
from workbench.sweep.clusters import Where, opened
from workbench.sweep.loop import drive
from workbench.sweep.outlook import Survey, survey
from workbench.sweep.progress import Progress
from workbench.sweep.record import Sweep, Writer
from workbench.sweep.task import Task

if TYPE_CHECKING:
    from workbench.run import Plan
    from workbench.storage import Place

__all__ = ["Survey", "Sweep", "Where", "make", "survey", "sweep"]


def sweep(
    notebook: str | Path,
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    workers: int | None = None,
    gpus: int = 0,
    scheduler: str | None = None,
    slurm: str | None = None,
    timeout: float | None = None,
    retries: int = 2,
    threads: int | None = None,
    runs: str | Place | None = None,
) -> Sweep:
    """Run a notebook on every combination of a grid, unless it is done, and return what came of it.

    grid       names to values, all combined; or a list of such mappings, whose runs are put together
    workers    runs at once (default: one per two CPUs)       gpus       the same, each with one GPU
    scheduler  address of a Dask scheduler to use             slurm      a Slurm queue to use
    timeout    seconds per run      threads   CPU threads per run (default: the CPUs, shared out)
    retries    how often a run is tried again after its worker or kernel died; a failed cell never is
    Raises ValueError with every wrong parameter of the grid at once. Ctrl-C ends the runs; the returned value says so.
    """
    where = Where(workers, gpus, scheduler, slurm)
    plans = survey(notebook, grid_of(grid or {}), runs)
    return make(plans, where, timeout=timeout, retries=retries, threads=threads, command="sweep(...) in Python")


def make(
    known: Survey,
    where: Where,
    *,
    command: str,
    timeout: float | None = None,
    retries: int = 2,
    threads: int | None = None,
    stream: TextIO | None = None,
) -> Sweep:
    """Make the runs of a survey that are not done; progress goes to `stream`, by default standard error.

    Raises ValueError for a place that can't be had, OSError where the workers or their scheduler are gone.
    """
    where.check()
    if retries < 0:
        raise ValueError(f"retries: got {retries}, expected 0 or more.")
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, expected at least 1.")
    writer = Writer(known, command)
    left = known.to_make
    if not left:
        return writer.ended(None)
    out = sys.stderr if stream is None else stream
    progress, driven = Progress.on(len(left), known.median_s, out), None
    with opened(where, len(left)) as place:
        print(*place.lines, sep="\n", file=out, flush=True)
        source = known.notebook.read_text(encoding="utf-8")
        tasks = [
            _task(known.plans[n], known.given[n], source, timeout, threads, place.share, where.gpus > 0) for n in left
        ]
        writer.begun()
        try:
            driven = drive(tasks, place.crew, progress, retries)
        finally:
            progress.close()
            made = writer.ended(driven)
    if driven is not None and driven.trouble:
        raise driven.trouble
    return made


def _task(
    plan: Plan, given: dict[str, Any], source: str, timeout: float | None, threads: int | None, share: int, gpu: bool
) -> Task:
    root = plan.run.folder.parent.parent
    return Task(
        notebook=plan.notebook.as_posix(),
        source=source,
        folder=str(Path.cwd()),
        given=given,
        key=plan.run.key,
        command=plan.command,
        runs=str(root.absolute() if isinstance(root, Path) else root),
        timeout=timeout,
        threads=threads,
        share=share,
        gpu=gpu,
    )
