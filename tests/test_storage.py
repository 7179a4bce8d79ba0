"""Storage: the same words for a folder and for object storage, through failures, and never half a run."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pandas as pd
import plotly.graph_objects as go
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath.implementations.memory import MemoryPath
from upath.registry import register_implementation

from workbench import storage
from workbench.result import Result
from workbench.run import Run, all_runs, execute, plan
from workbench.storage import Place, place

PROJECT = Path(__file__).parents[1]


class Unreliable(MemoryFileSystem):
    """Object storage in memory that fails now and then, before or after it did what was asked."""

    protocol = "unreliable"
    store: dict[str, Any] = {}  # noqa: RUF012  # as its base has it
    pseudo_dirs = [""]  # noqa: RUF012
    dice = random.Random(0)
    rate = 0.0
    n_failed = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("unreliable://", "memory://", 1))

    def _maybe_fail(self) -> None:
        if Unreliable.dice.random() < Unreliable.rate:
            Unreliable.n_failed += 1
            raise ConnectionResetError("the storage hung up")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **settings: Any) -> None:
        self._maybe_fail()
        super().pipe_file(path, value, mode=mode, **settings)
        self._maybe_fail()  # it arrived, the answer did not

    def put_file(self, *words: Any, **settings: Any) -> None:
        self._maybe_fail()
        super().put_file(*words, **settings)
        self._maybe_fail()

    def cat_file(self, *words: Any, **settings: Any) -> bytes:
        self._maybe_fail()
        return super().cat_file(*words, **settings)

    def find(self, *words: Any, **settings: Any) -> Any:
        self._maybe_fail()
        return super().find(*words, **settings)


class UnreliablePath(MemoryPath):
    """Its places, which upath wants to know of."""


@pytest.fixture
def unreliable(monkeypatch, tmp_path) -> Iterator[Place]:
    """A root on storage that fails in every third operation."""
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    register_implementation("unreliable", UnreliablePath, clobber=True)
    monkeypatch.setattr(storage, "PAUSES_S", (0.001,) * 12)  # 1/3 ^ 13: a chance of 6e-7 to fail so often
    monkeypatch.setattr(Unreliable, "rate", 1 / 3)
    monkeypatch.setattr(Unreliable, "dice", random.Random(0))
    yield place(f"unreliable://{tmp_path.name}")
    Unreliable.store.clear()


@pytest.fixture(params=["disk", "memory", "unreliable"])
def root(request, tmp_path) -> Place:
    if request.param == "unreliable":
        return request.getfixturevalue("unreliable")
    return tmp_path / "root" if request.param == "disk" else place(f"memory://{tmp_path.name}")


def filled(folder: Place, **texts: str) -> Place:
    for name, text in texts.items():
        with suppress(FileExistsError):  # an unreliable storage made it in an attempt before
            storage.create(folder / name, text.encode())
    return folder


def names(folder: Place) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in storage.files(folder)]


def test_what_was_written_is_read(root):
    folder = filled(root / "a" / "b", one="1")
    storage.write(folder / "one", b"2")
    storage.write_json(folder / "two", {"z": 1, "a": "ü"})
    assert (
        storage.read(folder / "one") == b"2" and storage.read(folder / "two") == b'{\n "a": "\xc3\xbc",\n "z": 1\n}\n'
    )
    assert storage.read_all([folder / "one", folder / "none", folder / "two"])[:2] == [b"2", None]
    with pytest.raises(FileNotFoundError):
        storage.read(folder / "none")


def test_what_a_storage_remembers_of_its_files_is_not_believed(tmp_path):
    root = filled(place(f"memory://{tmp_path.name}"), file="1")
    remembered: list[int] = []
    storage_of = root.fs
    storage_of.invalidate_cache = lambda path=None: remembered.clear()
    try:
        for look in (storage.files, lambda folder: storage.modified(folder / "file"), storage.clock):
            remembered.append(1)
            look(root)
            assert not remembered
    finally:
        del storage_of.invalidate_cache


def test_a_file_is_created_once(tmp_path):
    for root in (tmp_path, place(f"memory://{tmp_path.name}")):
        storage.create(root / "x" / "once", b"first")
        with pytest.raises(FileExistsError):
            storage.create(root / "x" / "once", b"second")
        assert storage.read(root / "x" / "once") == b"first" and storage.creates_in_one_step(root)


def test_only_storages_that_are_known_for_it_count_as_creating_in_one_step(unreliable, monkeypatch):
    assert not storage.creates_in_one_step(unreliable)

    def s3(**options: str) -> Any:
        return SimpleNamespace(
            protocol="s3", fs=SimpleNamespace(storage_options=options, invalidate_cache=lambda: None)
        )

    aws, other = s3(), s3(endpoint_url="http://localhost")
    assert storage.creates_in_one_step(aws) and not storage.creates_in_one_step(other)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost")
    assert not storage.creates_in_one_step(aws)


def test_files_are_found_by_the_same_patterns(root):
    for name in ("nb/k1/manifest.json", "nb/.k1.previous/manifest.json", "nb/k1/results/x/manifest.json", "top.json"):
        filled((root / name).parent, **{Path(name).name: "{}"})
    runs = storage.files(root, "[!.]*/[!.]*/manifest.json")
    assert [path.relative_to(root).as_posix() for path in runs] == ["nb/k1/manifest.json"]
    assert names(root / "nb" / "k1") == ["manifest.json", "results/x/manifest.json"]
    assert storage.files(root / "none", "*/x") == storage.files(root / "none") == []


def test_a_folder_moves_whole_and_replaces_what_was_there(root):
    filled(root / "to", old="old", manifest="old")
    storage.move(filled(root / "from", manifest="m", a="1"), root / "to", last="manifest")
    assert names(root) == ["to/a", "to/manifest"] and storage.read(root / "to" / "manifest") == b"m"
    storage.remove(root / "to", first="manifest")
    storage.remove(root / "to", first="manifest")  # gone already
    assert names(root) == []


def test_a_copy_to_storage_that_breaks_off_has_no_manifest(tmp_path, monkeypatch):
    desk, folder = tmp_path / "desk", place(f"memory://{tmp_path.name}/run")
    filled(desk, **{name: name for name in ("a", "manifest.json", "z")})
    filled(desk / "results" / "manifest.json", file="a folder may be called so")
    put, seen = MemoryFileSystem.put_file, []

    def breaks(self: MemoryFileSystem, here: str, there: str, **settings: Any) -> None:
        seen.append(Path(there).name)
        if len(seen) == n_whole + 1:
            raise KeyboardInterrupt
        put(self, here, there, **settings)

    monkeypatch.setattr(MemoryFileSystem, "put_file", breaks)
    n_whole = 0
    while n_whole < 4:
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            storage.publish(desk, folder, "manifest.json")
        assert not (folder / "manifest.json").exists()
        n_whole += 1
    seen.clear()
    storage.publish(desk, folder, "manifest.json")
    assert seen[-1] == "manifest.json" and names(folder) == ["a", "manifest.json", "results/manifest.json/file", "z"]


def test_a_folder_is_filled_and_looked_at_through_a_copy(root):
    folder = filled(root / "kept", old="old")
    with storage.filled(folder, last="new") as desk:
        (desk / "new").write_text("new")
        (desk / "inner").mkdir(exist_ok=True)
        (desk / "inner" / "deep").write_text("deep")
        (desk / "old").unlink(missing_ok=True)
    assert names(folder) == ["inner/deep", "new"]
    with storage.on_disk(folder) as copy:
        assert (copy / "inner" / "deep").read_text() == "deep"


def test_a_failure_inside_leaves_what_was_there(tmp_path):
    folder = filled(place(f"memory://{tmp_path.name}/kept"), old="old")
    with pytest.raises(RuntimeError), storage.filled(folder, last="new") as desk:
        (desk / "new").write_text("half")
        raise RuntimeError
    assert names(folder) == ["old"]


def test_the_clock_of_a_storage_moves_on_and_leaves_nothing(root):
    folder = filled(root / "x", file="1")
    before = storage.modified(folder / "file")
    assert 0 <= storage.clock(folder) - before < 60 and names(folder) == ["file"]


def test_failures_are_tried_again_and_answers_are_final(monkeypatch):
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))
    for error, n_calls in ((ConnectionResetError, 3), (TimeoutError, 3), (FileNotFoundError, 1), (PermissionError, 1)):
        calls = []

        def fail(error: type[Exception] = error, calls: list[int] = calls) -> None:
            calls.append(1)
            raise error

        with pytest.raises(error):
            storage.patiently(fail)
        assert len(calls) == n_calls, error


def test_an_unreliable_storage_did_fail(unreliable):
    before = Unreliable.n_failed
    for n in range(30):
        storage.write(unreliable / "file", b"%d" % n)
        assert storage.read(unreliable / "file") == b"%d" % n
    assert Unreliable.n_failed > before + 10


def test_urls_and_paths_name_places():
    assert place("file:///tmp/a%20b") == Path("/tmp/a%20b") and place("runs") == Path("runs")
    assert place("memory://x/y").name == "y" and place(place("memory://x")) == place("memory://x")


def test_an_unknown_storage_is_refused_in_words():
    with pytest.raises(ValueError, match=r"runs: nonsense://x can't be opened: .*Expected a path or an fsspec URL"):
        place("nonsense://x")


def test_work_for_object_storage_is_done_in_one_private_local_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = place("memory://bucket/runs") / "10_hftp" / "0123"
    desk = storage.workplace(folder)
    assert desk == storage.workplace(folder) and desk.parts[-2:] == ("10_hftp", "0123") and tmp_path in desk.parents
    assert desk != storage.workplace(place("memory://other/runs") / "10_hftp" / "0123")
    assert desk.parents[2].stat().st_mode & 0o077 == 0
    assert storage.workplace(tmp_path / "x") == tmp_path / "x"


LEAVE = """
from workbench.run import Run
run = Run.start("any name")
run.finding(f"There are {n}")
print(run.status, run.key)
(run.folder / "figures").mkdir()
(run.folder / "figures" / "counted.json").write_text('{"data": []}')
"""
SAME = ("findings.json", "params.json", "figures/counted.json")  # others hold times, or the folder
COUNT = 'with open("{file}", "a") as file: file.write("x")'


@dataclass(frozen=True, eq=False, kw_only=True)
class Numbered(Result):
    n: int
    columns = ("n",)

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"n": [self.n]})

    def plot(self, **view: Any) -> go.Figure:
        return go.Figure(layout={"title": {"text": f"There are {self.n} of them, as counted"}})


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory, monkeypatch) -> Path:
    """The scratch in which work for object storage is done: one per test."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_run_leaves_the_same_on_a_disk_and_on_object_storage(tmp_path, write_notebook, unreliable, scratch):
    notebook = write_notebook(tmp_path / "leave.ipynb", LEAVE)
    here = execute(notebook, runs=tmp_path / "runs")
    for root in (place(f"memory://{tmp_path.name}/runs"), unreliable):
        planned = plan(notebook, runs=str(root))
        there = planned.execute()
        assert there == planned.run and (there.status, there.params) == ("done", here.params)
        assert there.findings == here.findings == ["There are 3"] and there.command == here.command
        assert there.figures() == here.figures() and names(there.folder) == names(here.folder)
        recorded = [{name: run.manifest["artefacts"][name]["sha256"] for name in SAME} for run in (here, there)]
        assert recorded[0] == recorded[1] and set(there.manifest["artefacts"]) == set(here.manifest["artefacts"])
        assert f"running {there.key}\\n" in storage.read(there.folder / "notebook.ipynb").decode()
        assert all_runs(root) == [there] and str(there.folder) in repr(there) and there.key in there._repr_html_()
        manifest = there.manifest
        assert planned.execute().manifest == manifest, "it is not made twice"
        assert pickle.loads(pickle.dumps(there)) == there
    assert not [path for path in scratch.rglob("*") if path.is_file() and path.suffix != ".lock"], "scratch is empty"


def test_results_come_back_from_object_storage(unreliable, monkeypatch):
    monkeypatch.setenv("WORKBENCH_RUNS", str(unreliable))
    run = Run.start("10_hftp", seed=1)
    run.keep("numbered", Numbered(n=3))
    run.keep("numbered", Numbered(n=4))
    run.finding("four")
    assert run.results()["numbered"].table()["n"].tolist() == [4]
    assert run.status == "interactive" and run.params == {"seed": 1} and run.findings == ["four"]
    assert all_runs() == [run] and len(names(run.folder / "results" / "numbered")) == 2, "the replaced table is gone"


def test_a_forced_run_replaces_the_old_one_on_object_storage_only_when_done(tmp_path, write_notebook):
    fail, root = tmp_path / "fail", place(f"memory://{tmp_path.name}")
    notebook = write_notebook(tmp_path / "once.ipynb", f"import os\nassert not os.path.exists({str(fail)!r})")
    done = execute(notebook, runs=root)
    first = done.manifest
    fail.touch()
    assert execute(notebook, runs=root, force=True).status == "failed"
    previous = done.folder.with_name(f".{done.key}.previous")
    assert Run(previous).manifest == first and "notebook.ipynb" in names(done.folder)
    fail.unlink()
    assert execute(notebook, runs=root).status == "done" and all_runs(root) == [done]
    assert done.manifest["attempt"] == 2 and done.manifest["earlier"][0]["reason"] == "cell failed"


def test_what_could_not_be_copied_is_copied_by_the_next_attempt_not_computed_again(
    tmp_path, write_notebook, monkeypatch
):
    file, root = tmp_path / "count", place(f"memory://{tmp_path.name}")
    planned = plan(write_notebook(tmp_path / "count.ipynb", COUNT.format(file=file)), runs=root)
    monkeypatch.setattr(storage, "PAUSES_S", ())
    put = MemoryFileSystem.put_file

    def down(self: MemoryFileSystem, here: str, there: str, **settings: Any) -> None:
        if Path(here).with_name("notebook.ipynb").exists():  # at the end of the run
            raise ConnectionResetError("the storage is down")
        put(self, here, there, **settings)

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "put_file", down)
        with pytest.raises(ConnectionResetError):
            planned.execute()
        assert planned.run.status == "lost", "nothing on the storage says that it is done, or at work"
    assert planned.execute().status == "done" and file.read_text() == "x"
    assert "notebook.ipynb" in names(planned.run.folder)


SHARED = """
import os
import fsspec
from fsspec.implementations.local import LocalFileSystem
from upath import UPath
from upath.registry import register_implementation

class Shared(LocalFileSystem):  # object storage that several processes see, on a disk
    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(os.fspath(path).replace("shared://", "", 1))

    def pipe_file(self, path, value, mode="overwrite", **settings):
        path = self._strip_protocol(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "wb") as file:
            file.write(value)
        (os.link if mode == "create" else os.rename)(f"{path}.{os.getpid()}", path)
        if mode == "create":
            os.remove(f"{path}.{os.getpid()}")

    def put_file(self, lpath, rpath, **settings):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

class SharedPath(UPath):
    pass

fsspec.register_implementation("shared", Shared, clobber=True)
register_implementation("shared", SharedPath, clobber=True)
"""
RUN = "import sys; from workbench.cli import main; sys.exit(main(['run', {notebook!r}, '--runs', {root!r}]))"
SLOW = 'import pathlib, time; pathlib.Path("{file}").touch(); time.sleep(0 if pathlib.Path("{go}").exists() else 60)'


def test_a_kill_of_the_runner_is_known_at_once_on_object_storage_too(tmp_path, write_notebook, scratch):
    exec(SHARED, {})
    file, go, root = tmp_path / "started", tmp_path / "go", f"shared://{tmp_path}/storage"
    notebook = write_notebook(tmp_path / "slow.ipynb", SLOW.format(file=file, go=go))
    code = SHARED + RUN.format(notebook=str(notebook), root=root)
    variables = os.environ | {"TMPDIR": str(scratch)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, env=variables)
    try:
        deadline = time.monotonic() + 60
        while not file.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        (run,) = all_runs(root)
        assert run.status == "running" and run.manifest["pid"] == process.pid
    finally:
        process.kill()
        process.wait()
    assert run.status == "lost"
    go.touch()
    planned = replace(plan(notebook, runs=root), run=run)
    assert planned.execute().status == "done" and run.manifest["earlier"][0]["reason"] == "lost"
    assert "notebook.ipynb" in names(run.folder)
