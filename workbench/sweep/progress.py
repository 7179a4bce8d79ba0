"""How a sweep goes, as it goes: a live table in a terminal, one line per change elsewhere.

running 4   done 11   failed 1   left 8   about 2 min to go
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from workbench.sweep.outlook import counted, duration
from workbench.sweep.task import Outcome, Task

MOST_ROWS = 8  # runs at work that the live table names
REDRAW_S = 0.2
LONGEST_VALUE = 40  # characters of a parameter that is a text


def time_to_go(median_s: float | None, n_waiting: int, elapsed_s: Sequence[float], n_places: int) -> float | None:
    """Seconds until all runs are made, if each takes the median; None while nobody knows it."""
    if median_s is None or not n_places:
        return None
    work_s = median_s * n_waiting + sum(max(0.0, median_s - spent) for spent in elapsed_s)
    return max(work_s / n_places, median_s if n_waiting else 0.0)


def label(given: Mapping[str, Any]) -> str:
    """What a run was given, in one line."""
    return " ".join(f"{name}={_cut(value)}" for name, value in given.items()) or "defaults"


def why(outcome: Outcome) -> str:
    """A failure in one line: its kind, its cell, the last line of its error."""
    if outcome.error is None:
        return outcome.status
    cell = outcome.error.get("cell")
    where = "" if cell is None else f" in cell {cell}"
    last = next((line.strip() for line in reversed(outcome.error["lines"]) if line.strip()), "")
    return f"{outcome.kind}{where}: {last}"


def _cut(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


@dataclass
class Progress:
    """Counts what happens and tells it. `live`: redraw a table in place; else one line per change.

    median_s   of past runs, until this sweep has finished some itself
    """

    n_tasks: int
    stream: TextIO
    live: bool
    median_s: float | None = None
    n_done: int = 0
    n_failed: int = 0
    n_interrupted: int = 0
    n_places: int = 0
    seconds: list[float] = field(default_factory=list)
    at_work: dict[str, tuple[Task, float]] = field(default_factory=dict)
    _drawn: int = 0
    _redrawn: float = 0.0

    @classmethod
    def on(cls, n_tasks: int, median_s: float | None, stream: TextIO) -> Progress:
        live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        return cls(n_tasks, stream, live, median_s)

    def started(self, task: Task, place: str) -> None:
        self.at_work[task.key] = task, time.monotonic()
        self._redraw()

    def finished(self, task: Task, outcome: Outcome) -> None:
        spent = self._ended(task)
        self.n_done += outcome.status == "done"
        self.n_failed += outcome.status == "failed"
        self.n_interrupted += outcome.status == "interrupted"
        if outcome.made and outcome.status == "done":
            self.seconds.append(spent)
        if outcome.status == "failed":
            self._say(f"failed       {label(task.given)}   {why(outcome)}")
        elif not self.live:
            self._say(f"{outcome.status:<11}  {label(task.given)}   {duration(spent)}   [{self._counts()}]")
        self._redraw()

    def again(self, task: Task, outcome: Outcome, attempt: int) -> None:
        self._ended(task)
        self._say(f"again        {label(task.given)}   attempt {attempt} ended: {why(outcome)}")

    def given_back(self, task: Task) -> None:
        self._ended(task)

    def stopping(self, now: bool) -> None:
        n_runs = counted(len(self.at_work), "run")
        if now:
            self._say("ending now")
        else:
            self._say(f"interrupted: nothing new is started, {n_runs} at work end; Ctrl-C again: now")

    def tick(self, n_places: int) -> None:
        if n_places != self.n_places and (not self.live or not n_places):
            self._say(f"{counted(n_places, 'worker')} there")
        self.n_places = n_places
        self._redraw()

    def close(self) -> None:
        """Leave the last counts, without the table."""
        self._erase()
        if self.live:
            print(self._counts(), file=self.stream, flush=True)

    def _ended(self, task: Task) -> float:
        _, started = self.at_work.pop(task.key, (task, time.monotonic()))
        return time.monotonic() - started

    def _counts(self) -> str:
        ended = self.n_done + self.n_failed + self.n_interrupted
        n_waiting = self.n_tasks - ended - len(self.at_work)
        known = statistics.median(self.seconds) if self.seconds else self.median_s
        spent = [time.monotonic() - started for _, started in self.at_work.values()]
        left_s = time_to_go(known, n_waiting, spent, self.n_places)
        to_go = "" if left_s is None or not n_waiting + len(spent) else f"   about {duration(left_s)} to go"
        return f"running {len(spent)}   done {self.n_done}   failed {self.n_failed}   left {n_waiting}{to_go}"

    def _say(self, line: str) -> None:
        self._erase()
        print(line, file=self.stream, flush=True)

    def _redraw(self) -> None:
        if not self.live or time.monotonic() - self._redrawn < REDRAW_S:
            return
        self._redrawn = time.monotonic()
        columns = shutil.get_terminal_size().columns
        shown = list(self.at_work.values())[:MOST_ROWS]
        rows = [f"  {duration(self._redrawn - began):>8}  {label(task.given)}" for task, began in shown]
        if len(self.at_work) > MOST_ROWS:
            rows.append(f"  and {len(self.at_work) - MOST_ROWS} more")
        lines = [" ".join(line.split("\n"))[: columns - 1] for line in [self._counts(), *rows]]
        self._erase()
        self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()
        self._drawn = len(lines)

    def _erase(self) -> None:
        if self._drawn:
            self.stream.write(f"\x1b[{self._drawn}F\x1b[J")  # up to the table's first line; clear from there
            self._drawn = 0
