"""The environment that a run records: what decides its numbers, found without loading a library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from workbench import environment as module
from workbench.environment import environment, git_state, versions


def test_everything_is_json_and_every_part_is_there():
    found = environment({"OMP_NUM_THREADS": "1"}, {"package": "x"})
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        *("versions", "platform", "machine", "cpu", "cpus", "gpus", "cuda", "cuda_visible_devices"),
        *("lock_sha256", "git", "variables", "key_parts"),
    }
    assert found["variables"] == {"OMP_NUM_THREADS": "1"} and found["key_parts"] == {"package": "x"}


def test_libraries_that_are_absent_are_left_out():
    assert set(versions(("numpy", "no-such-library"))) == {"python", "numpy"}


def test_the_device_is_found_without_importing_torch(root):
    code = "import sys; from workbench.environment import environment; environment({}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "dask", "duckdb"}


def test_the_cuda_version_is_the_one_that_torch_tells():
    import torch

    assert module.cuda_of_torch() == torch.version.cuda


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Makes a machine whose GPU driver answers in this way."""

    def answer(text: str, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        module.gpus.cache_clear()

    yield answer
    module.gpus.cache_clear()


def test_gpus_are_told_by_their_driver(driver):
    driver("NVIDIA X, 580.1, 141 GiB\\nNVIDIA Y, 580.1, 80 GiB\\n")
    assert module.gpus() == [
        {"name": "NVIDIA X", "driver": "580.1", "memory": "141 GiB"},
        {"name": "NVIDIA Y", "driver": "580.1", "memory": "80 GiB"},
    ]


@pytest.mark.parametrize(("text", "status"), [("No devices were found\\n", 6), ("no devices\\n", 0), ("", 0)])
def test_a_driver_without_gpus_means_none(driver, text, status):
    driver(text, status)
    assert module.gpus() == []


def test_the_state_of_git_is_the_commit_and_whether_it_was_edited(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    assert git_state(tmp_path) is None, "no commit yet"
    file = Path(tmp_path, "file")
    file.write_text("1")
    subprocess.run([*git, "add", "file"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=tmp_path, check=True)
    clean = git_state(tmp_path)
    assert clean is not None and len(clean["commit"]) == 40 and not clean["dirty"]
    (tmp_path / "untracked").write_text("1")
    assert git_state(tmp_path) == clean, "a file that git does not know decides nothing"
    file.write_text("2")
    assert git_state(tmp_path) == clean | {"dirty": True}
