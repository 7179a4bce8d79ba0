"""Which heads and neurons would be missed least? A score for each, by one or more criteria, and plans from them.

Data: texts to calibrate on; None for criteria that look at weights alone.
Sources: AMP (arXiv 2504.21174), LLM-Pruner (arXiv 2305.11627), LoRAPrune (arXiv 2305.18403), Wanda as FLAP's baseline
(arXiv 2312.11983); amp_out, which weighs a neuron by the column it writes with as well, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from workbench.generation import text_of
from workbench.methods.pruning.planted import amplify, deafen, living, mute, random_texts
from workbench.methods.pruning.scores import PruningScoresResult, scored
from workbench.methods.pruning.taylor import Taylor
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds

if TYPE_CHECKING:
    from workbench.subject import Subject

LOUD, SILENT, UNHEARD, HEAD = 3, 5, 9, 3  # of layer 0 in the planted model


@dataclass(frozen=True)
class PruningScores(Probe):
    """Scores every head and neuron; `result.plan(ratio=0.3)` then makes plans without reading again.

    criterion   amp_out, amp, taylor, wanda_structured, magnitude or random, or several in a tuple
    norm        of a neuron's output column in amp_out; 1 gives heads and neurons one unit
    taylor      which gradients
    batch       tokens per forward; nothing is padded, so scores don't depend on it
    """

    criterion: str | tuple[str, ...] = "amp_out"
    norm: int = 2
    taylor: Taylor = field(default_factory=Taylor)
    batch: int = 4096
    seed: int = 0

    bounds: ClassVar[Bounds] = {"batch": 1}

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria, one or several."""
        return (self.criterion,) if isinstance(self.criterion, str) else tuple(self.criterion)

    def measure(self, subject: Subject, data: Any) -> PruningScoresResult:
        options: dict[str, Any] = {"norm": self.norm, "taylor": self.taylor, "batch": self.batch, "seed": self.seed}
        return scored(subject, data, self.criteria, **options)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Three neurons and a head that do nothing: one never fires, nothing reads the others, one of them loud."""
        return _planted("units that do nothing", cls(seed=seed), dead=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same model with all of its units alive: no score is zero."""
        return _planted("all units alive", cls(seed=seed), dead=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[PruningScores, list[str]]:
        text = text_of(subject.tokenizer, range(8, 24))
        return cls(("amp_out", "taylor", "random")), [text, " ".join(text.split()[:9])]


def _planted(name: str, probe: PruningScores, *, dead: bool) -> Planted:
    subject = living(probe.seed)
    if dead:
        amplify(subject, 0, [LOUD])
        mute(subject, 0, heads=[HEAD], neurons=[LOUD, UNHEARD])
        deafen(subject, 0, [SILENT])
    units = {"head": [HEAD], "neuron": [LOUD, SILENT, UNHEARD]}

    def zeros(result: Any) -> float:
        table = result.table()
        return float((table["score"] == 0).sum())

    def planted_zeros(result: Any) -> float:
        rows = result.table().set_index(["layer", "family", "unit"])["score"]
        return float(sum(rows[0, family, unit] == 0 for family, ids in units.items() for unit in ids))

    def gone(result: Any) -> float:
        """Of the planted neurons, those that a small cut of neurons takes."""
        kept = result.plan(allocation={0: 0.1}, of="neurons").at(0).neurons
        return float(sum(unit not in kept for unit in units["neuron"]))

    n_dead = 4.0 if dead else 0.0
    expectations = [
        Expectation("units with a score of 0", zeros, n_dead, n_dead),
        Expectation("planted units with a score of 0", planted_zeros, n_dead, n_dead),
    ]
    if dead:
        expectations.append(Expectation("planted neurons among the first tenth to leave", gone, 3.0, 3.0))
    arrays = {family: np.array(ids) for family, ids in units.items()}
    return Planted(
        name,
        arrays,
        lambda: scored(subject, random_texts(subject, probe.seed), probe.criteria, seed=probe.seed),
        tuple(expectations),
    )
