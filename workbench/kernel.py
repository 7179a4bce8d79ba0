"""One local kernel for one run: this Python, its own environment, its own sockets.

The kernel never depends on installed kernelspecs, on free TCP ports or on a writable home directory.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import site
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from jupyter_core.utils import ensure_event_loop

from workbench.environment import PACKAGE
from workbench.files import flock

if TYPE_CHECKING:
    from workbench.warm import WarmKernels

LAUNCHER = "ipykernel_launcher"
LONGEST_SOCKET_PATH = 90  # sockaddr_un holds 104 bytes on macOS, 108 on Linux; zmq adds "-5"
LAST_LINES = 15  # of a traceback, for the manifest
PREFIX, LOCK = "wb-", "alive.lock"  # of the temporary folders, and the file that tells that one is in use
PATIENCE_S = 3.0  # between interrupting a kernel and killing it


class KernelStart:
    """The start of one kernel: `manager_class` is what nbclient makes its kernel manager from.

    variables   environment variables on top of this process's own
    folder      an own, short-lived folder for sockets, the connection file and IPython's profile
    warm        what forks the kernel, if it can; without it the kernel is a new interpreter
    """

    def __init__(self, variables: Mapping[str, str], folder: Path, warm: WarmKernels | None = None) -> None:
        self.variables = dict(variables) | _own_folders(folder) | import_path()
        self.folder, self.log, self.warm = folder, folder / "kernel.log", warm
        self.forked = False  # whether `warm` could give a kernel
        self.started: list[AsyncKernelManager] = []

    @property
    def manager_class(self) -> type[AsyncKernelManager]:
        start = self

        class OneKernel(AsyncKernelManager):
            def __init__(self, **traits: Any) -> None:
                super().__init__(**traits | start._sockets())
                if start.warm is not None:
                    self.provisioner = Forking(start, parent=self)
                start.started.append(self)

            @property
            def kernel_spec(self) -> KernelSpec:
                return start._spec()

            async def start_kernel(self, **settings: Any) -> None:
                with start.log.open("ab") as log:  # what it says outside of cells, such as why it crashed
                    await AsyncKernelManager.start_kernel(self, stdout=log, stderr=log, **settings)

        return OneKernel

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the kernel and its children, if it runs."""
        for manager in self.started:
            pid = getattr(manager.provisioner, "pid", None)
            if pid is None or pid == os.getpid():
                continue
            try:  # the kernel leads its own process group
                os.killpg(pid, number)
            except ProcessLookupError:
                continue

    def last_words(self) -> list[str]:
        """What the kernel process wrote outside of cells: a crash and where it was, else its last lines."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        crash = text.rfind("Fatal Python error")
        return _last_lines(text) if crash < 0 else text[crash:].splitlines()[:LAST_LINES]

    def _spec(self) -> KernelSpec:
        # The values of a spec are templates.
        escaped = {name: value.replace("$", "$$") for name, value in self.variables.items()}
        # A crash in compiled code writes its Python stack to the log: the kernel's own stderr would die with it.
        watch_crashes = f"import faulthandler; faulthandler.enable(open({str(self.log)!r}, 'a'))"
        argv = [sys.executable, "-m", LAUNCHER, "-f", "{connection_file}"]
        argv.append(f"--IPKernelApp.exec_lines={watch_crashes}")
        return KernelSpec(argv=argv, env=escaped, display_name="Python", language="python")

    def _sockets(self) -> dict[str, Any]:
        traits: dict[str, Any] = {"connection_file": str(self.folder / "kernel.json")}
        if hasattr(os, "fork") and len(str(self.folder / "s")) <= LONGEST_SOCKET_PATH:
            traits |= {"transport": "ipc", "ip": str(self.folder / "s")}
        return traits


class Forking(LocalProvisioner):
    """Gets a kernel's process from the parent of warm kernels; where that can't be, starts it cold."""

    def __init__(self, start: KernelStart, **traits: Any) -> None:
        super().__init__(kernel_spec=start._spec(), **traits)
        self.start = start

    async def launch_kernel(self, cmd: list[str], **settings: Any) -> Any:
        assert self.start.warm is not None
        arguments, cwd = cmd[cmd.index(LAUNCHER) + 1 :], settings.get("cwd") or str(Path.cwd())
        self.process = self.start.warm.fork(arguments, settings["env"], cwd, self.start.log)
        if self.process is None:
            return await super().launch_kernel(cmd, **settings)
        self.start.forked = True
        self.pid = self.pgid = self.process.pid  # it will lead a group of its own, even if it does not yet
        return self.connection_info


@dataclass
class Watch:
    """What happened in the kernel, as the client's hooks tell it: the cell at work and the first error."""

    cell_index: int | None = None
    source: str = ""
    error: list[str] = field(default_factory=list)

    def on_cell_start(self, cell: Any, cell_index: int) -> None:
        self.cell_index, self.source = cell_index, cell.source

    def on_cell_error(self, cell: Any, cell_index: int, execute_reply: dict[str, Any]) -> None:
        content = execute_reply["content"]
        text = "\n".join(content.get("traceback", [])) or f"{content.get('ename')}: {content.get('evalue')}"
        self.error = _last_lines(text)


@dataclass
class Ended:
    """How the work of `supervise` ended."""

    timed_out: bool = False
    failure: BaseException | None = None


def supervise(work: Callable[[], Any], kernel: KernelStart, timeout: float | None) -> Ended:
    """Do `work` in a thread, so that this one is free for Ctrl-C and the time limit; leave no kernel over."""
    ended, finished = Ended(), threading.Event()

    def do() -> None:
        loop = ensure_event_loop()
        try:
            work()
        except BaseException as error:
            ended.failure = error
        finally:
            loop.close()
            finished.set()

    threading.Thread(target=do, daemon=True).start()
    try:
        # An event: a Thread.join that Ctrl-C interrupts takes the thread for ended (Python 3.11, 3.12).
        ended.timed_out = not finished.wait(timeout)
    finally:
        _stop(finished, kernel.send)
    return ended


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, also where a shell started this process to ignore them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path fits into a socket's address, if the machine has one.

    Those of processes that were killed are removed on this occasion: their locks can be had.
    """
    place = tempfile.gettempdir()
    if len(place) > LONGEST_SOCKET_PATH - 20 and os.access("/tmp", os.W_OK):
        place = "/tmp"
    for lock in Path(place).glob(f"{PREFIX}*/{LOCK}"):
        with suppress(OSError), lock.open("rb") as file:  # another user's, or removed by another process just now
            if flock(file):
                shutil.rmtree(lock.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place, ignore_cleanup_errors=True) as name:
        new = Path(name, f"new-{LOCK}")
        with new.open("wb") as file:
            if flock(file):
                new.rename(new.with_name(LOCK))  # from here on a living process holds every file of this name
            yield Path(name)


def _own_folders(folder: Path) -> dict[str, str]:
    """A user's IPython start-up files and history stay out of a run, which may have no home to write to."""
    return {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}


def import_path() -> dict[str, str]:
    """The kernel imports this very package, also from a checkout that is not installed."""
    parent = str(PACKAGE.parent)
    known = {*site.getsitepackages(), site.getusersitepackages()}
    paths = [parent] if parent not in known else []
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != parent]
    return {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}


def _last_lines(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[-LAST_LINES:]


def _stop(finished: threading.Event, send: Callable[[signal.Signals], None]) -> None:
    """End a kernel that still works: interrupt its cell, then kill it."""
    if finished.is_set():
        return
    send(signal.SIGINT)
    with suppress(KeyboardInterrupt):  # a second Ctrl-C means: now
        finished.wait(PATIENCE_S)
    while not finished.wait(0.2):
        send(signal.SIGKILL)
