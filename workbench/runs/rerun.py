"""A run made again from what it stored, beside the old one, and what differs.

Its folder holds the notebook as it was executed and every parameter: neither the notebook's file nor the command is
needed. The package and the libraries are those of today: where the outcome differs, the comparison names them first.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from workbench import storage
from workbench.files import write_json
from workbench.folder import Run
from workbench.run import plan
from workbench.runs.compare import Comparison, compare
from workbench.runs.notebooks import code_differences, code_of, source_of
from workbench.storage import Place

BESIDE = ".reruns"  # among the runs, where no list of runs looks


def rerun(run: Run, *, timeout: float | None = None, threads: int | None = None, progress: bool = False) -> Comparison:
    """Make a run again and compare it with the old one, which stays as it is.

    timeout   seconds for the whole run
    threads   CPU threads; None: as many as then, for they decide the order of sums
    Parameters that name files are read from this process's working directory, as in `workbench run`.
    Raises ValueError for a run that stored no notebook, such as an interactive one.
    """
    executed = run.folder / "notebook.ipynb"
    if run.status == "running" or not executed.exists():
        reason = "is still running" if run.status == "running" else "stored no notebook"
        raise ValueError(f"rerun: {run.key} {reason}, expected a run that is over. Its command is: {run.command}")
    then = storage.read_json(run.folder / "environment.json").get("variables", {}).get("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
        source = Path(folder, f"{run.notebook}.ipynb")
        write_json(source, source_of(storage.read_json(executed)))
        planned = dataclasses.replace(plan(source, run.params, runs=rerun_root(run)), command=run.command)
        again = planned.execute(
            force=True, timeout=timeout, threads=threads or (int(then) if then else None), progress=progress
        )
        notes = _since(source, Path(run.manifest.get("notebook", "")))
    compared = compare(run, again)
    return dataclasses.replace(compared, notes=(*compared.notes, *notes))


def rerun_root(run: Run) -> Place:
    """The folder, of the form of a folder of runs, in which a run is made again."""
    return run.folder.parent.parent / BESIDE


def _since(source: Path, file: Path) -> list[str]:
    """How the file of the notebook has changed since the run, which was made again from its own copy."""
    if file.suffix != ".ipynb" or not file.exists():
        return [f"the notebook's file is not at {file} any more; the stored one was run"]
    changed = [name for name, _ in code_differences(code_of(source), code_of(file))]
    return [f"{file} has changed since, in {', '.join(changed)}; the stored one was run"] if changed else []
