"""Leases: one holder at a time, none for longer than it lives, and a holder that was left behind finds out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workbench import files, leases, storage
from workbench.leases import Held, LeaseLost, held, lease

HOUR_S = 3600.0
NO_FLOCK = "from workbench import files; files.fcntl = None"
HOLD = """
import sys, time
from pathlib import Path
from workbench.leases import LeaseLost, lease
with lease(Path({folder!r}), ttl_s={ttl_s}) as mine:
    print("held", flush=True)
    with mine.on_loss(lambda: print("stop", flush=True)):
        sys.stdin.readline()
    try:
        mine.check()
    except LeaseLost as error:
        print(error, flush=True)
"""
COUNT = """
import time
from pathlib import Path
from workbench.leases import lease
total = Path({total!r})
for _ in range({rounds}):
    with lease(Path({folder!r})):
        n = int(total.read_text())
        time.sleep(0.002)  # time for another to read the same number
        total.write_text(str(n + 1))
"""


@pytest.fixture
def start(root) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a Python program in a process of its own, which is gone when the test is over."""
    with ExitStack() as undo:

        def begin(*code: str) -> subprocess.Popen[str]:
            words = [sys.executable, "-c", "\n".join(code)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = undo.enter_context(subprocess.Popen(words, cwd=root, text=True, **pipes))
            undo.callback(process.kill)
            watchdog = threading.Timer(60, process.kill)  # so that a test which waits for it fails instead of hanging
            watchdog.start()
            undo.callback(watchdog.cancel)
            return process

        yield begin


@pytest.fixture
def no_flock(monkeypatch) -> None:
    """A file system without locks: the lease file alone decides."""
    monkeypatch.setattr(files, "fcntl", None)


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path, monkeypatch) -> storage.Place:
    """A run's folder on a disk and on object storage."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    root = tmp_path if request.param == "disk" else storage.place(f"memory://{tmp_path.name}")
    return root / "nb" / "key"


def grown_old(folder: Path, seconds: float) -> None:
    """Let the last heartbeat be that long ago, by the clock of the storage."""
    (file,) = [path for path in storage.files(leases._leases_of(folder)) if path.name.isdigit()]
    then = time.time() - seconds
    os.utime(file, (then, then))


def refuse_to_wait(holder: object) -> None:
    raise BlockingIOError(str(holder))


def test_a_lease_tells_its_holder_as_long_as_it_is_held(folder):
    assert held(folder) is None
    with lease(folder) as mine:
        seen = held(folder)
        assert seen is not None and (seen.owner, seen.pid) == (mine.holder.owner, os.getpid())
        assert str(seen) == f"process {os.getpid()} on {seen.host}"
        mine.check()
    assert held(folder) is None
    with pytest.raises(LeaseLost, match="lease lost"), lease(folder):  # the next number
        mine.check()


def test_numbers_only_grow_and_only_the_last_is_kept(folder):
    numbers = []
    for _ in range(3):
        with lease(folder) as mine:
            numbers.append(mine.holder.number)
    assert numbers == [0, 1, 2]
    assert [path.name for path in storage.files(leases._leases_of(folder))] == ["000002"]


def test_an_error_inside_frees_the_lease_and_ends_its_thread(folder):
    before = threading.active_count()
    with pytest.raises(RuntimeError), lease(folder):
        raise RuntimeError
    assert held(folder) is None and threading.active_count() == before


def test_threads_of_one_process_take_turns(folder):
    inside, most = [], []

    def work() -> None:
        with lease(folder):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


@pytest.mark.parametrize("before", ["", NO_FLOCK], ids=["flock", "lease alone"])
def test_of_many_processes_that_start_at_once_one_works_at_a_time(tmp_path, start, before):
    total = tmp_path / "total"
    total.write_text("0")
    quick = "from workbench import leases; leases.POLL_S = 0.01"
    code = COUNT.format(total=str(total), folder=str(tmp_path / "nb" / "key"), rounds=6)
    processes = [start(before, quick, code) for _ in range(4)]
    assert [process.wait(100) for process in processes] == [0] * 4
    assert total.read_text() == "24"


def test_a_kill_frees_the_lease_at_once_on_the_same_machine(tmp_path, start):
    folder = tmp_path / "nb" / "key"
    process = start(HOLD.format(folder=str(folder), ttl_s=HOUR_S))
    assert process.stdout.readline() == "held\n"
    seen = held(folder)
    assert seen is not None and seen.pid == process.pid
    process.kill()
    process.wait(30)
    assert held(folder) is None
    with lease(folder, wait=refuse_to_wait) as mine:
        assert mine.holder.number == 1


@pytest.mark.parametrize("mark", ["another-machine 1", ""])
def test_a_free_lock_proves_nothing_where_it_is_not_the_one_that_the_holder_had(tmp_path, start, mark):
    folder = tmp_path / "nb" / "key"
    process = start(HOLD.format(folder=str(folder), ttl_s=HOUR_S))
    process.stdout.readline()
    process.kill()
    process.wait(30)
    leases._lock_of(folder).write_text(mark)  # as on a machine whose locks, or whose scratch, are its own
    assert held(folder).pid == process.pid
    with pytest.raises(BlockingIOError), lease(folder, wait=refuse_to_wait):
        pass


def test_a_second_process_is_told_whom_it_waits_for(tmp_path, start):
    folder = tmp_path / "nb" / "key"
    process = start(HOLD.format(folder=str(folder), ttl_s=HOUR_S))
    process.stdout.readline()
    told: list[str] = []

    def wait(holder: object) -> None:
        told.append(str(holder))
        process.stdin.write("\n")
        process.stdin.flush()

    with lease(folder, wait=wait):
        assert told == [f"process {process.pid} on {held(folder).host}"]
    assert process.wait(30) == 0 and process.stdout.read() == "", "it was not lost: it ended"


def test_without_locks_the_dead_are_known_by_their_silence(tmp_path, start, no_flock):
    folder = tmp_path / "nb" / "key"
    process = start(NO_FLOCK, HOLD.format(folder=str(folder), ttl_s=HOUR_S))
    process.stdout.readline()
    process.kill()
    process.wait(30)
    grown_old(folder, HOUR_S - 60)
    assert held(folder).pid == process.pid
    with pytest.raises(BlockingIOError, match=f"process {process.pid} on"), lease(folder, wait=refuse_to_wait):
        pass
    grown_old(folder, HOUR_S + 1)
    assert held(folder) is None
    with lease(folder, wait=refuse_to_wait) as mine:
        assert mine.holder.number == 1


def test_a_holder_that_was_frozen_is_told_to_stop_and_may_not_record(tmp_path, start, no_flock):
    folder = tmp_path / "nb" / "key"
    process = start(NO_FLOCK, HOLD.format(folder=str(folder), ttl_s=1.0))
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    with lease(folder):  # once it was silent for a second
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "stop\n", "from its renewing thread, within a beat"
        process.stdin.write("\n")
        process.stdin.flush()
        rest = process.communicate(timeout=30)[0].replace("stop\n", "")
        assert rest.startswith(f"lease lost: process {os.getpid()} on ")
        assert held(folder).pid == os.getpid(), "what it wrote when it woke up changes nothing"


def test_clocks_that_differ_by_a_day_decide_nothing(tmp_path, monkeypatch, no_flock):
    folder, real = tmp_path / "nb" / "key", time.time
    for skew_s in (-86_400, 86_400):
        with lease(folder):
            monkeypatch.setattr(leases.time, "time", lambda skew_s=skew_s: real() + skew_s)
            with pytest.raises(BlockingIOError), lease(folder, wait=refuse_to_wait):
                pass
            monkeypatch.undo()
            monkeypatch.setattr(files, "fcntl", None)


def test_a_lease_that_was_never_filled_is_somebodys_until_it_is_old(tmp_path, no_flock):
    folder = tmp_path / "nb" / "key"
    storage.create(leases._file(leases._leases_of(folder), 7), b"")
    with pytest.raises(BlockingIOError, match="another process"), lease(folder, wait=refuse_to_wait):
        pass
    grown_old(folder, leases.TTL_S + 1)
    with lease(folder) as mine:
        assert mine.holder.number == 8


def test_the_heartbeat_goes_on_through_failures_of_the_storage(folder, monkeypatch, no_flock):
    failures = iter([OSError("no answer")] * 2)
    write, beats = storage.write, []

    def unreliable(path: storage.Place, data: bytes) -> None:
        beats.append(path.name)
        if error := next(failures, None):
            raise error
        write(path, data)

    with lease(folder, ttl_s=0.2) as mine:
        monkeypatch.setattr(storage, "write", unreliable)
        deadline = time.monotonic() + 30
        while len(beats) < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not mine.lost and held(folder) is not None
    assert held(folder) is None


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan")])
def test_a_lease_needs_a_length(tmp_path, ttl_s):
    with pytest.raises(ValueError, match="expected seconds above 0"), lease(tmp_path / "key", ttl_s=ttl_s):
        pass


# The protocol under every interleaving: actors are threads that stop before each operation on a storage until they
# are called; time passes only when it is told to; an actor that is never called again is dead.


class Dead(BaseException):
    """Ends the thread of an actor that is not called again."""


@dataclass
class Table:
    """A storage with a clock of its own, in the place of `workbench.storage`."""

    in_one_step: bool
    turn: Callable[[], None]
    now: float = 0.0
    contents: dict[str, tuple[bytes, float]] = field(default_factory=dict)

    def files(self, folder: Path) -> list[Path]:
        self.turn()
        return sorted(folder / name for name in self.contents)

    def read(self, path: Path) -> bytes:
        self.turn()
        if path.name not in self.contents:
            raise FileNotFoundError
        return self.contents[path.name][0]

    def create(self, path: Path, data: bytes) -> None:
        self.turn()
        if path.name in self.contents:
            raise FileExistsError
        if not self.in_one_step:
            self.turn()
        self.contents[path.name] = (data, self.now)

    def write(self, path: Path, data: bytes) -> None:
        self.turn()
        self.contents[path.name] = (data, self.now)

    def modified(self, path: Path) -> float:
        self.turn()
        if path.name not in self.contents:
            raise FileNotFoundError
        return self.contents[path.name][1]

    def clock(self, folder: Path) -> float:
        self.turn()
        return self.now

    def creates_in_one_step(self, path: Path) -> bool:
        return self.in_one_step


class Actor(threading.Thread):
    """Takes the lease, works, looks whether it still has it, and gives it back."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(daemon=True)
        self.stage, self.called, self.over = stage, threading.Semaphore(0), False
        self.holder: leases.Holder | None = None
        self.done: bool | None = None  # True: recorded, False: lost

    def run(self) -> None:
        with suppress(Dead):
            self.called.acquire()
            self.holder = leases._take(Path("key"), leases.TTL_S, None, lambda holder: None)
            self.stage.taken.append(self.holder.number)
            mine = Held(Path("key"), self.holder)
            try:
                mine.beat()
                mine.check()
                self.stage.recorded.append(self.holder.number)
                self.done = True
                leases._write(leases._leases_of(Path("key")), leases.replace(self.holder, released=True))
            except LeaseLost:
                self.done = False
            self.holder = None
        self.over = True
        self.stage.stopped.release()

    def call(self) -> None:
        """Let it make its next operation."""
        if not self.over:
            self.called.release()
            self.stage.stopped.acquire()


class Stage:
    """Three actors on one storage; what they did, in order."""

    def __init__(self, in_one_step: bool) -> None:
        self.stopped, self.ending = threading.Semaphore(0), False
        self.taken: list[int] = []
        self.recorded: list[int] = []
        self.table = Table(in_one_step, self.turn)
        self.actors = [Actor(self) for _ in range(3)]
        for actor in self.actors:
            actor.start()

    def turn(self) -> None:
        actor = threading.current_thread()
        assert isinstance(actor, Actor)
        self.stopped.release()
        actor.called.acquire()
        if self.ending:
            raise Dead

    def inside(self) -> int:
        return sum(actor.holder is not None for actor in self.actors)

    def finish(self, actors: list[Actor]) -> None:
        """Call these in turn, with time going on, until each is through."""
        for _ in range(2000):
            for actor in actors:
                actor.call()
            self.table.now += 1.0
            if all(actor.over for actor in actors):
                return
        raise AssertionError("an actor never came through")

    def close(self) -> None:
        self.ending = True
        for actor in self.actors:
            actor.call()


@pytest.fixture
def played(monkeypatch) -> Iterator[Callable[..., Stage]]:
    """Plays a schedule: the number of the actor to call, or None for a time longer than a lease lives."""
    stages: list[Stage] = []

    def play(in_one_step: bool, schedule: list[int | None], watch: Callable[[Stage], None]) -> Stage:
        stage = Stage(in_one_step)
        stages.append(stage)
        clock: Any = type("Clock", (), {"sleep": lambda seconds: stage.turn(), "time": lambda: 0.0})
        monkeypatch.setattr(leases, "storage", stage.table)
        monkeypatch.setattr(leases, "time", clock)
        monkeypatch.setattr(leases, "_forget_below", lambda folder, number: forget(stage, number))
        for who in schedule:
            if who is None:
                stage.table.now += leases.TTL_S + 1
            else:
                stage.actors[who].call()
            watch(stage)
        return stage

    def forget(stage: Stage, number: int) -> None:
        stage.turn()
        for name in [name for name in stage.table.contents if int(name) < number]:
            del stage.table.contents[name]

    yield play


CALLS = st.lists(st.integers(0, 2), max_size=60)
CALLS_AND_TIME = st.lists(st.one_of(st.integers(0, 2), st.integers(0, 2), st.none()), max_size=60)
LATE_WRITE = [0, 0, 0, *[1] * 8, *[0] * 6]  # 0 looked and saw no file, 1 made one and holds it, then 0's arrives


EVERY = settings(max_examples=100, deadline=None, database=None, derandomize=True)


def test_while_no_lease_grows_old_there_are_never_two_holders(played):
    def watch(stage: Stage) -> None:
        assert stage.inside() <= 1

    @EVERY
    @given(CALLS)
    def law(schedule: list[int | None]) -> None:
        stage = played(True, schedule, watch)
        stage.finish(stage.actors)
        assert stage.taken == sorted(set(stage.taken)) == stage.recorded
        stage.close()

    law()


def test_whoever_was_frozen_or_killed_nobody_records_under_a_number_that_was_followed(played):
    @EVERY
    @given(CALLS_AND_TIME, st.sets(st.integers(0, 2), max_size=2))
    def law(schedule: list[int | None], killed: set[int]) -> None:
        stage = played(True, schedule, lambda stage: None)
        stage.finish([actor for n, actor in enumerate(stage.actors) if n not in killed])
        assert stage.taken == sorted(set(stage.taken)), "each number is one holder's, and they only grow"
        assert stage.recorded == sorted(set(stage.recorded))
        stage.close()

    law()


def test_where_files_are_not_created_in_one_step_a_beat_parts_those_who_both_won(played):
    inside = []

    @EVERY
    @example(LATE_WRITE)
    @given(CALLS)
    def law(schedule: list[int | None]) -> None:
        stage = played(False, schedule, lambda stage: inside.append(stage.inside()))
        names = [actor.holder.owner for actor in stage.actors if actor.holder]
        top = stage.table.contents[max(stage.table.contents)][0].decode() if stage.table.contents else ""
        assert sum(name in top for name in names) <= 1, "a check passes for one at most"
        stage.finish(stage.actors)
        stage.close()

    law()
    assert max(inside) == 2, "it can happen"
