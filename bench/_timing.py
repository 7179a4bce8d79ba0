"""Timing for all benchmarks: rivals run alternately, medians count, the machine is written beside the numbers."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

RESULTS = Path(__file__).parent / "results"


def medians(rivals: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each rival; they take turns, so that a busy machine hurts all alike. One warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(repeats + 1):
        for name, run in rivals.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mb() -> float:
    """The largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def machine() -> dict[str, str | int]:
    """Where and when: what a number of seconds means nothing without."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record(name: str, rows: list[dict[str, object]]) -> Path:
    """Write the rows, with the machine in every one, to bench/results/<name>.parquet."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.parquet"
    pd.DataFrame([row | machine() for row in rows]).to_parquet(path, index=False)
    return path
