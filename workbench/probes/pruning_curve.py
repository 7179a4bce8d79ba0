"""What can a model lose? Loss, and questions answered, against the share of it that is kept, for several criteria.

Units leave lowest score first; the control leaves them in random order. Scored on some texts, judged on others.
Data: texts, of which every second one judges; or a `Trial`, which names both and adds questions.
Source: own; the sources of the criteria stand in `workbench.methods.pruning.criteria`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from workbench.generation import text_of
from workbench.methods.pruning.budgets import Budget, Ranking
from workbench.methods.pruning.criteria import scores_of
from workbench.methods.pruning.curves import CONTROL, PruningCurveResult, Trial, losses
from workbench.methods.pruning.planted import half_dead, random_texts
from workbench.methods.pruning.scores import scored
from workbench.methods.pruning.taylor import Taylor
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.toggles.prune import Prune

if TYPE_CHECKING:
    from workbench.subject import Subject

Rivals = Sequence[tuple[str, int, Ranking]]  # criterion, draw, order of units


@dataclass(frozen=True)
class PruningCurve(Probe):
    """Prunes by each criterion to each share, and measures what is lost.

    criteria   who ranks the units; random units are always added as the control
    keeps      shares of the parameters to keep
    n_random   draws of the control: as many units of each layer and kind as the first criterion takes, chosen at random
    budget     what the shares are of, and who pays: `Budget(of="neurons", allocation="global")`
    form       "slice", or "mask" for models whose heads can't be sliced; both predict the same
    norm, taylor, batch   as in PruningScores
    """

    criteria: tuple[str, ...] = ("amp_out", "amp", "wanda_structured", "taylor", "magnitude")
    keeps: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5)
    n_random: int = 5
    budget: Budget = field(default_factory=Budget)
    form: Literal["slice", "mask"] = "slice"
    norm: int = 2
    taylor: Taylor = field(default_factory=Taylor)
    batch: int = 4096
    seed: int = 0

    bounds: ClassVar[Bounds] = {"batch": 1}

    def measure(self, subject: Subject, data: Any) -> PruningCurveResult:
        trial = Trial.of(data)
        self._check()
        options: dict[str, Any] = {"norm": self.norm, "taylor": self.taylor, "batch": self.batch, "seed": self.seed}
        scores = scored(subject, trial.calibration, self.criteria, **options)
        rivals = [(name, 0, scores.ranking(name)) for name in self.criteria]
        rivals += self.control(subject, scores.ranking())
        return self.solved(subject, trial, rivals, scores.notes)

    def control(self, subject: Subject, ranking: Ranking) -> list[tuple[str, int, Ranking]]:
        """Random orders, each from a seed of its own; `ranking` is that of the first criterion.

        Under a global budget its scores are dealt to other units, so that the control takes as many from each layer
        and kind: what differs is who leaves. A uniform budget takes as many anyway.
        """
        seeds = [self.seed * 1009 + draw for draw in range(self.n_random)]
        if self.budget.allocation == "global":
            return [(CONTROL, draw, dealt(ranking, seed)) for draw, seed in enumerate(seeds)]
        return [
            (CONTROL, draw, Ranking(*scores_of(CONTROL, subject, None, seed=seed), ranking.sizes))
            for draw, seed in enumerate(seeds)
        ]

    def solved(self, subject: Subject, trial: Trial, rivals: Rivals, notes: tuple[str, ...] = ()) -> PruningCurveResult:
        """What is lost under the plans of these orders of units."""
        points = [
            (name, draw, keep, ranking.sizes, ranking.plan(1 - keep, self.budget))
            for name, draw, ranking in rivals
            for keep in self.keeps
        ]
        found = losses(subject, [Prune(plan, self.form) for *_, plan in points], trial)
        names, draws, keeps, sizes, plans = zip(*points, strict=True)
        tasks = tuple(trial.questions)
        removed = np.array([size.removed(plan) for size, plan in zip(sizes, plans, strict=True)])
        return PruningCurveResult(
            **vars(found),
            task=np.repeat(np.arange(len(tasks)), [len(items) for items in trial.questions.values()]).astype(np.int64),
            draws=np.array(draws),
            keeps=np.array(keeps),
            kept=1 - np.array([dict(plan.origin)["achieved"] for plan in plans]),
            parameters=sizes[0].total - removed,
            total=sizes[0].total,
            criteria=names,
            tasks=tasks,
            of=self.budget.of,
            notes=notes,
            seed=self.seed,
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Half of the units of every layer write nothing: nothing is lost until they are gone, but for random cuts."""
        return _planted("half of the units do nothing", seed, shuffled=False)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same model, scores dealt to other units of the same layer: no better than random."""
        return _planted("scores dealt to other units", seed, shuffled=True)

    @classmethod
    def example(cls, subject: Subject) -> tuple[PruningCurve, list[str]]:
        text = text_of(subject.tokenizer, range(8, 24))
        probe = cls(("amp_out", "magnitude"), keeps=(0.8, 0.6), n_random=2)
        return probe, [text, " ".join(text.split()[:9])]

    def _check(self) -> None:
        if CONTROL in self.criteria or not self.criteria:
            raise ValueError(f"PruningCurve: got criteria {self.criteria}; random is always there, name some others.")
        if not self.keeps or not all(0 < keep <= 1 for keep in self.keeps) or self.n_random < 0:
            raise ValueError(
                f"PruningCurve: got keeps={self.keeps}, n_random={self.n_random}, expected shares to keep, above 0 and "
                "up to 1, and 0 or more draws."
            )
        if isinstance(self.budget.allocation, tuple):
            raise ValueError("PruningCurve: got shares by layer, expected allocation 'uniform' or 'global'.")


def dealt(ranking: Ranking, seed: int) -> Ranking:
    """The same scores, dealt to other units of the same layer and kind; heads of a group stay together."""
    rng, shape = np.random.default_rng(seed), ranking.sizes.shape
    groups = ranking.heads.reshape(-1, shape.n_kv_heads, shape.group)
    heads = np.stack([rng.permuted(rng.permutation(layer), axis=1) for layer in groups]).reshape(ranking.heads.shape)
    return Ranking(heads, rng.permuted(ranking.neurons, axis=1), ranking.sizes)


def _planted(name: str, seed: int, *, shuffled: bool) -> Planted:
    subject = half_dead(seed)
    probe = PruningCurve(("amp_out", "magnitude"), keeps=(0.75, 0.5, 0.4), n_random=8, seed=seed)
    texts = random_texts(subject, seed, 8)

    def solve() -> PruningCurveResult:
        if not shuffled:
            result = probe.run(subject, texts)
            assert isinstance(result, PruningCurveResult)
            return result
        scores = scored(subject, texts[::2], probe.criteria)
        rivals = [
            (criterion, draw, dealt(scores.ranking(criterion), seed * 1009 + draw))
            for criterion in probe.criteria
            for draw in range(probe.n_random)
        ]
        return probe.solved(subject, Trial.of(texts), [*rivals, *probe.control(subject, scores.ranking())])

    def kl(criterion: str, *keeps: float) -> Callable[[Any], float]:
        return lambda found: float(
            found.curves("kl")
            .set_index(["criterion", "keep"])["value"]
            .loc[[(criterion, keep) for keep in keeps]]
            .max()
        )

    def sigmas(found: Any) -> float:
        """How far the dealt scores are from random cuts, in standard errors over draws."""
        rows: Any = found.table()
        at = rows[(rows["measure"] == "kl") & (rows["keep"] == 0.5)].groupby("criterion")["value"]
        mean, variance = at.mean(), at.var() / at.count()
        return float((mean["amp_out"] - mean[CONTROL]) / np.sqrt(variance["amp_out"] + variance[CONTROL]))

    if shuffled:
        expectations = (Expectation("KL of dealt scores against random, in standard errors", sigmas, -3.0, 3.0),)
    else:
        none = 1e-6  # float32: sums in another order
        expectations = (
            *(Expectation(f"KL by {c} while dead units last", kl(c, 0.75, 0.5), -none, none) for c in probe.criteria),
            Expectation("KL by amp_out beyond that", kl("amp_out", 0.4), 1e-4, np.inf),
            Expectation("KL of random cuts by then", kl(CONTROL, 0.5), 1e-3, np.inf),
        )
    return Planted(name, {"dead_neurons": np.arange(1, 48, 2), "dead_heads": np.array([2, 3])}, solve, expectations)
