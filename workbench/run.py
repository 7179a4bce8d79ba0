"""Runs one notebook through papermill, with refusals, and records what came of it.

`plan` checks all that can be checked before a kernel starts and knows the key; `execute` does the rest.
A key that is done is not computed again unless forced. The outcome is recorded, never read from the notebook.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench import keys, parameters, storage
from workbench.environment import deterministic_variables, environment
from workbench.files import PARTIAL, sha256_of, write_json
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
from workbench.keys import key_of, key_parts
from workbench.leases import Held, Holder, LeaseLost, lease
from workbench.storage import Place

if TYPE_CHECKING:
    from workbench.kernel import Watch
    from workbench.warm import WarmKernels

__all__ = ["RUNS_VARIABLE", "Draft", "LeaseLost", "Plan", "Run", "all_runs", "default_runs", "execute", "plan"]

MANIFEST = "manifest.json"  # the file that makes a folder a run: written last, removed first
WORKER_VARIABLE = "WORKBENCH_WORKER"  # set by a sweep: the name of the worker that runs this


@dataclass(frozen=True)
class Plan:
    """A run that can start: its notebook is read, its parameters are checked, its key is known."""

    notebook: Path
    params: dict[str, Any]
    command: str
    run: Run
    parameters_cell: int
    key_parts: Mapping[str, Any]

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
        warm: WarmKernels | None = None,
    ) -> Run:
        """Run the notebook, unless this key is done; the returned run's status is done or failed.

        timeout   seconds for the whole run        threads   CPU threads for the kernel's arithmetic
        warm      what the kernel is forked from, of the same `threads`; without it, it starts cold
        A done run that `force` makes again is kept as `.<key>.previous` until the new one is done.
        While another process works on this key, this one waits, and then finds it done. Where runs live on object
        storage, the work is done in local scratch and copied there, the manifest last.
        Raises KeyboardInterrupt after Ctrl-C or SIGTERM, once the kernel is down and the manifest written; LeaseLost
        (an OSError) where this process was frozen for so long that another took the run over.
        """
        if self.run.status == "done" and not force:
            return self.run
        with lease(self.run.folder, wait=self._say_waiting) as held:
            if force or not (self.run.status == "done" or _delivered_late(self.run.folder)):
                self._make(held, timeout, threads, progress, warm)
        return self.run

    def _make(
        self, held: Held, timeout: float | None, threads: int | None, progress: bool, warm: WarmKernels | None
    ) -> None:
        folder, desk = self.run.folder, storage.workplace(self.run.folder)
        before = self.run.manifest
        previous = _fresh_folder(folder, desk, keep_old=before.get("status") == "done")
        variables = deterministic_variables(threads) | {RUN_VARIABLE: str(desk.resolve())}
        write_json(desk / "params.json", self.params)
        write_json(desk / "environment.json", environment(variables, self.key_parts))
        with _recorded(self, desk, held, _history(before)) as outcome:
            outcome.update(_run_kernel(replace(self, run=Run(desk)), variables, timeout, progress, warm, held))
        if outcome["status"] == "done":
            storage.remove(previous, MANIFEST)

    def _say_waiting(self, holder: Holder | None) -> None:
        print(f"waiting: {holder or 'another process'} works on {self.run.folder}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Draft:
    """A notebook that was read, and the package as it is now: what the plans of a whole grid share.

    code   sources of its code cells but the parameters, whose place among all cells is `parameters_cell`
    """

    notebook: Path
    code: tuple[str, ...]
    parameters: Mapping[str, parameters.Parameter]
    parameters_cell: int
    package: str

    @classmethod
    def read(cls, notebook: str | Path) -> Draft:
        """Raises FileNotFoundError for a missing notebook; ValueError for a file that is none and for one without a
        parameters cell."""
        path = Path(notebook)
        cells = read_cells(path)
        tagged = [i for i, cell in enumerate(cells) if cell.kind == "code" and parameters.TAG in cell.tags]
        if len(tagged) != 1:
            raise ValueError(f"{path}: {len(tagged)} code cells are tagged {parameters.TAG!r}, expected one.")
        code = tuple(cell.source for i, cell in enumerate(cells) if cell.kind == "code" and i != tagged[0])
        return cls(path, code, parameters.declared(cells[tagged[0]].source), tagged[0], keys.package_digest())

    def plan(self, params: Mapping[str, Any] | None = None, *, runs: str | Place | None = None) -> Plan:
        """The plan of these parameters; raises ValueError for an unknown one and for a value of the wrong type."""
        given = dict(params or {})
        values = parameters.merged(self.parameters, given)
        root = default_runs() if runs is None else storage.place(runs)
        parts = key_parts(self.code, values, self.package)
        folder = root / checked_name(self.notebook.stem) / key_of(parts)
        command = run_command(self.notebook.as_posix(), {name: values[name] for name in given})
        return Plan(self.notebook, values, command, Run(folder), self.parameters_cell, parts)


def plan(notebook: str | Path, params: Mapping[str, Any] | None = None, *, runs: str | Place | None = None) -> Plan:
    """What `execute` would run, in the folder or at the fsspec URL `runs`. Text is converted to the declared types.

    Raises FileNotFoundError for a missing notebook; ValueError for a file that is none, for one without a
    parameters cell, for an unknown parameter and for a value of the wrong type.
    """
    return Draft.read(notebook).plan(params, runs=runs)


def execute(
    notebook: str | Path,
    params: Mapping[str, Any] | None = None,
    *,
    runs: str | Place | None = None,
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
        return [Cell(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags") or []) for cell in cells]
    except (ValueError, KeyError, TypeError, AttributeError):  # not text, not JSON, JSON of another shape
        raise ValueError(f"{path}: not a notebook. Expected an .ipynb file of format 4.") from None


def _run_kernel(
    plan: Plan, variables: dict[str, str], timeout: float | None, progress: bool, warm: WarmKernels | None, held: Held
) -> dict[str, Any]:
    """Run a planned notebook in a kernel of its own and tell the outcome: status and error."""
    from papermill.exceptions import PapermillExecutionError

    from workbench.kernel import KernelStart, Watch, short_folder, supervise

    watch = Watch()
    with short_folder() as folder:
        kernel = KernelStart(variables, Path(folder), warm)
        with held.on_loss(lambda: kernel.send(signal.SIGKILL)):
            ended = supervise(lambda: _papermill(plan, kernel.manager_class, watch, progress), kernel, timeout)
        last_words = kernel.last_words()
    failure, start = ended.failure, {"kernel": "warm" if kernel.forked else "cold"}
    if ended.timed_out:
        error = {"kind": "out of time", "lines": [f"stopped after {timeout:g} seconds"]}
    elif watch.error:
        error = {"kind": "cell failed", "lines": watch.error}
    elif type(failure).__name__ == "DeadKernelError":
        error = {"kind": "kernel died", "lines": [*last_words, "The kernel process ended. Was memory exhausted?"]}
    elif failure is not None and not isinstance(failure, PapermillExecutionError):
        error = {"kind": "runner failed", "lines": [f"{type(failure).__name__}: {failure}"]}
    else:
        return {"status": "done"} | start
    where = {"cell": plan.source_index(watch.cell_index), "source": watch.source}
    return {"status": "failed", "error": error | where} | start


def _papermill(plan: Plan, manager_class: type, watch: Watch, progress: bool) -> None:
    import papermill

    logger = logging.getLogger("papermill")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # the runner reports errors itself, once
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
def _recorded(plan: Plan, desk: Path, held: Held, history: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keep the manifest true: running, then the outcome that the block fills in, or why there is none."""
    from workbench.kernel import signals_interrupt

    clock, folder = time.perf_counter(), plan.run.folder
    record: dict[str, Any] = {"notebook": plan.notebook.as_posix(), "command": plan.command, **history}
    record |= {"key": folder.name, "started": utc_now(), "pid": os.getpid(), "host": socket.gethostname()}
    record |= {"worker": os.environ.get(WORKER_VARIABLE)}
    write_json(desk / MANIFEST, record | {"status": "running"})
    storage.publish(desk, folder, MANIFEST)
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
        record |= {"cell_seconds": _cell_seconds(desk / "notebook.ipynb"), "artefacts": _artefacts(desk)}
        if desk != folder:
            write_json(desk / MANIFEST, record | outcome)  # whole on this machine, should the storage fail now
        held.check()  # else this would overwrite what the new holder wrote
        if desk == folder:
            write_json(folder / MANIFEST, record | outcome)
        else:
            _deliver(desk, folder)


def _deliver(desk: Path, folder: Place) -> None:
    """Move what a run left from local scratch to where runs live."""
    storage.publish(desk, folder, MANIFEST)
    storage.remove(desk, MANIFEST)


def _delivered_late(folder: Place) -> bool:
    """Whether the run of `folder` was done here before, but its storage failed at the end; now it is there."""
    desk = storage.workplace(folder)
    if desk == folder or Run(desk).manifest.get("status") != "done":
        return False
    storage.remove(folder, MANIFEST)
    _deliver(desk, folder)
    return True


def _history(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Which attempt at this run comes now, and how each earlier one ended. A done run that is forced starts anew."""
    if not manifest or manifest["status"] == "done":
        return {"attempt": 1, "earlier": []}
    status = "lost" if manifest["status"] == "running" else manifest["status"]  # the lease is ours: its runner is dead
    facts = {name: manifest.get(name) for name in ("started", "ended", "host", "worker")}
    reason = manifest.get("error", {}).get("kind", status)
    earlier = [*manifest.get("earlier", []), {"attempt": manifest.get("attempt", 1), "reason": reason, **facts}]
    return {"attempt": len(earlier) + 1, "earlier": earlier}


def _fresh_folder(folder: Place, desk: Path, keep_old: bool) -> Place:
    """Make the run's folder and the desk empty; a done run is moved to the returned place instead of being removed."""
    previous = folder.with_name(f".{folder.name}.previous")
    if keep_old:
        storage.move(folder, previous, MANIFEST)
    for old in {folder, desk}:
        storage.remove(old, MANIFEST)
    desk.mkdir(parents=True)
    return previous


def _artefacts(folder: Path) -> dict[str, dict[str, Any]]:
    paths = [path for path in storage.files(folder) if not path.name.startswith(PARTIAL) and path != folder / MANIFEST]
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths
    }


def _cell_seconds(notebook: Path) -> float | None:
    """The seconds that the cells took, without the start and the end of their kernel, as papermill wrote them."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (FileNotFoundError, ValueError):  # not begun, or cut by a full disk
        return None
    return round(sum(cell["metadata"].get("papermill", {}).get("duration") or 0.0 for cell in cells), 3)
