"""Who works on a run now: a small file with a heartbeat, which the living renew and the dead leave to others.

`with lease(folder) as held:` is the right to make the run of `folder`. Lease number n is a file that only one process
can create; a dead or a finished number n is followed by n + 1, and the highest number decides. So a holder that was
frozen and wakes up writes to a number that nobody asks any more, and finds that it lost.

What is guaranteed, for a holder that dies at any moment:
  one machine        Never two holders. A lock file (flock) lies under the lease, and a kill frees it at once.
  shared disk        Numbers are created by O_EXCL: never two holders of one number. A holder that is silent for longer
                     than `ttl_s` may be alive, frozen or cut off: it and its successor may overlap until its next beat.
  S3, GCS, Azure     The same, by a conditional put (S3: of AWS; gcsfs calls its own experimental).
  other storages     Two that start in the same moment may both create a number; after SETTLE_S both look again and
                     the last writer wins. A write that takes longer than that makes them overlap until a beat.
Every holder looks again right before it writes a manifest (`Held.check`); between that look and the write it could be
frozen for `ttl_s`, which no storage can rule out without a lock of its own.
Clocks: an age is the difference of two times that the storage itself gave. Only `held`, which writes nothing, compares
the storage's time with this machine's and so assumes that they differ by less than `ttl_s`.

Source: C. Gray and D. Cheriton, Leases, SOSP 1989; the numbers are the fencing tokens of M. Kleppmann (2016).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from workbench import storage
from workbench.files import Turn, is_locked, lock_mark, locked
from workbench.storage import Place

TTL_S = 60.0
SETTLE_S = 2.0  # for storages that can't create in one step
POLL_S = 5.0  # between two looks at a lease that another holds; sooner where it is short
BEATS = 4  # renewals per ttl: three may fail or be late


@dataclass(frozen=True)
class Holder:
    """One lease as its file tells it.

    number     of the lease        owner   a token that no two holders share
    heartbeat  the last renewal, seconds by the holder's clock: to be read, not to decide
    lock       mark of its turn at the lock file (`files.locked`); None where there are no locks
    """

    number: int
    owner: str
    host: str
    pid: int
    heartbeat: float
    ttl_s: float
    lock: str | None = None
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.owner else "another process"


class LeaseLost(OSError):
    """The lease went to another process while this one was frozen or cut off: what it made must not be recorded."""


class Held:
    """A lease that this process holds, renewed by a thread until the block of `lease` ends."""

    def __init__(self, folder: Place, holder: Holder) -> None:
        self.folder, self.holder = folder, holder
        self._lost, self._ended = threading.Event(), threading.Event()
        self._actions: list[Callable[[], Any]] = []
        self._thread = threading.Thread(target=self._renew, name=f"lease {folder.name}", daemon=True)

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    @contextmanager
    def on_loss(self, action: Callable[[], Any]) -> Iterator[None]:
        """Inside the block, a lost lease calls `action` at every beat, from the renewing thread: to stop the work."""
        self._actions.append(action)
        try:
            yield
        finally:
            self._actions.remove(action)

    def check(self) -> None:
        """Raise LeaseLost if the lease is another's by now. Raises OSError if the storage can't tell."""
        top = _top(_leases_of(self.folder))
        if top is None or top.owner != self.holder.owner:
            self._lost.set()
            raise LeaseLost(f"lease lost: {top or 'nobody'} took over {self.folder}; nothing was recorded here.")

    def beat(self) -> None:
        """Renew the lease. Raises LeaseLost."""
        self.check()
        _write(_leases_of(self.folder), replace(self.holder, heartbeat=time.time()))

    def _renew(self) -> None:
        while not self._ended.wait(self.holder.ttl_s / BEATS):
            with suppress(Exception):  # lost, or a storage that fails, each in its own way: the next beat tries again
                if not self.lost:
                    self.beat()
            with suppress(Exception):  # a kernel that ends by itself in this moment
                for action in tuple(self._actions) if self.lost else ():
                    action()

    def _release(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(Exception):  # lost, or a storage that fails: the lease then ends by its age
            self.check()
            _write(_leases_of(self.folder), replace(self.holder, heartbeat=time.time(), released=True))


@contextmanager
def lease(
    folder: Place, *, ttl_s: float = TTL_S, wait: Callable[[Holder | None], Any] = lambda holder: None
) -> Iterator[Held]:
    """Hold the lease of a run's folder; while another holds it, wait, after calling `wait` with that holder.

    A holder that was not heard of for `ttl_s` seconds is dead. The file of the last lease stays, marked as released:
    numbers must not start again.
    """
    if not ttl_s > 0:
        raise ValueError(f"lease: got ttl_s={ttl_s}, expected seconds above 0.")
    with locked(_lock_of(folder), lambda: wait(_top(_leases_of(folder)))) as turn:
        mine = Held(folder, _take(folder, ttl_s, turn, wait))
        mine._thread.start()
        try:
            yield mine
        finally:
            mine._release()


def held(folder: Place) -> Holder | None:
    """Who works on the run of `folder` now; None if nobody does, or who did is dead. Writes nothing."""
    top = _top(_leases_of(folder))
    if top is None or top.released:
        return None
    if top.lock is not None and top.lock == lock_mark(_lock_of(folder)):
        return top if is_locked(_lock_of(folder)) else None
    try:
        age_s = time.time() - storage.modified(_file(_leases_of(folder), top.number))
    except FileNotFoundError:  # followed by another in this moment
        return top
    return top if age_s <= top.ttl_s else None


def _take(folder: Place, ttl_s: float, turn: Turn | None, wait: Callable[[Holder | None], Any]) -> Holder:
    """Become the holder of the highest number."""
    leases, said = _leases_of(folder), False
    me = Holder(0, uuid.uuid4().hex, socket.gethostname(), os.getpid(), time.time(), ttl_s, turn and turn.mark)
    while True:
        top = _top(leases)
        if top is not None and top.owner == me.owner:
            _forget_below(leases, top.number)
            return top
        if top is not None and _works(leases, top, turn):
            if not said:
                wait(top)
            said = True
            time.sleep(min(POLL_S, top.ttl_s / 10))
            continue
        mine = replace(me, number=0 if top is None else top.number + 1, heartbeat=time.time())
        with suppress(FileExistsError):  # another was first, or this put arrived and its answer did not: look again
            storage.create(_file(leases, mine.number), _bytes(mine))
        if not storage.creates_in_one_step(leases):
            time.sleep(SETTLE_S)


def _works(leases: Place, top: Holder, turn: Turn | None) -> bool:
    """Whether the holder of the highest number must be waited for; `turn` is ours at the lock file."""
    if top.released:
        return False
    if turn is not None and top.lock is not None and top.lock == turn.before:  # it held the lock before us: it is gone
        return False
    try:
        return storage.clock(leases) - storage.modified(_file(leases, top.number)) <= top.ttl_s
    except FileNotFoundError:  # followed by another in this moment
        return True


def _top(leases: Place) -> Holder | None:
    """The lease with the highest number."""
    for number in sorted((int(path.name) for path in storage.files(leases) if path.name.isdigit()), reverse=True):
        try:
            told = Holder(**json.loads(storage.read(_file(leases, number))))
            return replace(told, number=number)  # the file's name decides
        except (FileNotFoundError, ValueError, TypeError):  # followed by another in this moment, or not yet filled
            return Holder(number, "", "", 0, 0.0, TTL_S)
    return None


def _forget_below(leases: Place, number: int) -> None:
    for path in storage.files(leases):
        if path.name.isdigit() and int(path.name) < number:
            with suppress(OSError):  # left to the next one
                path.unlink()


def _write(leases: Place, holder: Holder) -> None:
    storage.write(_file(leases, holder.number), _bytes(holder))


def _bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode() + b"\n"


def _file(leases: Place, number: int) -> Place:
    return leases / f"{number:06d}"


def _leases_of(folder: Place) -> Place:
    return folder.with_name(f".{folder.name}.lease")


def _lock_of(folder: Place) -> Any:
    desk = storage.workplace(folder)
    return desk.with_name(f".{desk.name}.lock")
