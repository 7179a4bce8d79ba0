"""Dask workers as places where runs are made: one run at a time per place, each place with a runner of its own.

The driver chooses the place of every task (`Crew.start`), so that a worker that dies takes one run with it and no
other, and every attempt is counted here, whatever the scheduler's own `allowed-failures`. Outcomes come back as
events of the scheduler, which it pushes: to ask for the result of each future costs a round trip per run.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from distributed import WorkerPlugin, get_worker
from distributed.scheduler import KilledWorker

from workbench.sweep.task import Outcome, Task


@dataclass(frozen=True)
class Crew:
    """The workers of one Dask scheduler, for one sweep.

    work      what a worker does with a task: `perform`, or in simulations anything else
    refresh   called now and then: asks a batch system again for workers that it took away
    most      how many runs go on at once at most
    patience_s  seconds without any worker after which the sweep ends; a batch system may take hours
    """

    client: Any
    name: str
    gpu: bool = False
    most: int | None = None
    work: Callable[[Task, str], Outcome] | None = None
    refresh: Callable[[], Any] = lambda: None
    patience_s: float = float("inf")
    numbers: Iterator[int] = field(default_factory=count)
    tickets: dict[str, DaskTicket] = field(default_factory=dict)  # by Dask's key; those at work

    def __post_init__(self) -> None:
        self.client.subscribe_topic(self.name, self._hear)

    def places(self) -> dict[str, int]:
        """The address of every worker that is there now, and how many runs it makes at once.

        Raises OSError in words if the scheduler is gone.
        """
        try:
            if not self.gpu:
                return dict(self.client.nthreads())
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
            return {address: int(facts["resources"].get("GPU", 0)) for address, facts in workers.items()}
        except (OSError, RuntimeError) as error:
            raise OSError(f"sweep: the Dask scheduler is gone ({error}). The same command resumes.") from None

    def start(self, place: str, task: Task, done: Callable[[Any], Any]) -> DaskTicket:
        """Hand a task to a worker; `done` is called with its ticket, in another thread, when it ended."""
        key = f"{self.name}-{task.key}-{next(self.numbers)}"
        ticket = self.tickets[key] = DaskTicket(task)
        ticket.future = self.client.submit(
            told,
            self.work or perform,
            task,
            self.name,
            key,
            key=key,
            workers=[place],
            resources={"GPU": 1} if self.gpu else None,
            pure=False,
        )
        ticket.future.add_done_callback(lambda future: done(self.tickets.pop(key)))
        return ticket

    def interrupt(self) -> None:
        """Interrupt every run of this sweep; called again, end them now."""
        with suppress(OSError, RuntimeError):  # a worker that is just dying, or a scheduler that is gone
            self.client.run(_interrupt, self.name, on_error="ignore")

    def _hear(self, event: tuple[float, list[str]]) -> None:
        key, line = event[1]
        if key in self.tickets:  # else it was given up before
            self.tickets[key].told = Outcome.from_json(line)


@dataclass(eq=False)
class DaskTicket:
    """A task that was handed out, as Dask's future of it; `lost` gives it up."""

    task: Task
    future: Any = None
    told: Outcome | None = None  # by the worker, before the future ends

    def outcome(self) -> Outcome:
        """What came of it; the death of its worker and errors on the way are outcomes too."""
        try:
            return self.told or self.future.result(timeout=30)
        except (KilledWorker, CancelledError) as error:
            worker = getattr(error, "last_worker", None)
            where = f" {worker.address}" if worker is not None else ""
            return Outcome.failure(self.task.key, "worker lost", f"The worker{where} ended while the run was at work.")
        except Exception as error:  # of Dask or of the network: told, and tried again
            return Outcome.failure(self.task.key, "runner failed", f"{type(error).__name__}: {error}")
        finally:
            self.future.release()

    def lost(self) -> None:
        self.future.cancel(force=True, msg="its worker is gone")


@dataclass
class Runners(WorkerPlugin):
    """The Dask plugin that keeps a worker's runners: one per run at a time, made when needed, ended with the worker.

    own   whether the worker was started for this sweep: then it leaves Ctrl-C to the driver
    """

    name: str
    own: bool
    worker: str = ""
    stopped: bool = False
    idle: list[Any] = field(default_factory=list)
    at_work: list[Any] = field(default_factory=list)

    def setup(self, worker: Any) -> None:
        self.worker = str(worker.name)
        if self.own and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def teardown(self, worker: Any) -> None:
        self.stopped = True
        for runner in [*self.at_work, *self.idle]:
            runner.close()

    def perform(self, task: Task) -> Outcome:
        from workbench.sweep.runner import Runner

        runner = self.idle.pop() if self.idle else Runner(self.worker)
        self.at_work.append(runner)
        try:
            outcome = runner.perform(task) if not self.stopped else Outcome(task.key, "interrupted")
        finally:
            self.at_work.remove(runner)
        if runner.alive:
            self.idle.append(runner)
        elif self.stopped:
            return Outcome(task.key, "interrupted")
        return outcome

    def interrupt(self) -> None:
        self.stopped = True
        for runner in list(self.at_work):
            runner.interrupt()


def told(work: Callable[[Task, str], Outcome], task: Task, name: str, key: str) -> Outcome:
    """Do a task, and tell its outcome to whoever listens before the future of this call ends."""
    outcome = work(task, name)
    get_worker().log_event(name, [key, outcome.to_json()])
    return outcome


def perform(task: Task, name: str) -> Outcome:
    """What a worker does with a task."""
    runners: Any = get_worker().plugins[name]
    return runners.perform(task)


def _interrupt(name: str, dask_worker: Any) -> None:
    if name in dask_worker.plugins:
        dask_worker.plugins[name].interrupt()
