"""A process that makes runs one after another: it reads a task per line and answers an outcome per line.

It stands between a Dask worker and the kernels. An interruption is a signal to it, as Ctrl-C is to `workbench run`;
the end of its input, which the death of its worker brings, interrupts it as well. So no kernel outlives its sweep,
and manifests stay true. Its warm parent of kernels lives as long as it does.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from workbench.environment import PACKAGE, deterministic_variables, n_cpus
from workbench.leases import held
from workbench.run import WORKER_VARIABLE, LeaseLost, Run, plan
from workbench.sweep.gpus import VARIABLE, one_gpu, visible_gpus
from workbench.sweep.task import Outcome, Task
from workbench.warm import WarmKernels

# What a warm parent has imported: a notebook that needs none of it starts sooner cold, by .3 s.
HEAVY = re.compile(r"\b(import|from)\s+(workbench|torch|transformers|nnsight|pandas|plotly)\b")
PATIENCE_S = 8.0  # for a runner that was told to end: its kernel is interrupted, then killed
LAST_LINES = 15


class Runner:
    """The other end: starts the process, gives it tasks, interrupts it. Used by one thread at a time.

    worker   the name of the Dask worker, for the manifests
    """

    def __init__(self, worker: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        # Not `-m`: the working directory must not shadow modules, and the package may not be installed.
        code = f"import sys; sys.path.append({str(PACKAGE.parent)!r}); from workbench.sweep.runner import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {WORKER_VARIABLE: worker},
            start_new_session=True,  # a terminal's Ctrl-C is for the driver, which decides
            text=True,
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def perform(self, task: Task) -> Outcome:
        """Have a task done. A runner that dies over it is an outcome as well."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(task.to_json() + "\n")
            self._process.stdin.flush()
        if line := self._process.stdout.readline():
            return Outcome.from_json(line)
        status = self._process.wait()
        return Outcome.failure(
            task.key, "runner failed", *self._last_lines(), f"The runner ended with status {status}."
        )

    def interrupt(self) -> None:
        """Interrupt its run: once is the kernel's chance to stop, twice is now."""
        if self.alive:
            self._process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End it, and its run if there is one."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _last_lines(self) -> list[str]:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").splitlines()[-LAST_LINES:]


def main() -> None:
    """What the process does: a line in, a line out, until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    at_work = threading.Event()
    threading.Thread(target=_listen, args=[tasks, at_work], daemon=True).start()
    with suppress(KeyboardInterrupt), ExitStack() as kept:
        place = Workplace(kept)
        while line := tasks.get():
            task = Task.from_json(line)
            try:
                at_work.set()
                outcome = place.perform(task)
            except KeyboardInterrupt:
                outcome = Outcome(task.key, "interrupted")
            except LeaseLost as error:
                outcome = Outcome.failure(task.key, "lease lost", str(error))
            except Exception as error:  # told to the driver, which decides whether to try again
                outcome = Outcome.failure(task.key, "runner failed", f"{type(error).__name__}: {error}")
            finally:
                at_work.clear()
            with suppress(BrokenPipeError):  # the worker died: the end of the input says so, too
                answers.write(outcome.to_json() + "\n")
                answers.flush()


class Workplace:
    """What the runs of one runner share: its GPU and its warm kernels, taken when first needed, kept until it ends."""

    def __init__(self, kept: ExitStack) -> None:
        self.kept = kept
        self.warm: dict[int, WarmKernels] = {}
        self.has_gpu = False

    def perform(self, task: Task) -> Outcome:
        """Plan the task again, here, and make its run."""
        with _working_directory(task.folder), _notebook(task) as path:
            planned = plan(path, task.given, runs=task.runs)
            if planned.run.key != task.key:
                return Outcome.failure(task.key, "another package", *_differs(task, planned.run.key))
            if planned.run.status == "done":
                return _outcome(planned.run, made=False)
            if not task.wait and held(planned.run.folder) is not None:
                return Outcome(task.key, "held")
            if task.gpu and not self.has_gpu:
                os.environ[VARIABLE] = self.kept.enter_context(one_gpu(visible_gpus()))
                self.has_gpu = True
            threads = task.threads or max(1, n_cpus() // task.share)
            planned = replace(planned, command=task.command)
            warm = self._warm_kernels(threads) if HEAVY.search(task.source) else None
            run = planned.execute(timeout=task.timeout, threads=threads, warm=warm)
        return _outcome(run, made=run.manifest.get("pid") == os.getpid())

    def _warm_kernels(self, threads: int) -> WarmKernels:
        if threads not in self.warm:
            self.warm[threads] = self.kept.enter_context(WarmKernels(deterministic_variables(threads)))
        return self.warm[threads]


def _listen(tasks: queue.SimpleQueue[str], at_work: threading.Event) -> None:
    """Pass on the lines of standard input; at its end, interrupt what is at work and end."""
    for line in sys.stdin:
        tasks.put(line)
    tasks.put("")
    if at_work.is_set():
        os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def _notebook(task: Task) -> Iterator[Path]:
    """The task's notebook on this machine: the file of that name if its text is the same, else a copy of its own."""
    path = Path(task.notebook)
    if path.is_file() and path.read_text(encoding="utf-8") == task.source:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
        copy = Path(folder, path.name)
        copy.write_bytes(task.source.encode())
        yield copy


@contextmanager
def _working_directory(folder: str) -> Iterator[None]:
    """The working directory of the command, where this machine has it."""
    if not Path(folder).is_dir():
        yield
        return
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def _outcome(run: Run, *, made: bool) -> Outcome:
    manifest = run.manifest
    return Outcome(run.key, run.status, made, manifest.get("seconds"), manifest.get("error"), run.findings)


def _differs(task: Task, key: str) -> list[str]:
    return [
        f"The run has the key {key} on {socket.gethostname()}, and had {task.key} where the sweep was planned.",
        "The package's source, or a file that a parameter names, is another here, or was changed since.",
        "Bring both to the same state, then give the same command again.",
    ]
