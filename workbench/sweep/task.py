"""What travels between the command that drives a sweep and the processes that make its runs: values, plain JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

# Failures of machines, not of notebooks: worth another try. A cell that fails would fail again.
INFRASTRUCTURE = frozenset({"kernel died", "runner failed", "lease lost", "worker lost"})


@dataclass(frozen=True)
class Task:
    """One run to make, with all that another machine needs for it.

    notebook, source    its path as the user named it, and its text: the file may have changed or not be there
    folder              the working directory of the command; relative paths mean what they meant there
    given, key          the parameters, and the key that they had when the sweep was planned
    share               how many runs share the machine, which parts its CPUs among them where `threads` is None
    gpu                 whether the run gets exactly one GPU; without, it sees what the worker sees
    wait                whether to wait for another process that works on the same run, or to say so at once
    """

    notebook: str
    source: str
    folder: str
    given: dict[str, Any]
    key: str
    command: str
    runs: str
    timeout: float | None = None
    threads: int | None = None
    share: int = 1
    gpu: bool = False
    wait: bool = False

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Task:
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    status    done, failed, interrupted, or held: another process works on this run
    made      whether the run was computed now; False where it was found done
    seconds   of the run    error   as in a run's manifest: kind, cell, source, lines
    """

    key: str
    status: str
    made: bool = False
    seconds: float | None = None
    error: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        return cls(**json.loads(line))

    @classmethod
    def failure(cls, key: str, kind: str, *lines: str) -> Outcome:
        return cls(key, "failed", error={"kind": kind, "lines": list(lines)})

    @property
    def kind(self) -> str:
        """The kind of the failure; empty without one."""
        return self.error["kind"] if self.error else ""
