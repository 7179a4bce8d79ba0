"""Which mechanism does which compression break? Every mechanism under every kind, at matched cost, over seeds.

damage = 1 - kept, on the same data without and with the compression: 0 is as before, 1 is gone.
noise line: the untouched model read again on other data; floor: an untrained twin on the same data.
Source: this project; the mechanisms and the kinds name theirs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from workbench.environment import versions
from workbench.result import Provenance
from workbench.studies.compressions import KINDS, Kind
from workbench.studies.costs import ACTIVATIONS, CACHE, WEIGHTS, cost
from workbench.studies.crossed import AGAIN, COLUMNS, REFUSED, UNTRAINED, CrossResult
from workbench.studies.mechanisms import Mechanism, Reading, mechanisms
from workbench.values import encode

if TYPE_CHECKING:
    from workbench.subject import Subject

OTHER_DATA = 10_000  # added to a seed: other data of the same kind


@dataclass(frozen=True)
class CrossStudy:
    """The whole study as a value; `run(subject)` measures it on top of the toggles that act already.

    cache, weights, kl   what each kind is taken down to: shares of the cache's bytes and of the blocks' parameters, and
                         nats per prediction for pushes; several give the frontier
    seeds                each draws all data, calibration texts and random choices anew
    floor                measure an untrained twin of the model as well, which takes its memory once more
    """

    mechanisms: tuple[Mechanism, ...] = field(default_factory=mechanisms)
    kinds: tuple[Kind, ...] = KINDS
    cache: tuple[float, ...] = (0.5,)
    weights: tuple[float, ...] = (0.85,)
    kl: tuple[float, ...] = (0.1,)
    seeds: tuple[int, ...] = (0, 1, 2)
    floor: bool = True

    def __post_init__(self) -> None:
        if not self.mechanisms or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"CrossStudy: got {len(self.mechanisms)} mechanisms and seeds {self.seeds}, expected some mechanisms "
                "and different seeds."
            )
        for name in (CACHE, WEIGHTS, "kl"):
            values = getattr(self, name)
            if not values or not all(value > 0 and (name == "kl" or value < 1) for value in values):
                raise ValueError(f"CrossStudy: got {name}={values}, expected shares above 0 and below 1 (nats for kl).")

    def run(self, subject: Subject) -> CrossResult:
        """Measure everything, seed by seed. What this model can't show or can't undergo is told in `result.refused`."""
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        rows: list[tuple[Any, ...]] = []
        refused: list[tuple[str, str, int, str]] = []
        for seed in self.seeds:
            rows += _Draw(self, subject, seed, refused).rows()
        scales = {name: words for one in self.mechanisms for name, words in one.measures.items()}
        told = pd.DataFrame(refused, columns=list(REFUSED))
        result = CrossResult(
            facts=pd.DataFrame(rows, columns=list(COLUMNS)),
            refused=told,
            scales=scales,
            model=subject.name,
            fingerprint=subject.fingerprint,
        )
        return result.stamped(
            Provenance(
                subject=subject.describe(),
                probe=encode(self),
                toggles=tuple(toggle.to_json() for toggle in subject.active),
                receipts=tuple(receipt.to_json() for receipt in subject.receipts),
                data={"fingerprint": None, "items": None},  # each mechanism draws its own, by seed
                versions=versions(),
                seed=self.seeds[0],
                started=started,
                seconds=round(time.perf_counter() - clock, 3),
            )
        )

    def shares(self, kind: Kind) -> tuple[float, ...]:
        """What a kind is taken down to."""
        return {CACHE: self.cache, WEIGHTS: self.weights, ACTIVATIONS: self.kl}[kind.family]


@dataclass(frozen=True)
class _Draw:
    """One seed of a study."""

    study: CrossStudy
    subject: Subject
    seed: int
    refused: list[tuple[str, str, int, str]]

    def rows(self) -> list[tuple[Any, ...]]:
        before = self._before()
        none: tuple[Any, ...] = (False, "", float("nan"), 1.0, 1.0, 0.0)
        found = list(self._kept(before, self.subject, AGAIN, none, "", OTHER_DATA))
        if self.study.floor:
            twin = untrained(self.subject, self.seed)
            found += self._kept(before, twin, UNTRAINED, none, "")
        for kind in self.study.kinds:
            for share in self.study.shares(kind):
                try:
                    toggle = kind.toggle(self.subject, share, self.seed)
                    left = cost(self.subject, toggle, self.seed)
                except ValueError as problem:
                    self.refused.append((kind.name, f"at {share:g}", self.seed, str(problem)))
                    continue
                facts = (kind.control, kind.family, share, left.cache, left.weights, left.kl)
                with self.subject.under(toggle):
                    found += self._kept(before, self.subject, kind.name, facts, str(toggle))
        return found

    def _before(self) -> dict[Mechanism, Reading]:
        """What the untouched subject shows, of the mechanisms that it has."""
        found = {}
        for mechanism in self.study.mechanisms:
            try:
                reading = mechanism.read(self.subject, self.seed)
                why = mechanism.lacking(reading)
            except ValueError as problem:
                reading, why = {}, str(problem)
            if why:
                self.refused.extend((name, "untouched", self.seed, why) for name in mechanism.measures)
            else:
                found[mechanism] = reading
        return found

    def _kept(
        self,
        before: Mapping[Mechanism, Reading],
        subject: Subject,
        kind: str,
        facts: tuple[Any, ...],
        toggle: str,
        other: int = 0,
    ) -> Iterator[tuple[Any, ...]]:
        """One row per measure of the subject as it is now."""
        for mechanism, reading in before.items():
            try:
                kept = mechanism.kept(reading, mechanism.read(subject, self.seed + other))
            except ValueError as problem:
                self.refused.extend((name, f"under {kind}", self.seed, str(problem)) for name in mechanism.measures)
                continue
            for name, value in zip(mechanism.measures, kept, strict=True):
                yield (name, kind, *facts, self.seed, value, 1.0 - value, toggle)


def untrained(subject: Subject, seed: int = 0) -> Subject:
    """The same architecture with random weights: what it shows was never learned."""
    from workbench.subject import Subject as Made  # here: a study itself loads no model library

    with torch.random.fork_rng(devices=[]), subject.untoggled():
        torch.manual_seed(seed)
        architecture: Any = type(subject.model)
        model = architecture(subject.model.config)
    model = model.to(device=subject.device, dtype=subject.dtype).eval()
    return Made(model, subject.tokenizer, name=f"{subject.name}, untrained", verify=False)
