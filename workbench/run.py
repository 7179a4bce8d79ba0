"""Runs one notebook through papermill, with refusals, and records what came of it.

`plan` checks all that can be checked before a kernel starts and knows the key; `execute` does the rest.
A key that is done is not computed again unless forced. The outcome is recorded, never read from the notebook.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench import parameters
from workbench.environment import deterministic_variables, environment
from workbench.files import PARTIAL, locked, sha256_of, write_json
from workbench.folder import (
    RUN_VARIABLE,
    RUNS_VARIABLE,
    Run,
    all_runs,
    checked_name,
    default_runs,
    run_command,
    utc_now,
)
from workbench.keys import run_key

if TYPE_CHECKING:
    from workbench.kernel import Watch

__all__ = ["RUNS_VARIABLE", "Plan", "Run", "all_runs", "default_runs", "execute", "plan"]


@dataclass(frozen=True)
class Plan:
    """A run that can start: its notebook is read, its parameters are checked, its key is known."""

    notebook: Path
    params: dict[str, Any]
    command: str
    run: Run
    parameters_cell: int

    def source_index(self, executed_index: int | None) -> int | None:
        """Which cell of the notebook a cell of its executed copy is; None for the parameters put in."""
        if executed_index is None or not self.params or executed_index <= self.parameters_cell:
            return executed_index
        return None if executed_index == self.parameters_cell + 1 else executed_index - 1

    def execute(
        self,
        *,
        force: bool = False,
        timeout: float | None = None,
        threads: int | None = None,
        progress: bool = False,
    ) -> Run:
        """Run the notebook, unless this key is done; the returned run's status is done or failed.

        timeout   seconds for the whole run        threads   CPU threads for the kernel's arithmetic
        A done run that `force` makes again is kept as `.<key>.previous` until the new one is done.
        Raises KeyboardInterrupt after Ctrl-C or SIGTERM, once the kernel is down and the manifest written.
        """
        folder = self.run.folder
        with locked(folder.with_name(f".{folder.name}.lock"), lambda: _say(f"waiting: {folder} is at work")):
            if self.run.status == "done" and not force:
                return self.run
            previous = _fresh_folder(folder, keep_old=self.run.status == "done")
            variables = deterministic_variables(threads) | {RUN_VARIABLE: str(folder.resolve())}
            write_json(folder / "params.json", self.params)
            write_json(folder / "environment.json", environment(variables))
            with _recorded(self, folder) as outcome:
                outcome.update(_run_kernel(self, variables, timeout, progress))
            if self.run.status == "done":
                shutil.rmtree(previous, ignore_errors=True)
        return self.run


def plan(notebook: str | Path, params: Mapping[str, Any] | None = None, *, runs: str | Path | None = None) -> Plan:
    """What `execute` would run. Text is converted to the declared types.

    Raises FileNotFoundError for a missing notebook; ValueError for a file that is none, for one without a
    parameters cell, for an unknown parameter and for a value of the wrong type.
    """
    path, given = Path(notebook), dict(params or {})
    cells = read_cells(path)
    tagged = [i for i, cell in enumerate(cells) if cell.kind == "code" and parameters.TAG in cell.tags]
    if len(tagged) != 1:
        raise ValueError(f"{path}: {len(tagged)} code cells are tagged {parameters.TAG!r}, expected one.")
    values = parameters.merged(parameters.declared(cells[tagged[0]].source), given)
    code = [cell.source for i, cell in enumerate(cells) if cell.kind == "code" and i != tagged[0]]
    root = default_runs() if runs is None else Path(runs)
    folder = root / checked_name(path.stem) / run_key(code, values)
    command = run_command(path.as_posix(), {name: values[name] for name in given})
    return Plan(path, values, command, Run(folder), tagged[0])


def execute(
    notebook: str | Path,
    params: Mapping[str, Any] | None = None,
    *,
    runs: str | Path | None = None,
    force: bool = False,
    timeout: float | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Run:
    """Run a notebook on these parameters, unless that is done: `plan` refuses, `Plan.execute` runs."""
    planned = plan(notebook, params, runs=runs)
    return planned.execute(force=force, timeout=timeout, threads=threads, progress=progress)


class Cell(NamedTuple):
    """A cell of a notebook; its kind is "code", "markdown" or "raw"."""

    kind: str
    source: str
    tags: list[str]


def read_cells(path: Path) -> list[Cell]:
    """The cells of a notebook, without their outputs."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such notebook. Expected the path of an .ipynb file.")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [Cell(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]
    except (ValueError, KeyError, TypeError):  # not text, not JSON, JSON of another shape
        raise ValueError(f"{path}: not a notebook. Expected an .ipynb file of format 4.") from None


def _run_kernel(plan: Plan, variables: dict[str, str], timeout: float | None, progress: bool) -> dict[str, Any]:
    """Run a planned notebook in a kernel of its own and tell the outcome: status and error."""
    from papermill.exceptions import PapermillExecutionError

    from workbench.kernel import KernelStart, Watch, short_folder, supervise

    watch = Watch()
    with short_folder() as folder:
        kernel = KernelStart(variables, Path(folder))
        ended = supervise(lambda: _papermill(plan, kernel.manager_class, watch, progress), kernel, timeout)
        last_words = kernel.last_words()
    failure = ended.failure
    if ended.timed_out:
        error = {"kind": "out of time", "lines": [f"stopped after {timeout:g} seconds"]}
    elif watch.error:
        error = {"kind": "cell failed", "lines": watch.error}
    elif type(failure).__name__ == "DeadKernelError":
        error = {"kind": "kernel died", "lines": [*last_words, "The kernel process ended. Was memory exhausted?"]}
    elif failure is not None and not isinstance(failure, PapermillExecutionError):
        error = {"kind": "runner failed", "lines": [f"{type(failure).__name__}: {failure}"]}
    else:
        return {"status": "done"}
    where = {"cell": plan.source_index(watch.cell_index), "source": watch.source}
    return {"status": "failed", "error": error | where}


def _papermill(plan: Plan, manager_class: type, watch: Watch, progress: bool) -> None:
    import papermill

    logging.getLogger("papermill").addHandler(logging.NullHandler())  # the runner reports errors itself, once
    papermill.execute_notebook(
        _untemplated(plan.notebook),
        _untemplated(plan.run.folder / "notebook.ipynb"),
        parameters=plan.params,
        kernel_name="python3",
        language="python",
        progress_bar=progress,
        kernel_manager_class=manager_class,
        on_cell_start=watch.on_cell_start,
        on_cell_error=watch.on_cell_error,
    )


def _untemplated(path: Path) -> str:
    """`path` for papermill, which formats paths: braces in them would be parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextmanager
def _recorded(plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """Keep the manifest true: running, then the outcome that the block fills in, or why there is none."""
    from workbench.kernel import signals_interrupt

    clock, path = time.perf_counter(), folder / "manifest.json"
    record: dict[str, Any] = {"notebook": plan.notebook.as_posix(), "command": plan.command}
    record |= {"key": folder.name, "started": utc_now(), "pid": os.getpid(), "host": socket.gethostname()}
    write_json(path, record | {"status": "running"})
    outcome: dict[str, Any] = {}
    try:
        with signals_interrupt():
            yield outcome
    except KeyboardInterrupt:
        outcome |= {"status": "interrupted"}
        raise
    except BaseException as error:  # such as a full disk: recorded, then raised
        outcome |= {"status": "failed", "error": {"kind": "runner failed", "lines": [repr(error)]}}
        raise
    finally:
        record |= {"ended": utc_now(), "seconds": round(time.perf_counter() - clock, 3)}
        write_json(path, record | outcome | {"artefacts": _artefacts(folder)})


def _fresh_folder(folder: Path, keep_old: bool) -> Path:
    """Make `folder` empty; a done run is moved to the returned path instead of being deleted."""
    previous = folder.with_name(f".{folder.name}.previous")
    if keep_old:
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return previous


def _artefacts(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(PARTIAL))
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        for path in paths
        if path != folder / "manifest.json"
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
