"""Laws of probes: every subclass of Probe in workbench/probes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from families import subclasses_in, subject_of

import workbench.probes
from workbench.probe import Probe
from workbench.result import Result
from workbench.toggle import Toggle
from workbench.toggles import Steer

PROBES = subclasses_in(workbench.probes, Probe)
every_probe = pytest.mark.parametrize("cls", PROBES, ids=lambda cls: cls.__name__)


def contents(result: Result) -> dict[str, bytes]:
    """The bytes of every array and table that a seed decides."""
    found = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if field.name in (*result.clocks, "provenance"):
            continue
        if isinstance(value, np.ndarray):
            found[field.name] = value.tobytes()
        elif isinstance(value, pd.DataFrame):
            found[field.name] = value.to_csv().encode()
        else:
            found[field.name] = repr(value).encode()
    return found


def test_the_probes_are_found() -> None:
    assert {"HFTP", "Cost"} <= {cls.__name__ for cls in PROBES}


@every_probe
@pytest.mark.parametrize("seed", [0, 1])
def test_a_probe_recovers_what_was_planted(cls: type[Probe], seed: int) -> None:
    verdict = cls.planted(seed).verdict()
    assert len(verdict) and verdict["ok"].all(), f"\n{verdict}"


@every_probe
@pytest.mark.parametrize("seed", [0, 1])
def test_a_probe_stays_silent_on_its_null(cls: type[Probe], seed: int) -> None:
    verdict = cls.null(seed).verdict()
    assert len(verdict) and verdict["ok"].all(), f"\n{verdict}"


@every_probe
def test_the_expectations_of_the_planted_truth_can_fail(cls: type[Probe]) -> None:
    planted, null = cls.planted(0), cls.null(0)
    assert not planted.verdict(null.solve())["ok"].all(), "the null passes for the truth"


@every_probe
def test_the_same_seed_gives_the_same_bytes(cls: type[Probe]) -> None:
    subject = subject_of("llama")
    probe, data = cls.example(subject)
    assert contents(probe.run(subject, data)) == contents(probe.run(subject, data))


@every_probe
def test_a_result_survives_save_and_load(cls: type[Probe], tmp_path: Path) -> None:
    subject = subject_of("llama")
    probe, data = cls.example(subject)
    result = probe.run(subject, data)
    again = Result.load(result.save(tmp_path / "result"))
    assert type(again) is type(result) and contents(again) == contents(result)
    assert again.provenance == result.provenance
    pd.testing.assert_frame_equal(again.table(), result.table())
    assert again.finding == result.finding


@every_probe
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon"])
def test_table_and_plot_are_as_documented_under_a_toggle(cls: type[Probe], family: str) -> None:
    subject = subject_of(family)
    probe, data = cls.example(subject)
    toggle = Steer.examples(subject)[0]
    with subject.under(toggle):
        result = probe.run(subject, data)
    table = result.table()
    assert tuple(table.columns) == result.columns and len(table)
    stamp = result.provenance
    assert stamp is not None and stamp.receipts[0]["fired"] > 0
    assert Toggle.from_json(json.loads(json.dumps(stamp.to_json()))["toggles"][0]) == toggle
    views = [{}] + [{name: choice} for name, choices in result.views().items() for choice in choices[:6]]
    for view in views:
        figure = result.plot(**view)
        assert isinstance(figure, go.Figure) and len(str(figure.layout.title.text)) > 20


@every_probe
def test_a_probe_is_a_value(cls: type[Probe]) -> None:
    probe, _ = cls.example(subject_of("llama"))
    assert (
        dataclasses.is_dataclass(probe)
        and dataclasses.replace(probe) == probe
        and hash(probe) == hash(dataclasses.replace(probe))
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe.seed = 5  # type: ignore[attr-defined]
