"""Many runs, each read once: what ran, on which parameters, how it ended, and where its tables lie.

Only manifests, parameters and findings are read, never a table or a figure: ten thousand runs take about a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from workbench import storage
from workbench.folder import Run, all_runs
from workbench.storage import Place

UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
FINISHED = ("done", "failed")


@dataclass(frozen=True)
class Record:
    """One run as its files were when they were read.

    findings   those that it recorded; unlike those of a Run, never titles of figures
    """

    run: Run
    manifest: Mapping[str, Any]
    params: Mapping[str, Any]
    findings: Sequence[str] = ()

    @property
    def notebook(self) -> str:
        return self.run.notebook

    @property
    def key(self) -> str:
        return self.run.key

    @cached_property
    def status(self) -> str:
        """As of a Run: running, lost, done, failed, interrupted or interactive."""
        return self.run.status_in(self.manifest)

    @property
    def started(self) -> str:
        return self.manifest.get("started", "")

    @property
    def seconds(self) -> float | None:
        return self.manifest.get("seconds")

    def tables(self) -> dict[str, Place]:
        """The Parquet file of each kept result's table, by the result's name."""
        found: dict[str, list[Place]] = {}
        for path in self._table_files():
            found.setdefault(path.parent.name, []).append(path)
        return {name: paths[0] if len(paths) == 1 else _current(paths) for name, paths in sorted(found.items())}

    def _table_files(self) -> list[Place]:
        """From the manifest's list, which costs nothing; a run that isn't over has no list yet."""
        listed = self.manifest.get("artefacts")
        if listed is None:
            return storage.files(self.run.folder, "results/*/table-*.parquet")
        return [self.run.folder / name for name in listed if re.fullmatch(r"results/[^/]+/table-\w+\.parquet", name)]


def records(root: Any = None, notebook: str | None = None) -> list[Record]:
    """Every run under `root`, a path or an fsspec URL, or those of one notebook, oldest first."""
    chosen = [run for run in all_runs(root) if notebook in (None, run.notebook)]
    return read(chosen)


def read(runs: Sequence[Run]) -> list[Record]:
    """The records of these runs; one that was removed in the meantime is left out."""
    names = {"manifest.json": dict, "params.json": dict, "findings.json": list}
    contents = [_all_json([run.folder / name for run in runs], kind) for name, kind in names.items()]
    found = zip(runs, *contents, strict=True)
    return [Record(run, facts, params or {}, lines or ()) for run, facts, params, lines in found if facts]


def chosen_runs(runs: Sequence[Run], words: Sequence[str], every: bool = False) -> list[Run]:
    """The runs that words name: a key, the start of one, or a notebook, meaning its latest finished run.

    Without words the latest finished run of each notebook; `every` chooses them all.
    """
    if every:
        words, chosen = (), list(runs)
    else:
        latest = {found.notebook: found for found in runs if found.status in FINISHED}
        chosen = [] if words else sorted(latest.values(), key=lambda found: found.notebook)
        for word in words:
            matches = [latest[word]] if word in latest else [found for found in runs if found.key.startswith(word)]
            if len(matches) != 1:
                hint = "`workbench runs list` shows them" if not matches else "give more of the key"
                raise ValueError(f"runs: {word!r} names {len(matches)} runs, expected one; {hint}.")
            chosen += matches
    if not chosen:
        raise ValueError("runs: there are none yet, expected at least one. Try `workbench run NOTEBOOK`.")
    return chosen


def matching(
    found: Iterable[Record],
    *,
    status: str | None = None,
    params: Mapping[str, str] | None = None,
    since: datetime | None = None,
) -> list[Record]:
    """The records of a status, with these parameters, as a command line spells them, begun not before `since`.

    Raises ValueError for a parameter that no record has.
    """
    found = list(found)
    known = dict.fromkeys(name for record in found for name in record.params)
    for name in params or {}:
        if found and name not in known:
            raise ValueError(f"parameter {name}: no run has one of that name. Known: {', '.join(known) or 'none'}.")
    return [
        record
        for record in found
        if status in (None, record.status)
        and all(name in record.params and spells(text, record.params[name]) for name, text in (params or {}).items())
        and (since is None or (record.started != "" and datetime.fromisoformat(record.started) >= since))
    ]


def latest(found: Iterable[Record]) -> list[Record]:
    """Of the records of one notebook with equal parameters, the last: older ones were made by other code."""
    last = {(r.notebook, json.dumps(r.params, sort_keys=True)): r for r in found}
    return sorted(last.values(), key=lambda r: (r.started, r.key))


def varying(found: Iterable[Record]) -> list[str]:
    """The parameters that differ between runs of the same notebook: the ones worth a column."""
    values: dict[str, dict[str, set[str]]] = {}
    for record in found:
        for name, value in record.params.items():
            values.setdefault(name, {}).setdefault(record.notebook, set()).add(repr(value))
    return [name for name, of in values.items() if any(len(different) > 1 for different in of.values())]


def spells(text: str, value: Any) -> bool:
    """Whether `text` is a way to write a parameter's value: 0.5, 0.50 and 5e-1 are the same number."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return text == str(value) or (not isinstance(value, str) and text == str(value).lower())
    try:
        return float(text) == value
    except ValueError:
        return False


def moment(text: str) -> datetime:
    """A time on the command line: 90m, 12h, 7d or 2w ago, or an ISO date or time (UTC, unless it says)."""
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    try:
        if ago:
            return datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: float(ago[1])})
        when = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"time: got {text!r}, expected an age such as 12h or 7d, or a date such as 2026-01-31."
        ) from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _current(paths: list[Place]) -> Place:
    """Of several tables in one folder, as a kill in the middle of a save leaves them, the one that counts."""
    record = storage.read_json(paths[0].parent / "result.json")
    return paths[0].parent / record["files"]["table"]


def _all_json(paths: Sequence[Place], kind: type) -> list[Any]:
    """What each file holds; None for one that is missing."""
    read = zip(paths, storage.read_all(paths), strict=True)
    return [None if data is None else storage.json_in(path, data, kind) for path, data in read]
