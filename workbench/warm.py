"""Warm kernels: one process imports the heavy libraries, and every run gets a fork of it instead of a new start.

    with WarmKernels(deterministic_variables()) as warm:
        plan(notebook, params).execute(warm=warm)

A warm kernel gives the numbers of a cold one to the byte. Where it could not, the start is cold, and a line says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from workbench.kernel import import_path, short_folder
from workbench.keys import package_digest

ALWAYS = ("ipykernel.kernelapp",)  # what every kernel imports before its first cell
PATIENCE_S = 300.0  # with a parent that is importing, on a machine with more runs than cores
LAST_PATIENCE_S = 10.0  # with a parent that was told to end, and may be importing still
SILENT = f"the parent of warm kernels gave no answer in {PATIENCE_S:g} s"
PER_RUN = {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "OLDPWD", "PWD", "_"}
PER_RUN_PREFIXES = ("JPY_", "PYTEST_", "WORKBENCH_")  # none of them is read while importing


class ColdStart(Exception):
    """Why a kernel can't be forked and must start cold, in words."""


class WarmKernels:
    """The parent of warm kernels for one set of start variables, alive inside its `with`.

    variables   what each kernel has in its environment from its start, such as `deterministic_variables(threads)`
    preload     modules to import once; "workbench" stands for everything on its menu

    Entering costs nothing: the imports go on while the first run starts, which waits for them. Any number of
    threads may ask for kernels. Leaving the block, or the death of this process, ends the parent and its kernels.
    Raises ValueError for a module that is not there.
    """

    def __init__(self, variables: Mapping[str, str], preload: Sequence[str] = ("workbench",)) -> None:
        self.variables, self.preload = dict(variables), tuple(preload)
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._parent: subprocess.Popen[bytes] | None = None
        self._is_silent = False

    def __enter__(self) -> WarmKernels:
        for name in self.preload:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                raise ValueError(f"WarmKernels: no module {name!r} to preload. Expected importable modules.")
        with ExitStack() as undo:
            folder = undo.enter_context(short_folder())
            if sys.platform == "linux":  # elsewhere, forking a process that loaded the system's frameworks is unsound
                self._start(folder)
                undo.callback(self._end)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def fork(self, arguments: Sequence[str], env: Mapping[str, str], cwd: str, log: Path) -> ForkedKernel | None:
        """A new kernel process with these arguments of ipykernel, in this environment and working directory.

        log   where its output goes; the folder that holds it is removed if this process dies before the kernel
        None, after a line that says why, where a fork can't be had or would not be what a cold start is.
        """
        try:
            self._check(env)
            return self._ask({"arguments": list(arguments), "env": dict(env), "cwd": cwd, "log": str(log)})
        except ColdStart as reason:
            with self._lock:
                if str(reason) not in self._said:
                    self._said.add(str(reason))
                    print(f"cold start: {reason}", file=sys.stderr, flush=True)
        return None

    def _ask(self, request: dict[str, Any]) -> ForkedKernel:
        with ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX))
            try:
                connection.settimeout(PATIENCE_S)
                connection.connect(str(self._address))
                connection.sendall(json.dumps(request).encode() + b"\n")
                kernel = ForkedKernel(connection)
            except TimeoutError:
                self._is_silent = True  # the next run does not wait for it again
                raise ColdStart(SILENT) from None
            except OSError:  # refused or hung up: it is gone
                raise ColdStart(self._last_line()) from None
            undo.pop_all()  # the connection is the kernel's now
        return kernel

    def _start(self, folder: Path) -> None:
        self._address, self._log = folder / "w", folder / "parent.log"
        self._environment = os.environ | self.variables | import_path()
        self._environment.pop("PYTHONEXECUTABLE", None)  # as for any kernel
        self._digest = package_digest()
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("wb") as log:
            listener.bind(str(self._address))
            listener.listen(128)
            words = [sys.executable, "-m", "workbench.forking", str(listener.fileno()), *ALWAYS, *self.preload]
            self._parent = subprocess.Popen(
                words,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def _end(self) -> None:
        assert self._parent is not None and self._parent.stdin is not None
        self._parent.stdin.close()  # it ends its kernels, then itself
        try:
            self._parent.wait(LAST_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._parent.kill()
            self._parent.wait()

    def _check(self, env: Mapping[str, str]) -> None:
        if self._parent is None:
            raise ColdStart(f"kernels can't be forked on {sys.platform}")
        if self._parent.poll() is not None:
            raise ColdStart(self._last_line())
        if self._is_silent:
            raise ColdStart(SILENT)
        if package_digest() != self._digest:
            raise ColdStart("the source of workbench changed after the warm parent had imported it")
        names = {name for name in {*env, *self._environment} if env.get(name) != self._environment.get(name)}
        names = {name for name in names - PER_RUN if not name.startswith(PER_RUN_PREFIXES)}
        if names:
            raise ColdStart(f"the warm parent was started with another {', '.join(sorted(names))}")

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines() if self._log.exists() else []
        return f"the parent of warm kernels ended. {lines[-1] if lines else 'It was killed.'}"


class ForkedKernel:
    """A kernel process forked by the parent, with the methods of `subprocess.Popen` that a kernel manager uses."""

    stdin = stdout = stderr = None

    def __init__(self, connection: socket.socket) -> None:
        self.returncode: int | None = None
        self._connection, self._unread = connection, b""
        born = self._message(PATIENCE_S)
        if not born:
            raise ConnectionResetError if born == {} else TimeoutError
        if "refused" in born:
            raise ColdStart(f"the parent of warm kernels could not fork: {born['refused']}")
        self.pid: int = born["pid"]

    def poll(self) -> int | None:
        """The exit status once it ended: the signal's number times -1 if one killed it, as its parent's death does."""
        return self._end(0.0)

    def wait(self, timeout: float | None = None) -> int | None:
        return self._end(timeout)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _end(self, patience_s: float | None) -> int | None:
        if self.returncode is None and (message := self._message(patience_s)) is not None:
            self.returncode = message.get("exit", -signal.SIGKILL)
            self._connection.close()
        return self.returncode

    def _message(self, patience_s: float | None) -> dict[str, Any] | None:
        """The parent's next message; empty if it hung up, None if there was none in that time."""
        self._connection.settimeout(patience_s)
        while b"\n" not in self._unread:
            try:
                piece = self._connection.recv(4096)
            except (BlockingIOError, TimeoutError):
                return None
            except ConnectionError:
                piece = b""
            if not piece:
                return {}
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)
