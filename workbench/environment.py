"""The environment that numbers come from: libraries, machine, source; and the one a kernel starts in."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from workbench.files import sha256_of

LIBRARIES = ("workbench", "torch", "transformers", "numpy", "nnsight", "plotly", "triton")
PACKAGE = Path(__file__).parent


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(variables: dict[str, str]) -> dict[str, Any]:
    """What a run records of its surroundings; `variables` are those that the kernel was given."""
    lock = PACKAGE.parent / "requirements.lock"
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": n_cpus(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "lock_sha256": sha256_of(lock) if lock.exists() else None,
        "git": git_state(PACKAGE.parent),
        "variables": variables,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit checked out in `folder` and whether tracked files differ from it; None without one."""
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": bool(status)}


def n_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def deterministic_variables(threads: int | None = None) -> dict[str, str]:
    """Environment variables that a kernel needs from its start, so that the same run gives the same numbers.

    The number of threads decides the order of sums: `threads`, else OMP_NUM_THREADS, else the CPUs at hand.
    """
    n_threads = str(threads or os.environ.get("OMP_NUM_THREADS") or n_cpus())
    return {
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": n_threads,
        "MKL_NUM_THREADS": n_threads,
        "OPENBLAS_NUM_THREADS": n_threads,
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow a busy machine tenfold
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # a bar would be stored as a widget that no page can show
        "PLOTLY_RENDERER": "plotly_mimetype",  # the figure alone; other renderers add megabytes of script
    }


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or no answer from it
        return None
    return done.stdout.strip() if done.returncode == 0 else None
