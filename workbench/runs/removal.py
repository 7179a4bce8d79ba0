"""What can go from a folder of runs, and its removal: what failed, what is half made, what was only tried.

A done run goes only when it is named, or made by other code and that is asked for. What anybody works on stays: a run
is removed under its lease. The manifest goes first, so that a kill in the middle leaves what the next look finds again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.files import PARTIAL
from workbench.folder import Run
from workbench.keys import package_digest
from workbench.leases import Holder, held, lease
from workbench.run import MANIFEST, plan
from workbench.runs.records import Record, records
from workbench.runs.rerun import BESIDE
from workbench.storage import Place

OVER = ("interrupted", "failed", "lost")
YOUNG_S = 3600.0  # what has no manifest yet may be about to get one
INTERACTIVE_DAYS = 30.0
MOST_DAYS = 36_500
PREVIOUS = ".previous"
STARTED = r"[0-9a-f]{12}|interactive-[0-9-]+"  # names of runs: a folder that somebody put there is none


@dataclass(frozen=True)
class Removable:
    """A folder or file that can go.

    why    in a few words        size_bytes   what that gives back
    run    the run whose lease it takes to remove it; None: nobody can work on it        status   of that run when found
    """

    path: Place
    why: str
    size_bytes: int
    run: Place | None = None
    status: str = "new"


class Busy(Exception):
    """Somebody works on this run."""


def removable(
    root: Place,
    keys: Collection[str] = (),
    *,
    interactive_days: float = INTERACTIVE_DAYS,
    other_code: bool = False,
) -> list[Removable]:
    """What can go from the runs under `root`; nothing is touched.

    keys               runs that go whatever they are, done ones too; with keys, nothing else does
    interactive_days   age from which interactive runs go
    other_code         whether done runs go that the code of today can't give
    Raises ValueError for a key that no run or several have: what is removed is named in full.
    """
    found = records(root)
    if keys:
        return [_run(_named(found, key), "named") for key in dict.fromkeys(keys)]
    if not 0 <= interactive_days <= MOST_DAYS:
        raise ValueError(f"gc: got {interactive_days} days, expected an age from 0 to {MOST_DAYS}.")
    before = datetime.now(UTC) - timedelta(days=interactive_days)
    whys = ((record, _why(record, before, other_code)) for record in found)
    return [*(_run(record, why) for record, why in whys if why), *_remains(root, found)]


def remove(item: Removable) -> bool:
    """Remove what `removable` found; False where somebody works on it now, or its run has become another."""
    if item.run is None:
        _remove(item.path)
        return True
    try:
        with lease(item.run, wait=_refuse):
            status = Run(item.run).manifest.get("status", "new")
            if status not in (item.status, "running"):  # "running" under our own lease: its runner is dead
                return False
            _remove(item.path)
            if item.path == item.run:
                _bring_back(item.run)
    except Busy:
        return False
    return True


def _named(found: Sequence[Record], key: str) -> Record:
    matches = [record for record in found if record.key == key]
    if len(matches) != 1:
        raise ValueError(
            f"gc: {key!r} is the key of {len(matches)} runs, expected one; `workbench runs list` shows them."
        )
    return matches[0]


def _why(record: Record, before: datetime, other_code: bool) -> str:
    """Why a run can go; nothing where it stays."""
    if record.status in OVER:
        return record.status
    if record.status == "interactive" and record.started and datetime.fromisoformat(record.started) < before:
        return f"interactive, from {record.started[:10]}"
    if record.status == "done" and other_code and not _is_todays(record):
        return "made by other code"
    return ""


def _is_todays(record: Record) -> bool:
    """Whether the code of today would give a run this key. One whose notebook is gone can't be checked and stays."""
    parts = storage.read_json(record.run.folder / "environment.json").get("key_parts") or {}
    if parts and parts["package"] != package_digest():
        return False
    notebook = Path(record.manifest.get("notebook", ""))
    if not notebook.is_file():
        return True
    try:
        return plan(notebook, record.params, runs=record.run.folder.parent.parent).run.key == record.key
    except ValueError:  # the notebook has other parameters now
        return False


def _remains(root: Place, found: list[Record]) -> Iterator[Removable]:
    """What is no run: folders without a manifest, replaced runs, runs made again, files that a kill left half."""
    status = {record.run.folder: record.status for record in found}
    for folder in _folders(root):
        replaced = folder.name.startswith(".") and folder.name.endswith(PREVIOUS)
        if replaced and status.get(folder.with_name(folder.name[1 : -len(PREVIOUS)])) == "done":
            main = folder.with_name(folder.name[1 : -len(PREVIOUS)])
            yield Removable(folder, "replaced by a newer one", _size(folder), main, "done")
        elif re.fullmatch(STARTED, folder.name) and not folder.parent.name.startswith(".") and folder not in status:
            if not held(folder) and _is_old(folder):
                yield Removable(folder, "has no manifest", _size(folder), folder)
        elif status.get(folder) == "done" and isinstance(folder, Path):
            yield from (Removable(path, "half written", _size(path)) for path in folder.rglob(f"{PARTIAL}*"))
    for folder in _folders(root / BESIDE):
        if not folder.name.startswith(".") and not held(folder):
            status_now = Run(folder).manifest.get("status", "new")
            yield Removable(folder, "made again, and compared", _size(folder), folder, status_now)


def _folders(root: Place) -> list[Place]:
    """The folders two levels below `root`; object storage has folders only as far as there are files in them."""
    if isinstance(root, Path):
        return sorted(path for path in root.glob("*/*") if path.is_dir())
    inner = [path.relative_to(root).parts for path in storage.files(root)]
    return sorted({root / parts[0] / parts[1] for parts in inner if len(parts) > 2})


def _bring_back(folder: Place) -> None:
    """The done run that a forced one was to replace, and did not, takes its place again."""
    previous = folder.with_name(f".{folder.name}{PREVIOUS}")
    if (previous / MANIFEST).exists():
        storage.move(previous, folder, MANIFEST)


def _run(record: Record, why: str) -> Removable:
    folder, status = record.run.folder, record.manifest["status"]
    return Removable(folder, why, _size(folder), None if status == "interactive" else folder, status)


def _remove(path: Place) -> None:
    if isinstance(path, Path) and path.is_file():
        path.unlink()
    else:
        storage.remove(path, MANIFEST)


def _size(path: Place) -> int:
    if isinstance(path, Path) and path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in storage.files(path))


def _is_old(folder: Place) -> bool:
    newest = max((storage.modified(file) for file in storage.files(folder)), default=None)
    if newest is None:
        newest = storage.modified(folder)
    return time.time() - newest > YOUNG_S


def _refuse(holder: Holder | None) -> Any:
    raise Busy(str(holder))
