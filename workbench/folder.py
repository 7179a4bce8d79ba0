"""The folder that one execution leaves behind: `runs/<notebook>/<key>/`.

Files: params, environment, manifest, findings (.json), notebook.ipynb, results/<name>/, figures/<name>.json.
In a notebook, `run = Run.start("10_hftp")` opens it and `run.keep`, `run.finding` fill it. `runs` may be a URL.
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

from workbench import storage
from workbench.environment import environment
from workbench.leases import held
from workbench.signature import signed
from workbench.storage import Place, write_json

if TYPE_CHECKING:
    from workbench.result import Result

RUN_VARIABLE = "WORKBENCH_RUN"  # set by the runner: the folder that Run.start opens
RUNS_VARIABLE = "WORKBENCH_RUNS"  # set by a user: where runs live


@dataclass(frozen=True)
class Run:
    """One execution of one notebook, as its folder."""

    folder: Place

    @classmethod
    def start(cls, notebook: str, **params: Any) -> Run:
        """The run that this kernel belongs to.

        Under `workbench run` it is the runner's folder, whose parameters are recorded already, and PyTorch is
        told to use deterministic algorithms. In an interactive kernel it is a new folder `interactive-<time>`
        that records `params`. Nothing is seeded: seeds are parameters.
        Where runs live on object storage, `keep` and `finding` of an interactive run write there; other files of its
        folder have to be written in the way that `storage.filled` offers.
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
        """Save a result and its default figure, signed with this run's key, under `name`; a second call replaces it."""
        with storage.filled(self.folder / "results" / checked_name(name), last="result.json") as folder:
            result.save(folder, overwrite=True)
        figures = self.folder / "figures"
        figures.mkdir(exist_ok=True)
        figure = signed(json.loads(str(result.plot().to_json())), self.key, self.command)
        write_json(figures / f"{name}.json", figure)

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
        """running, lost (its runner died), done, failed, interrupted or interactive; "new" before the first start."""
        return self.status_in(self.manifest)

    def status_in(self, manifest: Mapping[str, Any]) -> str:
        """The status that a manifest of this run, read before, tells: "running" is only true of the living."""
        status = manifest.get("status", "new")
        if status != "running" or self._is_this_kernels or held(self.folder):
            return status
        now = self.manifest.get("status", "new")  # it may have ended between two looks
        return "lost" if now == "running" else now

    @property
    def params(self) -> dict[str, Any]:
        return self._read("params.json") or {}

    @property
    def findings(self) -> list[str]:
        """The recorded findings; for a run that recorded none, the titles of its kept figures."""
        titles = (figure_title(figure) for figure in self.figures().values())
        return self._read("findings.json") or [title for title in titles if title]

    @property
    def command(self) -> str:
        """The command that remakes this run."""
        return self.manifest.get("command", "")

    def figures(self) -> dict[str, dict[str, Any]]:
        """The kept figures as plotly JSON, by name."""
        paths = storage.files(self.folder / "figures", "[!.]*.json")
        return {path.stem: storage.read_json(path) for path in paths}

    def results(self) -> dict[str, Result]:
        """The kept results, by name."""
        from workbench.result import Result  # here: it imports torch, which a runner does without

        found = {}
        for path in storage.files(self.folder, "results/*/result.json"):
            with storage.on_disk(path.parent) as folder:
                found[path.parent.name] = Result.load(folder)
        return found

    def __repr__(self) -> str:
        return f"Run {self.key} of {self.notebook}: {self.status}, in {_near(self.folder)}\n  {self.command}"

    def _repr_html_(self) -> str:
        folder, command = html.escape(str(_near(self.folder))), html.escape(self.command)
        return f"<p>Run <b>{html.escape(self.key)}</b> in <code>{folder}</code><br><code>{command}</code></p>"

    def _read(self, name: str) -> Any:
        try:
            return storage.read_json(self.folder / name, list if name == "findings.json" else dict)
        except FileNotFoundError:
            return None

    @property
    def _is_this_kernels(self) -> bool:
        return os.environ.get(RUN_VARIABLE) == str(self.folder)


def all_runs(runs: str | Place | None = None) -> list[Run]:
    """Every run under a folder or an fsspec URL, oldest first."""
    root = default_runs() if runs is None else storage.place(runs)
    paths = storage.files(root, "[!.]*/[!.]*/manifest.json")
    read = zip(paths, storage.read_all(paths), strict=True)
    manifests = {path: storage.json_in(path, data) for path, data in read if data}
    found = sorted(manifests, key=lambda path: (manifests[path].get("started", ""), path.parent.name))
    return [Run(path.parent) for path in found]


def default_runs() -> Place:
    """Where runs live: $WORKBENCH_RUNS, else `runs` in the project that holds the working directory, else in that."""
    if named := os.environ.get(RUNS_VARIABLE):
        return storage.place(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").exists():
            return Path("runs") if folder == here else folder / "runs"
    return Path("runs")


def run_command(notebook: str, params: Mapping[str, Any]) -> str:
    """The shell command that runs a notebook on these parameters."""
    options = [word for name, value in params.items() for word in ("-p", f"{name}={value}")]
    return shlex.join(["workbench", "run", notebook, *options])


def figure_title(figure: Mapping[str, Any]) -> str:
    """The title of a figure's JSON data, in one line."""
    title = figure.get("layout", {}).get("title") or {}
    text = title.get("text") or "" if isinstance(title, Mapping) else title
    return str(text).replace("<br>", " ")


def checked_name(name: str) -> str:
    """`name`, if it can name a folder on every system."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_ .-]{0,98}[A-Za-z0-9_]|[A-Za-z0-9_]", name):
        raise ValueError(f"name: got {name!r}, expected up to 100 letters, digits, '_', '-', inner dots or spaces.")
    return name


def _use_deterministic_algorithms() -> None:
    if torch := sys.modules.get("torch"):
        torch.use_deterministic_algorithms(True, warn_only=True)


def _near(path: Place) -> Place:
    """`path` as seen from the working directory, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
