"""The environment that numbers come from: libraries, machine, source; and the one a kernel starts in."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from workbench.files import sha256_of

LIBRARIES = ("workbench", "torch", "transformers", "numpy", "nnsight", "plotly", "triton")
# What else decides the numbers of a run, or how they are stored and read again.
RUN_LIBRARIES = (
    *LIBRARIES,
    *("scipy", "pandas", "pyarrow", "safetensors", "tokenizers", "accelerate", "scikit-learn"),
    *("papermill", "ipykernel", "dask", "distributed", "duckdb", "fsspec", "universal-pathlib"),
)
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


def environment(variables: Mapping[str, str], key_parts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run records of its surroundings.

    variables   environment variables that the kernel was given       key_parts   what its key is made of, if it has one
    """
    lock = PACKAGE.parent / "requirements.lock"
    return {
        "versions": versions(RUN_LIBRARIES),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cpus": n_cpus(),
        "gpus": gpus(),
        "cuda": cuda_of_torch(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "lock_sha256": sha256_of(lock) if lock.exists() else None,
        "git": git_state(PACKAGE.parent),
        "variables": dict(variables),
        "key_parts": key_parts,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit checked out in `folder` and whether tracked files differ from it; None without one."""
    if not (folder / ".git").exists():
        return None
    lines = _output("git", "status", "--porcelain=v2", "--branch", "--untracked-files=no", folder=folder).splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    dirty = any(not line.startswith("#") for line in lines)
    return None if commit == "(initial)" else {"commit": commit, "dirty": dirty}


@cache
def cpu_model() -> str:
    """The processor by its maker's name: which instructions it has decides the last bits of sums."""
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", facts.read_text(), re.MULTILINE) if facts.exists() else None
    return found[1] if found else platform.processor()


@cache
def gpus() -> list[dict[str, str]]:
    """Name, driver and memory of every GPU of this machine, as its driver tells them; no library is loaded for that."""
    fields = ("name", "driver_version", "memory.total")
    text = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    rows = [line.split(", ") for line in text.splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=True)) for row in rows if len(row) == len(fields)]


@cache
def cuda_of_torch() -> str | None:
    """The CUDA version that PyTorch was built with, read from its files without importing it; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = file.read_text(encoding="utf-8") if file and file.exists() else ""
    found = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.MULTILINE)
    return found[1] if found else None


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


def _output(*words: str, folder: Path | None = None) -> str:
    """What a command prints; nothing where it is missing, fails or gives no answer."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
