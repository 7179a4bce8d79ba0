"""The parent of warm kernels: a process that imports the heavy libraries once and forks a fresh kernel per run.

    python -m workbench.forking SOCKET_FD MODULE ...       (started by workbench/warm.py, which is the other end)

A fork copies memory when it is written to, so a child's start costs milliseconds and nothing flows back. That is
safe while the parent computes nothing: no thread, no CUDA, no random number. It is checked before the first fork.
"""

from __future__ import annotations

import builtins
import ctypes
import gc
import importlib
import importlib.util
import json
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

THREADS_THAT_FORK = {"jemalloc_bg_thd"}  # pyarrow's allocator: its fork handlers stop and restart this thread
DEVICES = ("/dev/nvidia", "/dev/kfd")  # held open: the driver of a GPU was started, which no child could use
PATIENCE_S = 10.0  # with the other side, which sends its request at once
INLINE = "module://matplotlib_inline.backend_inline"  # ipykernel sets it before a cell can import matplotlib


def main() -> None:
    if not sys.flags.safe_path:
        del sys.path[0]  # the working directory, from `-m`; a kernel puts its own there
    fd, *modules = sys.argv[1:]
    os.environ.setdefault("MPLBACKEND", INLINE)
    with in_a_notebook():
        for name in modules:
            preload(name)
    if reason := unsafe():
        print(f"{reason}: a fork of it would not be a sound kernel", file=sys.stderr, flush=True)
        os._exit(1)  # at once: an ordinary exit would wait for that thread
    gc.collect()
    gc.freeze()  # else the first collection in a child would write to, and so copy, most pages
    request = Parent(socket.socket(fileno=int(fd))).serve()
    become_kernel(request)


@contextmanager
def in_a_notebook() -> Iterator[None]:
    """Libraries that ask while they are imported whether this is a notebook, as pandas and tqdm do, hear yes.

    One that wants to do something with the shell fails on the stand-in, and its kernels start cold.
    """
    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython.core.getipython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell

    answers = {"__init__": lambda self: None, "kernel": None, "config": {"IPKernelApp": {}}}
    stand_in: Any = type(ZMQInteractiveShell.__name__, (ZMQInteractiveShell,), answers)()
    InteractiveShell._instance = stand_in
    builtins.__dict__["get_ipython"] = get_ipython
    try:
        yield
    finally:
        InteractiveShell._instance = None
        del builtins.__dict__["get_ipython"]


def preload(name: str) -> None:
    """Import a module; of the workbench itself, whose names load on first use, all that its menu offers."""
    module = importlib.import_module(name)
    if name == "workbench":
        for public in module.__all__:
            getattr(module, public)


def unsafe() -> str | None:
    """Why this process must not be forked into kernels; None if it may."""
    if names := [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]:
        return f"an import started the thread {names[0]}"
    if devices := [path for path in _open_files() if path.startswith(DEVICES)]:
        return f"an import opened {devices[0]}"
    pid = os.fork()  # OpenBLAS ends its threads before a fork and starts them when needed; others would remain
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    left = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    foreign = [task for task in left if (task / "comm").read_text().strip() not in THREADS_THAT_FORK]
    return f"an import started {len(foreign)} threads outside of Python" if foreign else None


@dataclass
class Forked:
    """One kernel: its process, its own folder, and whether its end was told."""

    pid: int
    folder: Path
    told: bool = False


@dataclass
class Parent:
    """Answers each connection with one kernel; the connection's end is the kernel's end, and the reverse.

    A connection gets {"pid": ...} and later {"exit": status}, or {"refused": why}. A child that ended stays a zombie
    until the other side hangs up: so long its process id is given to nobody else, and a signal can't hit a stranger.
    """

    listener: socket.socket
    kernels: dict[socket.socket, Forked] = field(default_factory=dict)

    def serve(self) -> dict[str, Any]:
        """Work until the driver hangs up, which ends this process. Returns in each child, with its request."""
        self.woken, waker = socket.socketpair()
        for end in (self.woken, waker):
            end.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.ours = [self.listener, self.woken, waker]
        with selectors.DefaultSelector() as self.selector:
            for source in (sys.stdin.fileno(), self.listener, self.woken):
                self.selector.register(source, selectors.EVENT_READ)
            while True:
                for key, _ in self.selector.select():
                    if (request := self.handle(key.fileobj)) is not None:
                        return request

    def handle(self, source: Any) -> dict[str, Any] | None:
        if source is self.listener:
            return self.fork(self.listener.accept()[0])
        if source is self.woken:
            self.woken.recv(4096)
            self.tell_exits()
        elif source in self.kernels:
            self.bury(source)
        elif isinstance(source, int):
            self.end()
        return None

    def fork(self, connection: socket.socket) -> dict[str, Any] | None:
        """Fork for the request that a connection brings; the request itself in the child."""
        connection.settimeout(PATIENCE_S)
        try:
            with connection.makefile("rb") as lines:
                request = json.loads(lines.readline())
        except (OSError, ValueError):  # hung up, or fell silent, before asking
            connection.close()
            return None
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # no memory, too many processes: the other kernels must live
            _send(connection, {"refused": str(error)})
            connection.close()
            return None
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for end in (*self.ours, *self.kernels, connection):
                end.close()
            return request | {"parent": parent}
        self.kernels[connection] = Forked(pid, Path(request["log"]).parent)
        self.selector.register(connection, selectors.EVENT_READ)
        _send(connection, {"pid": pid})
        return None

    def tell_exits(self) -> None:
        for connection, kernel in self.kernels.items():
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if not kernel.told and (ended := os.waitid(os.P_PID, kernel.pid, flags)):
                kernel.told = True
                killed = ended.si_code != os.CLD_EXITED
                _send(connection, {"exit": -ended.si_status if killed else ended.si_status})

    def bury(self, connection: socket.socket) -> None:
        """The other side hung up: it has seen the end of this kernel, or it died and nobody needs the kernel."""
        kernel = self.kernels.pop(connection)
        self.selector.unregister(connection)
        connection.close()
        if not kernel.told:
            with suppress(ProcessLookupError):  # its group, unless it was born just now and leads none yet
                os.killpg(kernel.pid, signal.SIGKILL)
            os.kill(kernel.pid, signal.SIGKILL)
        os.waitpid(kernel.pid, 0)
        if not kernel.told:
            shutil.rmtree(kernel.folder, ignore_errors=True)

    def end(self) -> NoReturn:
        for connection in list(self.kernels):
            self.bury(connection)
        shutil.rmtree(Path(self.listener.getsockname()).parent, ignore_errors=True)
        os._exit(0)


def become_kernel(request: dict[str, Any]) -> None:
    """Make this fork what `python -m ipykernel_launcher` is in a process of its own, and run until it ends."""
    os.setsid()
    _die_with(request["parent"])
    _redirect(request["log"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"] | {"JPY_PARENT_PID": str(request["parent"])})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    spec = importlib.util.find_spec("ipykernel_launcher")
    assert spec is not None and spec.origin is not None
    sys.argv = [spec.origin, *request["arguments"]]
    _fresh_luck()
    handlers = _handlers_on_stderr()
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance(parent_handle=request["parent"])  # read from the environment at import otherwise
    app.initialize()
    for handler in handlers:
        handler.setStream(sys.stderr)
    app.start()


def _die_with(parent: int) -> None:
    """Have this process killed when its parent dies, also by a kill that no handler sees."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; the parent has one thread, so that its end is it
    if os.getppid() != parent:
        os._exit(1)


def _redirect(log: str) -> None:
    with Path(os.devnull).open("rb") as nothing, Path(log).open("ab") as file:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _fresh_luck() -> None:
    """Seed from the system what a cold start seeds so; Python's `random` does it by itself after a fork."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()


def _handlers_on_stderr() -> list[logging.StreamHandler[Any]]:
    """What the imports log with. In a cold kernel it was made later, and writes to the output of the cell."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return [each for each in handlers if isinstance(each, logging.StreamHandler) and each.stream is sys.stderr]


def _open_files() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        if link.is_symlink():  # the one that lists this folder is gone again
            found.append(str(link.readlink()))
    return found


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # hung up: the selector says so next
        return


if __name__ == "__main__":
    main()
