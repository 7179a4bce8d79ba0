"""A probe: a question asked of a frozen model, as a value that holds its settings.

`run` measures and stamps the result with its provenance; `planted` and `null` make input whose true answer is
known, with signal and without. The contract tests hold every probe to both.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, is_dataclass
from datetime import UTC, datetime
from numbers import Number
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd

from workbench.environment import versions
from workbench.result import Provenance, Result
from workbench.settings import Settings
from workbench.values import encode, fingerprint

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class Expectation:
    """One number that a result must show: `read(result)` lies in [low, high]."""

    measure: str
    read: Callable[[Result], float]
    low: float
    high: float


@dataclass(frozen=True)
class Planted:
    """Synthetic input whose answer is known.

    arrays         the input and the truth, to look at
    solve          runs the probe's own analysis on the input and returns its Result
    expectations   what the result must show
    """

    name: str
    arrays: Mapping[str, np.ndarray]
    solve: Callable[[], Result]
    expectations: tuple[Expectation, ...]

    def verdict(self, result: Result | None = None) -> pd.DataFrame:
        """One row per expectation: measure, value, low, high, ok."""
        result = self.solve() if result is None else result
        rows = [(item.measure, float(item.read(result)), item.low, item.high) for item in self.expectations]
        table = pd.DataFrame(rows, columns=["measure", "value", "low", "high"])
        return table.assign(ok=(table["low"] <= table["value"]) & (table["value"] <= table["high"]))


class Probe(Settings, ABC):
    """A question to a model. Subclasses are frozen dataclasses of settings; the constructor computes nothing."""

    @final
    def run(self, subject: Subject, data: Any) -> Result:
        """Measure `subject` on `data` and stamp the result with subject, toggles, versions, seed and time."""
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        before = tuple(receipt.to_json() for receipt in subject.receipts)
        try:
            result = self.measure(subject, data)
        except (TypeError, AttributeError) as error:
            if _is_data(data):
                raise
            raise ValueError(
                f"{type(self).__name__}: got data {data!r:.60}, expected a list such as that of "
                f"{type(self).__name__}.example(subject)[1]."
            ) from error
        return result.stamped(
            Provenance(
                subject=subject.describe(),
                probe=encode(self),
                toggles=tuple(toggle.to_json() for toggle in subject.active),
                receipts=tuple(_since(old, new.to_json()) for old, new in zip(before, subject.receipts, strict=True)),
                data={"fingerprint": _data_fingerprint(data), "items": len(data) if isinstance(data, Sized) else None},
                versions=versions(),
                seed=getattr(self, "seed", None),
                started=started,
                seconds=round(time.perf_counter() - clock, 3),
            )
        )

    @abstractmethod
    def measure(self, subject: Subject, data: Any) -> Result:
        """Collect from the subject, compute, and return the result without provenance."""

    @classmethod
    @abstractmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Synthetic input with a known signal."""

    @classmethod
    @abstractmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same input without the signal: the probe must stay silent."""

    @classmethod
    @abstractmethod
    def example(cls, subject: Subject) -> tuple[Probe, Any]:
        """Small settings and data that run on any subject in about a second: for contract tests and a first look."""


def _is_data(data: Any) -> bool:
    """Whether data could be meant as such: no single number, no list of numbers, not nothing."""
    if isinstance(data, list | tuple):
        return not any(item is None or isinstance(item, Number) for item in data)
    return isinstance(data, Sized) or is_dataclass(data)


def _since(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A receipt's counts during one probe: the counters are differences, the rest as it stands."""
    counters = ("fired", "tokens", "rows", "prompts", "prompts_acted")
    return new | {name: new[name] - old[name] for name in counters}


def _data_fingerprint(data: Any) -> str:
    try:
        return fingerprint(data)
    except TypeError:
        return fingerprint(repr(data))
