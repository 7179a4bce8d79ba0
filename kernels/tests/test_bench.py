"""The runner of all benches: on a GPU or not at all, every row with its case, no failure lost."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from workbench_kernels import bench as runner


def test_without_cuda_the_bench_says_so_and_times_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main([]) == 2
    said = capsys.readouterr()
    assert "no CUDA device here" in said.err and not said.out
    for op in runner.operations():
        with pytest.raises(ValueError, match="got cpu, expected a CUDA device"):
            importlib.import_module(f"workbench_kernels.{op}.bench").rows("cpu")


def test_the_bench_refuses_in_words_and_finds_every_operation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "kv_attention" in runner.operations()
    assert runner.main(["no_such_op"]) == 2
    assert "got no_such_op, expected some of" in capsys.readouterr().err


def test_the_table_has_every_row_and_its_case() -> None:
    row = {"op": "a", "tokens": 8, "impl": "triton", "ms": 0.5, "bytes": 10, "gb_per_s": 20.0, "share_of_copy": 0.25}
    lines = runner.table([row, row | {"tokens": 9, "impl": "sdpa", "max_abs_err": 1e-3}]).splitlines()
    assert [bool(line) for line in lines] == [True, False, True, False, True]
    assert "tokens=8" in lines[2] and "25%" in lines[2] and "equal" in lines[2]
    assert "tokens=9" in lines[4] and "1.0e-03" in lines[4]


def test_one_operation_that_fails_is_told_and_the_others_are_timed_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = {"op": "good", "impl": "triton", "ms": 0.5, "bytes": 10, "gb_per_s": 20.0, "share_of_copy": 0.25}
    good, bad = SimpleNamespace(rows=lambda device: [row]), SimpleNamespace(rows=lambda device: 1 / 0)
    modules = {"workbench_kernels.good.bench": good, "workbench_kernels.bad.bench": bad}
    monkeypatch.setattr(runner, "operations", lambda: ["bad", "good"])
    monkeypatch.setattr(runner, "_problem", lambda ops, out: None)
    monkeypatch.setattr(runner, "machine", lambda: {"device": "none: a test"})
    monkeypatch.setattr(runner, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    out = tmp_path / "rows.parquet"
    assert runner.main(["--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "not timed: bad" in said.err and "ZeroDivisionError" in said.err
    (written,) = pd.read_parquet(out).to_dict("records")
    assert written == row | {"device": "none: a test"}
