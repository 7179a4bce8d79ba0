"""Timing for all benchmarks: rivals run alternately, medians count, the machine is written beside the numbers."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from workbench.environment import cpu_model, git_state, n_cpus
from workbench.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def medians(rivals: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each rival; they take turns, so that a busy machine hurts all alike. One warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(repeats + 1):
        for name, run in rivals.items():
            spent = seconds_of(run)
            if turn:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak_mb() -> float:
    """The largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def machine() -> dict[str, str | int | float]:
    """Where and when: what a number of seconds means nothing without."""
    git = git_state(ROOT)
    return {
        "processor": cpu_model(),
        "cores": n_cpus(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # of the last minute, the bench itself included
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": git["commit"][:12] + ("+" if git["dirty"] else "") if git else "",  # +: tracked files were changed
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record(name: str, rows: list[dict[str, object]]) -> Path:
    """Write the rows, with the machine in every one, to bench/results/<name>.parquet."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.parquet"
    write_atomically(path, pd.DataFrame([row | machine() for row in rows]).to_parquet(index=False))
    return path
