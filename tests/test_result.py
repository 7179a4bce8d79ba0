"""Results on disk: what is saved comes back, and neither a kill nor a full disk loses what was there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench import plots
from workbench.result import Result


@dataclass(frozen=True, eq=False, kw_only=True)
class Spectrum(Result):
    """A result as probes define them."""

    amplitude: np.ndarray
    counts: np.ndarray
    rows: pd.DataFrame
    name: str = "a"
    rates: tuple[float, ...] = (1.0, 2.0)
    nothing: None = None

    columns = ("rate_hz", "amplitude")

    def table(self) -> pd.DataFrame:
        return pd.DataFrame({"rate_hz": np.arange(len(self.amplitude)), "amplitude": self.amplitude})

    def plot(self, **view: Any) -> Any:
        return plots.lines(
            self.table(), "rate_hz", "amplitude", title=f"{self.name} peaks at {self.amplitude.max():.1f}"
        )


def make(scale: float = 1.0) -> Spectrum:
    rows = pd.DataFrame({"word": ["a", "b"], "n": [1, 2]})
    return Spectrum(amplitude=scale * np.arange(5.0), counts=np.array([[1, 2]]), rows=rows)


def same(one: Result, other: Result) -> bool:
    assert isinstance(one, Spectrum) and isinstance(other, Spectrum)
    return np.array_equal(one.amplitude, other.amplitude) and one.rows.equals(other.rows) and one.rates == other.rates


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    result = make()
    again = Result.load(result.save(tmp_path / "a folder" / "result"))
    assert same(again, result) and again.counts.dtype == result.counts.dtype and again.nothing is None  # type: ignore[attr-defined]
    assert again.finding == "a peaks at 4.0"
    assert not list(tmp_path.rglob("*.pkl")) and len(list(tmp_path.rglob("*.parquet"))) == 2


def test_an_array_of_one_number_keeps_its_shape(tmp_path: Path) -> None:
    result = replace(make(), counts=np.array(3.5))
    again: Any = Result.load(result.save(tmp_path / "r"))
    assert again.counts.shape == () and again.counts == 3.5
    turned = replace(make(), counts=np.arange(6.0).reshape(2, 3).T)
    again = Result.load(turned.save(tmp_path / "turned"))
    np.testing.assert_array_equal(again.counts, turned.counts)


def test_a_folder_that_holds_a_result_is_not_overwritten_unasked(tmp_path: Path) -> None:
    make().save(tmp_path / "r")
    with pytest.raises(FileExistsError, match=r"holds a result already\. Pass overwrite=True"):
        make(2).save(tmp_path / "r")
    assert same(Result.load(tmp_path / "r"), make())
    make(2).save(tmp_path / "r", overwrite=True)
    assert same(Result.load(tmp_path / "r"), make(2))
    assert len(list((tmp_path / "r").iterdir())) == 4, "data of the replaced result stayed behind"


def test_a_folder_with_other_files_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        make().save(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is a file"):
        make().save(tmp_path / "mine" / "thesis.tex")
    with pytest.raises(FileNotFoundError, match=r"has no result\.json"):
        Result.load(tmp_path)


@pytest.mark.parametrize("failing_call", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_old_result_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    make().save(tmp_path / "r")
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if failing_call == 4:  # arrays, table and record are written anew; the unchanged rows are not
        make(2).save(tmp_path / "r", overwrite=True)
        assert calls == 3
        return
    with pytest.raises(OSError, match="No space left"):
        make(2).save(tmp_path / "r", overwrite=True)
    assert same(Result.load(tmp_path / "r"), make())
    assert not list((tmp_path / "r").glob(".partial-*"))


@pytest.mark.parametrize("replace_call", [1, 2, 3])
def test_a_kill_while_saving_leaves_the_old_result_whole(tmp_path: Path, replace_call: int) -> None:
    make().save(tmp_path / "r")
    code = f"""
    import os, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from test_result import make
    real, calls = os.replace, 0
    def dying(source, target):
        global calls
        calls += 1
        if calls == {replace_call}:
            os._exit(9)
        real(source, target)
    os.replace = dying
    make(2).save({str(tmp_path / "r")!r}, overwrite=True)
    """
    died = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert same(Result.load(tmp_path / "r"), make())
    make(3).save(tmp_path / "r", overwrite=True)  # and the next save cleans up
    assert same(Result.load(tmp_path / "r"), make(3)) and len(list((tmp_path / "r").iterdir())) == 4
