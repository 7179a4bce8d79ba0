"""Files that survive a kill: written whole or not at all, locked while in use, known by their SHA-256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows, which needs the rest of this file
    fcntl = None

PARTIAL = ".partial-"


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, flush it to the disk, then rename."""
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON data to `path`, atomically, with keys in order."""
    write_atomically(path, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """JSON data as the bytes of a file, with keys in order."""
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hex. Large files are read once per process, unless they change."""
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


def sha256_of_folder(folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> str:
    """The SHA-256 over the relative names and contents of the files under `folder` that `keep` accepts."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and keep(path)):
        total.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode())
    return total.hexdigest()


class Turn(NamedTuple):
    """One holding of a lock file: its own mark, and the mark of the holding before it, if that was on this machine."""

    mark: str
    before: str | None


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[Turn | None]:
    """Hold the lock file `path`; if another process holds it, call `on_wait` and wait. A kill frees the lock.

    Yields this turn, or None where the system has no locks: then nothing is held. The file stays: removing it would
    let a third process lock a new file while the second holds the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        got = flock(file)
        if got is False:  # perhaps by `is_locked` of another process, for a moment
            time.sleep(0.02)
            got = flock(file)
        if got is False:
            on_wait()
            got = flock(file, wait=True)
        if not got:
            yield None
            return
        turn = Turn(f"{_boot()} {uuid.uuid4().hex}", lock_mark(path))
        file.truncate(0)
        file.write(turn.mark.encode())
        file.flush()
        yield turn  # closing the file unlocks it


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path` now, as far as this machine can tell."""
    try:
        with path.open("rb") as file:
            return flock(file, shared=True) is False
    except FileNotFoundError:
        return False


def lock_mark(path: Path) -> str | None:
    """The mark of the last turn at a lock file; None if that was on another machine, or before its last start.

    Locks are trusted only among the processes of one machine: on a shared disk some systems keep them to themselves.
    """
    try:
        mark = path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    return mark if mark.startswith(f"{_boot()} ") else None


def _boot() -> str:
    """What tells this start of this machine from others."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else socket.gethostname()


def flock(file: IO[bytes], *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file: True, False if another process has, or None where the system has no locks."""
    if fcntl is None:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            return None
        raise
    return True


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
