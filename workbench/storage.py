"""Where runs live: a folder on this machine, or one on object storage by its URL. The one place that knows which.

A local folder is a `pathlib.Path`, any other an fsspec URL as a `UPath`, which has the same methods. What differs
stands here: writing whole files, creating a file once, the time of a file, copies in and out, patience.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from workbench.files import PARTIAL, json_bytes, write_atomically

Place: TypeAlias = Path  # or a UPath: types can't say "the methods of a path", so the checker takes both for this
T = TypeVar("T")

PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts at a storage that fails
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# Storages whose fsspec library creates an object only where there is none, in one step. That is known of AWS's S3,
# not of others that speak its language at an address of their own. `memory` lives in one process: a lock file decides.
CREATE_IN_ONE_STEP = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
OWN_ADDRESS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def place(root: str | Place) -> Place:
    """The folder that `root` names: a path, or a URL such as s3://bucket/runs, memory://runs or file:///runs.

    Keys and endpoints of a storage come from its own settings or from fsspec's ($FSSPEC_S3_ENDPOINT_URL and so on).
    Raises ValueError for a URL whose storage is unknown or whose library is missing.
    """
    if not isinstance(root, str):
        return root
    if "://" not in root:
        return Path(root)
    import fsspec  # here: a local folder does without
    from fsspec.implementations.local import LocalFileSystem
    from upath import UPath

    try:
        storage, path = fsspec.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise ValueError(f"runs: {root} can't be opened: {error}. Expected a path or an fsspec URL.") from None
    if type(storage) is LocalFileSystem:
        return Path(path)
    return cast(Any, UPath(root))


def patiently(action: Callable[[], T]) -> T:
    """What `action` returns, tried again for some seconds while the storage fails; its answers are final."""
    for pause_s in PAUSES_S:
        try:
            return action()
        except FINAL:
            raise
        except OSError:
            time.sleep(pause_s)
    return action()


def read(path: Place) -> bytes:
    return path.read_bytes() if isinstance(path, Path) else patiently(lambda: _fs(path).cat_file(_name(path)))


def read_all(paths: Sequence[Place]) -> list[bytes | None]:
    """The contents of many files of one storage, at once where it can; None for a file that is gone."""
    if not paths or isinstance(paths[0], Path):
        return [_read_or_none(path) for path in paths]
    found = patiently(lambda: _fs(paths[0]).cat([_name(path) for path in paths], on_error="omit"))
    return [found[_name(path)] if _name(path) in found else _read_or_none(path) for path in paths]


def json_in(path: Place, data: bytes, kind: type = dict) -> Any:
    """The JSON that a file holds, whose bytes were read. Raises ValueError that names a file which was damaged."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Bring the file back, or remove its folder.") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a {kind.__name__}. Bring the file back.")
    return found


def read_json(path: Place, kind: type = dict) -> Any:
    """The JSON in a file. Raises FileNotFoundError where there is none, ValueError that names one that was damaged."""
    return json_in(path, read(path), kind)


def write(path: Place, data: bytes) -> None:
    """Write a file whole or not at all; one that is there is replaced."""
    if isinstance(path, Path):
        write_atomically(path, data)
    else:
        patiently(lambda: _fs(path).pipe_file(_name(path), data))  # an object is replaced by one step


def write_json(path: Place, data: Any) -> None:
    write(path, json_bytes(data))


def create(path: Place, data: bytes) -> None:
    """Write a new file. Raises FileExistsError where there is one, also if this very call made it before a retry."""
    patiently(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    if isinstance(path, Path):
        with path.open("xb") as file:
            file.write(data)
    else:
        patiently(lambda: _fs(path).pipe_file(_name(path), data, mode="create"))


def creates_in_one_step(path: Place) -> bool:
    """Whether of two that `create` the same file only one can succeed."""
    if isinstance(path, Path):
        return True
    own_address = _fs(path).storage_options.get("endpoint_url") or any(map(os.environ.get, OWN_ADDRESS))
    return path.protocol in CREATE_IN_ONE_STEP and not (path.protocol in ("s3", "s3a") and own_address)


def modified(path: Place) -> float:
    """When a file was written, in seconds, by the clock of its storage."""
    if isinstance(path, Path):
        return path.stat().st_mtime
    try:
        when = patiently(lambda: _fs(path).modified(_name(path)))
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except NotImplementedError:
        raise ValueError(
            f"runs: {path.protocol} tells no times of files, which leases need. Use another storage."
        ) from None


def files(folder: Place, pattern: str = "") -> list[Place]:
    """The files below `folder`, in order; with a pattern such as "*/*.json", those whose path from there fits it."""
    if isinstance(folder, Path):
        return sorted(path for path in folder.glob(pattern or "**/*") if path.is_file())
    try:  # one listing of everything below: a walk would ask once per folder
        found = patiently(lambda: _fs(folder).find(_name(folder)))
    except FileNotFoundError:
        return []
    prefix = _name(folder).rstrip("/") + "/"
    names = [name.removeprefix(prefix) for name in found]
    return sorted(folder / name for name in names if not pattern or _fits(name, pattern))


def remove(folder: Place, first: str) -> None:
    """Remove a folder; its file `first` goes before the others, so that a kill leaves no half that looks whole."""
    patiently(lambda: (folder / first).unlink(missing_ok=True))
    if isinstance(folder, Path):
        if folder.exists():
            patiently(lambda: shutil.rmtree(folder))  # the kernel of a killed runner may write to it for a second more
    else:
        for path in files(folder):
            patiently(lambda path=path: path.unlink(missing_ok=True))


def move(folder: Place, to: Place, last: str) -> None:
    """Give a folder another name, in one step on a disk. On object storage `last` arrives last and leaves first."""
    remove(to, last)
    if isinstance(folder, Path):
        folder.rename(to)
        return
    for path in _last(folder / last, files(folder)):
        target = to / path.relative_to(folder)
        patiently(lambda path=path, target=target: _fs(path).copy(_name(path), _name(target)))
    remove(folder, last)


def publish(desk: Path, folder: Place, last: str) -> None:
    """Copy the files of the local folder `desk` to `folder`, `last` after all others; nothing if it is that folder."""
    if desk == folder:
        return
    paths = [path for path in files(desk) if not path.name.startswith(PARTIAL)]
    for path in _last(desk / last, paths):
        target = folder / path.relative_to(desk).as_posix()
        patiently(lambda path=path, target=target: _fs(target).put_file(str(path), _name(target)))


@contextlib.contextmanager
def on_disk(folder: Place) -> Iterator[Path]:
    """`folder` itself on this machine, else a copy of it to read, as long as the block lasts."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="workbench-") as copy:
        for path in files(folder):
            target = Path(copy, path.relative_to(folder).as_posix())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read(path))
        yield Path(copy)


@contextlib.contextmanager
def filled(folder: Place, last: str) -> Iterator[Path]:
    """A local folder to write to; what is in it when the block ends replaces the content of `folder`."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="workbench-") as desk:
        yield Path(desk)
        publish(Path(desk), folder, last)
        for path in files(folder):
            if not Path(desk, path.relative_to(folder).as_posix()).exists():
                path.unlink(missing_ok=True)


def workplace(folder: Place) -> Path:
    """The local folder in which work on `folder` is done: itself, else always the same one in this user's scratch."""
    if isinstance(folder, Path):
        return folder
    scratch = Path(tempfile.gettempdir(), f"workbench-{os.getuid() if hasattr(os, 'getuid') else 'runs'}")
    scratch.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and scratch.stat().st_uid != os.getuid():
        raise PermissionError(f"{scratch} belongs to another user. Point TMPDIR to a folder of your own.")
    root = hashlib.sha256(str(folder.parent).encode()).hexdigest()[:16]
    return scratch / root / folder.parent.name / folder.name


def clock(folder: Place) -> float:
    """The time now by the clock of the storage: that of a file written to `folder` for the purpose."""
    probe = folder / f"{PARTIAL}{uuid.uuid4().hex}"
    write(probe, b"now")
    try:
        return modified(probe)
    finally:
        probe.unlink(missing_ok=True)


def _fs(path: Any) -> Any:
    """The fsspec file system of a place that is not local; what it remembers is dropped, as others write there, too."""
    path.fs.invalidate_cache()
    return path.fs


def _name(path: Any) -> str:
    """How that file system calls the place."""
    return path.path


def _last(one: Place, paths: Sequence[Place]) -> list[Place]:
    return sorted(paths, key=lambda path: path == one)


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _read_or_none(path: Place) -> bytes | None:
    try:
        return read(path)
    except FileNotFoundError:
        return None
