"""Kernels are proved in Triton's interpreter where there is no GPU, and on the GPU where there is one.

The switch must be set before triton is imported by anyone: its decorators read it. A pass of the interpreter says that
the algebra is right; it is never a pass of a GPU, and the summary of every run tells which of the two it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said, not assumed: it decides last bits

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
RAN: dict[str, int] = {}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run here: a CUDA device, or the CPU in Triton's interpreter."""
    request.node.user_properties.append(("device", device_name()))
    return DEVICE


@pytest.fixture
def ahead_of_time(tmp_path: Path) -> Callable[[str], Any]:
    """Runs a script that compiles kernels without a GPU, the interpreter off; returns the JSON of its last line."""

    def run(code: str) -> Any:
        pytest.importorskip("triton.backends.nvidia", reason="triton's NVIDIA compiler is not installed")
        script = tmp_path / "ahead.py"  # a file: triton reads the source of what it compiles
        script.write_text(code)
        there = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "compiled")}  # nothing compiled before
        environment = {**os.environ, **there, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, timeout=600, env=environment, check=False
        )
        if "ptxas" in done.stderr and "not found" in done.stderr.lower():
            pytest.skip("ptxas, which turns PTX into a program for a GPU, was not found")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def device_name() -> str:
    return torch.cuda.get_device_name() if HAS_GPU else "CPU, Triton interpreter"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device; here kernels run in Triton's interpreter on the CPU")
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for name, value in report.user_properties:
            if name == "device":
                RAN[value] = RAN.get(value, 0) + 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if RAN:
        terminalreporter.section("kernels: which device ran them")
        for name, count in RAN.items():
            terminalreporter.write_line(f"{count} tests passed on: {name}")
        if not HAS_GPU:
            terminalreporter.write_line("None of them ran on a GPU: speed, bf16 and races are not proved here.")
