"""The folder that one execution leaves behind: `runs/<notebook>/<key>/`.

Files: params, environment, manifest, findings (.json), notebook.ipynb, results/<name>/, figures/<name>.json.
In a notebook, `run = Run.start("10_hftp")` opens it and `run.keep`, `run.finding` fill it.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.environment import environment
from workbench.files import write_json

if TYPE_CHECKING:
    from workbench.result import Result

RUN_VARIABLE = "WORKBENCH_RUN"  # set by the runner: the folder that Run.start opens
RUNS_VARIABLE = "WORKBENCH_RUNS"  # set by a user: where runs live


@dataclass(frozen=True)
class Run:
    """One execution of one notebook, as its folder."""

    folder: Path

    @classmethod
    def start(cls, notebook: str, **params: Any) -> Run:
        """The run that this kernel belongs to.

        Under `workbench run` it is the runner's folder, whose parameters are recorded already, and PyTorch is
        told to use deterministic algorithms. In an interactive kernel it is a new folder `interactive-<time>`
        that records `params`. Nothing is seeded: seeds are parameters.
        """
        if folder := os.environ.get(RUN_VARIABLE):
            _use_deterministic_algorithms()
            return cls(Path(folder))
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        run = cls(default_runs() / checked_name(notebook) / f"interactive-{stamp}")
        run.folder.mkdir(parents=True)
        write_json(run.folder / "params.json", params)
        write_json(run.folder / "environment.json", environment({}))
        command = run_command(f"notebooks/{notebook}.ipynb", params)
        manifest = {"status": "interactive", "started": utc_now(), "command": command}
        write_json(run.folder / "manifest.json", manifest)
        return run

    def keep(self, name: str, result: Result) -> None:
        """Save a result and its default figure under `name`; a second call replaces the first."""
        result.save(self.folder / "results" / checked_name(name), overwrite=True)
        figures = self.folder / "figures"
        figures.mkdir(exist_ok=True)
        write_json(figures / f"{name}.json", json.loads(str(result.plot().to_json())))

    def finding(self, sentence: str) -> None:
        """Record a finding in one line, for the report. The same sentence is recorded once."""
        line = " ".join(str(sentence).split())
        if not line:
            raise ValueError("finding: got an empty sentence, expected what the run found, in one line.")
        known = self._read("findings.json") or []
        if line not in known:
            write_json(self.folder / "findings.json", [*known, line])

    @property
    def notebook(self) -> str:
        return self.folder.parent.name

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def manifest(self) -> dict[str, Any]:
        """What the runner recorded: status, times, command, error, artefacts. Empty before the start."""
        return self._read("manifest.json") or {}

    @property
    def status(self) -> str:
        """running, done, failed, interrupted or interactive; "new" before the first start."""
        return self.manifest.get("status", "new")

    @property
    def params(self) -> dict[str, Any]:
        return self._read("params.json") or {}

    @property
    def findings(self) -> list[str]:
        """The recorded findings; for a run that recorded none, the titles of its kept figures."""
        titles = (_title(figure) for figure in self.figures().values())
        return self._read("findings.json") or [title for title in titles if title]

    @property
    def command(self) -> str:
        """The command that remakes this run."""
        return self.manifest.get("command", "")

    def figures(self) -> dict[str, dict[str, Any]]:
        """The kept figures as plotly JSON, by name."""
        paths = sorted((self.folder / "figures").glob("[!.]*.json"))
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def results(self) -> dict[str, Result]:
        """The kept results, by name."""
        from workbench.result import Result  # here: it imports torch, which a runner does without

        folders = sorted(path.parent for path in self.folder.glob("results/*/result.json"))
        return {folder.name: Result.load(folder) for folder in folders}

    def __repr__(self) -> str:
        return f"Run {self.key} of {self.notebook}: {self.status}, in {_near(self.folder)}\n  {self.command}"

    def _repr_html_(self) -> str:
        folder, command = html.escape(str(_near(self.folder))), html.escape(self.command)
        return f"<p>Run <b>{html.escape(self.key)}</b> in <code>{folder}</code><br><code>{command}</code></p>"

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None


def all_runs(runs: str | Path | None = None) -> list[Run]:
    """Every run under a folder, oldest first."""
    root = default_runs() if runs is None else Path(runs)
    found = [Run(path.parent) for path in root.glob("[!.]*/[!.]*/manifest.json")]
    return sorted(found, key=lambda run: (run.manifest.get("started", ""), run.key))


def default_runs() -> Path:
    """Where runs live: $WORKBENCH_RUNS, else `runs` in the project that holds the working directory, else in that."""
    if named := os.environ.get(RUNS_VARIABLE):
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").exists():
            return Path("runs") if folder == here else folder / "runs"
    return Path("runs")


def run_command(notebook: str, params: Mapping[str, Any]) -> str:
    """The shell command that runs a notebook on these parameters."""
    options = [word for name, value in params.items() for word in ("-p", f"{name}={value}")]
    return shlex.join(["workbench", "run", notebook, *options])


def checked_name(name: str) -> str:
    """`name`, if it can name a folder on every system."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_ .-]{0,98}[A-Za-z0-9_]|[A-Za-z0-9_]", name):
        raise ValueError(f"name: got {name!r}, expected up to 100 letters, digits, '_', '-', inner dots or spaces.")
    return name


def _use_deterministic_algorithms() -> None:
    if torch := sys.modules.get("torch"):
        torch.use_deterministic_algorithms(True, warn_only=True)


def _title(figure: Mapping[str, Any]) -> str:
    title = figure.get("layout", {}).get("title") or {}
    return str(title.get("text") or "").replace("<br>", " ") if isinstance(title, dict) else str(title)


def _near(path: Path) -> Path:
    """`path` as seen from the working directory, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
