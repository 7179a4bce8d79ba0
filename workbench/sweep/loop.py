"""The loop that keeps every place busy until all tasks have an outcome: retries, lost workers, Ctrl-C.

One task per free place is handed out, no more: what waits, waits here, where it costs a few bytes and can be dropped.
The loop knows no Dask; `crew.Crew` is the real crew, and tests give it simulated ones.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from workbench.sweep.task import INFRASTRUCTURE, Outcome, Task

TICK_S = 0.5  # between two looks at the clock, and at which workers there are
LOOKING = 10  # a look that takes long is taken the more rarely: at most a tenth of the time
REFRESH_S = 30.0  # between two requests for workers that a batch system took away
PATIENCE_S = 20.0  # after Ctrl-C, for runs to record that they were interrupted


class Ticket(Protocol):
    """A task that was handed out; `lost` gives it up."""

    def outcome(self) -> Outcome: ...
    def lost(self) -> None: ...


class Workers(Protocol):
    """Where tasks are done."""

    @property
    def most(self) -> int | None: ...
    @property
    def refresh(self) -> Callable[[], Any]: ...
    @property
    def patience_s(self) -> float: ...
    def places(self) -> dict[str, int]: ...
    def start(self, place: str, task: Task, done: Callable[[Any], Any]) -> Ticket: ...
    def interrupt(self) -> None: ...


class Watcher(Protocol):
    """What is told while the loop goes on."""

    def started(self, task: Task, place: str) -> None: ...
    def finished(self, task: Task, outcome: Outcome) -> None: ...
    def again(self, task: Task, outcome: Outcome, attempt: int) -> None: ...
    def given_back(self, task: Task) -> None: ...
    def stopping(self, now: bool) -> None: ...
    def tick(self, n_places: int) -> None: ...


@dataclass(frozen=True)
class Driven:
    """The outcome of every task that has one, how often each was started, and what ended the loop early."""

    outcomes: dict[str, Outcome]
    attempts: dict[str, int]
    interrupted: bool = False
    trouble: OSError | None = None  # such as that the scheduler is gone


def drive(tasks: Iterable[Task], workers: Workers, watcher: Watcher, retries: int = 2) -> Driven:
    """Have every task done. A failure of the infrastructure is tried `retries` times more, after all others.

    After SIGINT or SIGTERM nothing is started any more and the runs are interrupted; after a second one, at once.
    """
    loop, trouble = _Loop(deque(tasks), workers, watcher, retries), None
    with _interruptions(loop.events):
        try:
            loop.run()
        except OSError as error:  # what is done so far is recorded first, then this is raised
            trouble = error
    return Driven(loop.outcomes, dict(loop.attempts), loop.n_interruptions > 0, trouble)


@dataclass
class _Loop:
    """The state of one `drive`."""

    waiting: deque[Task]
    workers: Workers
    watcher: Watcher
    retries: int
    at_work: dict[Ticket, tuple[Task, str]] = field(default_factory=dict)
    held: deque[Task] = field(default_factory=deque)  # at work in another process
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)
    events: queue.SimpleQueue[Ticket | None] = field(default_factory=queue.SimpleQueue)  # None: an interruption
    places: dict[str, int] = field(default_factory=dict)
    n_interruptions: int = 0
    next_look: float = 0.0  # times of a clock that only goes forward
    refreshed: float = -float("inf")
    seen: float = 0.0
    until: float = float("inf")

    def run(self) -> None:
        self.seen = time.monotonic()
        while (self.waiting or self.held or self.at_work) and time.monotonic() < self.until:
            self.look()
            self.hand_out()
            try:
                ticket = self.events.get(timeout=TICK_S)
            except queue.Empty:
                continue
            if ticket is not None:
                self.take_in(ticket)
            elif self.n_interruptions < 2:
                self.interrupt()

    def look(self) -> None:
        """Now and then, see which places there are. Raises OSError when there were none for too long."""
        now = time.monotonic()
        if now > self.next_look:
            self.places = self.workers.places()
            self.seen = now if self.places else self.seen
            self.give_up_lost()
            self.watcher.tick(sum(self.places.values()))
            spent_s = time.monotonic() - now
            self.next_look = now + max(TICK_S, LOOKING * spent_s)
        if now - self.refreshed > REFRESH_S:
            self.refreshed = now
            self.workers.refresh()
        if now - self.seen > self.workers.patience_s:
            raise OSError(f"sweep: no worker was there for {self.workers.patience_s:g} s. The same command resumes.")

    def hand_out(self) -> None:
        """Start one task per free place; those that others hold come last, and wait for them there."""
        if not self.waiting and self.held and not self.at_work:
            self.waiting.extend(replace(task, wait=True) for task in self.held)
            self.held.clear()
        if not self.waiting:
            return
        busy = Counter(place for _, place in self.at_work.values())
        for place, n_runs in self.places.items():
            for _ in range(n_runs - busy[place]):
                if not self.waiting or len(self.at_work) >= (self.workers.most or float("inf")):
                    return
                self.start(self.waiting.popleft(), place)

    def start(self, task: Task, place: str) -> None:
        self.attempts[task.key] += 1
        ticket = self.workers.start(place, task, self.events.put)
        self.at_work[ticket] = task, place
        self.watcher.started(task, place)

    def take_in(self, ticket: Ticket) -> None:
        """Take the outcome of a task: final, or another try."""
        if ticket not in self.at_work:  # given up before
            return
        task, place = self.at_work.pop(ticket)
        outcome = ticket.outcome()
        if outcome.kind == "worker lost":
            self.places.pop(place, None)  # at once: the next task would be lost there as well
        if self.n_interruptions:
            if outcome.kind in INFRASTRUCTURE or outcome.status == "held":
                outcome = Outcome(task.key, "interrupted")  # its worker or kernel fell to the interruption
        elif outcome.status == "interrupted":
            outcome = Outcome.failure(task.key, "runner failed", "The run was interrupted, but not by this sweep.")
        if outcome.status == "held":
            self.attempts[task.key] -= 1
            self.held.append(task)
            self.watcher.given_back(task)
        elif outcome.kind in INFRASTRUCTURE and self.attempts[task.key] <= self.retries:
            self.waiting.append(task)
            self.watcher.again(task, outcome, self.attempts[task.key])
        else:
            self.outcomes[task.key] = outcome
            self.watcher.finished(task, outcome)

    def give_up_lost(self) -> None:
        """Runs whose worker is gone: the scheduler may keep them for a worker of that address, which never comes."""
        for ticket, (_, place) in list(self.at_work.items()):
            if place not in self.places:
                ticket.lost()

    def interrupt(self) -> None:
        self.n_interruptions += 1
        self.until = time.monotonic() + (PATIENCE_S if self.n_interruptions < 2 else TICK_S)
        self.waiting.clear()
        self.held.clear()
        self.watcher.stopping(now=self.n_interruptions > 1)
        self.workers.interrupt()


@contextmanager
def _interruptions(events: queue.SimpleQueue[Ticket | None]) -> Iterator[None]:
    """SIGINT and SIGTERM become events, also where a shell started this process to ignore them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {
        number: signal.signal(number, lambda number, frame: events.put(None))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
