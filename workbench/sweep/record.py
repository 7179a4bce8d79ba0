"""What a sweep leaves: `runs/<notebook>/sweeps/<digest>.json`, a page beside it, and a value that shows itself.

The digest is that of the runs' keys: the same set of runs is the same sweep, however often it was interrupted. What
is true of a run stands in its own manifest; the record says which runs belong together.
"""

from __future__ import annotations

import hashlib
import html
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import storage
from workbench.folder import Run, utc_now
from workbench.storage import Place
from workbench.sweep.loop import Driven
from workbench.sweep.outlook import CACHED, ELSEWHERE, Survey
from workbench.sweep.page import failure_groups, page, summary_line

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "sweeps"


@dataclass(frozen=True)
class Sweep:
    """A sweep that ended: its facts as its JSON file holds them, and where its runs, that file and its page are.

    status   done, failed (some run did) or interrupted
    """

    facts: dict[str, Any]
    folder: Place
    page: Place

    @property
    def status(self) -> str:
        return self.facts["status"]

    @property
    def runs(self) -> list[Run]:
        """Its runs, in the order of the grid; those that were not made have the status "new"."""
        return [Run(self.folder / row["key"]) for row in self.facts["runs"]]

    def table(self) -> pd.DataFrame:
        """A row per run: its parameters, status, seconds, attempts, whether it was cached, key, kind of error.

        A parameter that is called like one of these comes as `param_<name>`.
        """
        import pandas as pd

        rows = []
        for row in self.facts["runs"]:
            own = {name: row[name] for name in ("status", "seconds", "attempts", "cached", "key")}
            own |= {"error": (row["error"] or {}).get("kind")}
            given = {f"param_{name}" if name in own else name: value for name, value in row["params"].items()}
            rows.append(given | own)
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Sweep of {self.facts['notebook']}: {summary_line(self.facts['runs'])}, in {self.page}"

    def _repr_html_(self) -> str:
        groups = [
            f"<li>{len(group)} x {html.escape(_cause(group[0]))}</li>" for group in failure_groups(self.facts["runs"])
        ]
        failures = f"<ul>{''.join(groups)}</ul>" if groups else ""
        return f"<p>{html.escape(repr(self))}</p>{failures}{self.table().to_html(index=False, max_rows=60, border=0)}"


class Writer:
    """Writes the record of one sweep: that it began, and what came of it."""

    def __init__(self, known: Survey, command: str) -> None:
        self.known, self.started, self.command = known, utc_now(), command
        self.folder = known.plans[0].run.folder.parent
        keys = "\n".join(sorted(planned.run.key for planned in known.plans))
        self.name = hashlib.sha256(keys.encode()).hexdigest()[:12]

    def begun(self) -> None:
        """Say that the sweep is at work: by whom, and on which runs."""
        self._write({"status": "running", "runs": [self._row(n, None) for n in range(len(self.known.plans))]})

    def ended(self, driven: Driven | None) -> Sweep:
        """Say what came of every run, and write the page; `driven` is None where the loop itself did not end."""
        rows = [self._row(n, driven) for n in range(len(self.known.plans))]
        states = {row["status"] for row in rows}
        status = "done" if states == {"done"} else "failed" if states <= {"done", "failed"} else "interrupted"
        facts = self._write({"status": status, "ended": utc_now(), "runs": rows})
        path = self.folder / FOLDER / f"{self.name}.html"
        storage.write(path, page(facts).encode())
        return Sweep(facts, self.folder, path)

    def _write(self, facts: dict[str, Any]) -> dict[str, Any]:
        folder = self.folder / FOLDER
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        facts |= {"notebook": self.known.notebook.as_posix(), "command": self.command, "started": self.started}
        facts |= {"pid": os.getpid(), "host": socket.gethostname(), "n_folded": self.known.n_folded}
        storage.write_json(folder / f"{self.name}.json", facts)
        return facts

    def _row(self, n: int, driven: Driven | None) -> dict[str, Any]:
        """One run as a row: from its outcome, else from what was known before, for a cached one from its manifest."""
        planned, given = self.known.plans[n], self.known.given[n]
        key, state = planned.run.key, self.known.states[planned.run.key]
        row: dict[str, Any] = {"key": key, "params": given, "command": planned.command, "cached": state == CACHED}
        row |= {"attempts": driven.attempts.get(key, 0) if driven else 0, "error": None, "seconds": None}
        outcome = driven.outcomes.get(key) if driven else None
        if outcome is not None:
            found = {"status": outcome.status, "seconds": outcome.seconds, "error": outcome.error}
            return row | found | {"findings": outcome.findings, "cached": not outcome.made and outcome.status == "done"}
        if state == CACHED:
            seconds = planned.run.manifest.get("seconds")
            return row | {"status": "done", "seconds": seconds, "findings": planned.run.findings}
        return row | {"status": "at work elsewhere" if state == ELSEWHERE else "not made", "findings": []}


def _cause(row: dict[str, Any]) -> str:
    error = row["error"]
    return f"{error['kind']}: {next((line for line in reversed(error['lines']) if line.strip()), '')}"
