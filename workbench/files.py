"""Files that survive a kill: written whole or not at all, locked while in use, known by their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

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
    write_atomically(path, json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


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


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`; if another process holds it, call `on_wait` and wait. A kill frees the lock.

    The file stays: removing it would let a third process lock a new file while the second holds the old one.
    """
    import fcntl  # here, because Windows has none and needs the rest of this file

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file unlocks it


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
