"""What can go goes, and nothing else: never a run at work, never a done one that was not named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from workbench import storage
from workbench.files import PARTIAL
from workbench.keys import package_digest
from workbench.leases import lease
from workbench.run import Run, all_runs, plan
from workbench.runs import removal
from workbench.runs.removal import removable, remove

Make = Callable[..., Run]
KEYS = {name: f"{number:012x}" for number, name in enumerate(("done", "failed", "interrupted", "running"), 1)}


@pytest.fixture
def make(tmp_path) -> Make:
    def write(status: str, key: str, days: float = 0.0, root: object = tmp_path / "runs", **facts: object) -> Run:
        folder = storage.place(str(root)) / "a" / key
        folder.mkdir(parents=True)
        started = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
        manifest = {"status": status, "started": started, "command": "workbench run a.ipynb"} | facts
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "environment.json").write_text("{}")
        return Run(folder)

    return write


@pytest.fixture
def every(make) -> dict[str, Run]:
    """A run of each status, long over; nobody works on the one that says running."""
    return {name: make(name, key, days=90) for name, key in KEYS.items()}


def whys(root: Path, **choice: object) -> dict[str, str]:
    return {item.path.name: item.why for item in removable(root, **choice)}  # type: ignore[arg-type]


def test_what_failed_was_interrupted_or_lost_can_go_and_what_is_done_stays(every, tmp_path):
    expected = {KEYS["failed"]: "failed", KEYS["interrupted"]: "interrupted", KEYS["running"]: "lost"}
    assert whys(tmp_path / "runs") == expected


def test_looking_changes_nothing_and_removing_leaves_the_rest(every, tmp_path):
    before = sorted((tmp_path / "runs").rglob("*"))
    items = removable(tmp_path / "runs")
    assert sorted((tmp_path / "runs").rglob("*")) == before
    for item in items:
        assert item.size_bytes == sum(path.stat().st_size for path in Path(str(item.path)).iterdir())
        assert remove(item)
    assert all_runs(tmp_path / "runs") == [every["done"]] and removable(tmp_path / "runs") == []


def test_a_run_at_work_stays(every, tmp_path):
    with lease(every["running"].folder):
        assert KEYS["running"] not in whys(tmp_path / "runs")
    (item,) = (item for item in removable(tmp_path / "runs") if item.why == "lost")
    with lease(every["running"].folder):  # somebody began after the look
        assert not remove(item)
    assert every["running"].folder.exists() and remove(item)


def test_a_run_at_work_in_another_process_stays(every, tmp_path, root):
    (item,) = (item for item in removable(tmp_path / "runs") if item.why == "failed")
    code = (
        "import sys, pathlib\nfrom workbench.leases import lease\n"
        "with lease(pathlib.Path(sys.argv[1])):\n    print('at work', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(every["failed"].folder)]
    with subprocess.Popen(words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"at work\n"
            assert not remove(item) and every["failed"].status == "failed"
        finally:
            process.kill()
    assert remove(item) and not every["failed"].folder.exists(), "the dead hold nothing"


def test_a_run_that_became_another_since_the_look_stays(every, tmp_path):
    (item,) = (item for item in removable(tmp_path / "runs") if item.why == "failed")
    (every["failed"].folder / "manifest.json").write_text('{"status": "done"}')
    assert not remove(item) and every["failed"].status == "done"


def test_a_done_run_goes_when_it_is_named_in_full(every, tmp_path):
    (item,) = removable(tmp_path / "runs", [KEYS["done"]])
    assert (item.path, item.why) == (every["done"].folder, "named") and remove(item)
    assert every["done"] not in all_runs(tmp_path / "runs")
    for key in ("0000", KEYS["done"]):
        with pytest.raises(ValueError, match="is the key of 0 runs, expected one"):
            removable(tmp_path / "runs", [key])


def test_interactive_runs_go_by_age(make, tmp_path):
    make("interactive", "interactive-20260101-000000-000000", days=40)
    make("interactive", "interactive-20260101-000000-000001", days=5)
    assert len(whys(tmp_path / "runs")) == 1 and len(whys(tmp_path / "runs", interactive_days=4)) == 2
    assert all(remove(item) for item in removable(tmp_path / "runs", interactive_days=4))
    assert all_runs(tmp_path / "runs") == []


def test_half_made_folders_go_when_they_are_old_and_other_folders_never(make, tmp_path):
    runs = tmp_path / "runs"
    for name in ("a/00000000beef", "gallery/tables", "a/notes", "a/.hidden"):
        (runs / name).mkdir(parents=True)
        (runs / name / "params.json").write_text("{}")
    assert whys(runs) == {}, "it may be about to get its manifest"
    hours_ago = datetime.now().timestamp() - 2 * removal.YOUNG_S
    for path in runs.rglob("params.json"):
        os.utime(path, (hours_ago, hours_ago))
    assert whys(runs) == {"00000000beef": "has no manifest"}
    (item,) = removable(runs)
    assert remove(item) and (runs / "gallery" / "tables").exists()


def test_a_replaced_run_goes_once_the_new_one_is_done(make, tmp_path):
    new = make("done", KEYS["done"])
    shutil.copytree(new.folder, new.folder.with_name(f".{new.key}.previous"))
    assert whys(tmp_path / "runs") == {f".{new.key}.previous": "replaced by a newer one"}
    (item,) = removable(tmp_path / "runs")
    assert remove(item) and new.status == "done"


def test_a_failed_replacement_goes_and_the_done_run_comes_back(make, tmp_path):
    old = make("done", KEYS["done"], mark="old")
    old.folder.rename(old.folder.with_name(f".{old.key}.previous"))
    failed = make("failed", KEYS["done"])
    (item,) = removable(tmp_path / "runs")
    assert item.why == "failed" and remove(item)
    assert failed.manifest["mark"] == "old" and all_runs(tmp_path / "runs") == [failed]


def test_files_that_a_kill_left_half_written_go(make, tmp_path):
    run = make("done", KEYS["done"])
    half = run.folder / "results" / f"{PARTIAL}1-x"
    half.parent.mkdir()
    half.write_bytes(b"123")
    (item,) = removable(tmp_path / "runs")
    assert (item.path, item.size_bytes) == (half, 3) and remove(item) and run.status == "done" and not half.exists()


def test_runs_made_again_for_a_comparison_go(make, tmp_path):
    make("done", KEYS["done"])
    make("done", KEYS["done"], root=tmp_path / "runs" / ".reruns")
    (item,) = removable(tmp_path / "runs")
    assert item.why == "made again, and compared" and remove(item) and len(all_runs(tmp_path / "runs")) == 1


def test_runs_of_other_code_go_only_if_that_is_asked(make, tmp_path, write_notebook):
    notebook = write_notebook(tmp_path / "a.ipynb", "1")
    params = {"n": 3, "rate_hz": 1.5, "name": "a", "many": False}
    key = plan(notebook, runs=tmp_path / "runs").run.key
    for run in (
        make("done", key, notebook=str(notebook)),
        make("done", "0" * 12, notebook=str(notebook)),  # of the same parameters and another cell
        make("done", "1" * 12, notebook="gone.ipynb"),  # can't be checked
        make("done", "2" * 12, notebook="gone.ipynb"),
    ):
        (run.folder / "params.json").write_text(json.dumps(params))
    for key_, digest in (("1" * 12, package_digest()), ("2" * 12, "another")):
        environment = tmp_path / "runs" / "a" / key_ / "environment.json"
        environment.write_text(json.dumps({"key_parts": {"package": digest}}))
    assert whys(tmp_path / "runs") == {}
    assert set(whys(tmp_path / "runs", other_code=True)) == {"0" * 12, "2" * 12}


def test_a_kill_in_the_middle_leaves_what_the_next_look_finds(every, tmp_path, monkeypatch):
    (item,) = (item for item in removable(tmp_path / "runs") if item.why == "failed")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(item)
    assert every["failed"] not in all_runs(tmp_path / "runs") and every["failed"].folder.exists()
    monkeypatch.setattr(removal, "YOUNG_S", -1.0)
    (again,) = (item for item in removable(tmp_path / "runs") if item.path == every["failed"].folder)
    assert again.why == "has no manifest" and remove(again) and not every["failed"].folder.exists()


def test_runs_on_object_storage_go_too(make):
    root = storage.place("memory://removal/runs")
    make("done", KEYS["done"], root=root)
    make("failed", KEYS["failed"], root=root)
    (item,) = removable(root)
    assert item.why == "failed" and remove(item) and [run.key for run in all_runs(root)] == [KEYS["done"]]
