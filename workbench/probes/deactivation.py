"""What breaks when a relation's neurons are off? Its own facts, other relations', or those of a second language?

drop(i, j) = (accuracy_i - accuracy_i with the top k neurons of j off) / accuracy_i, beside matched random neurons.
Source: Liu et al., 2025, "On Relation-Specific Neurons in Large Language Models" (arXiv 2502.17355), sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from workbench.methods.relations.deactivated import DeactivationResult
from workbench.methods.relations.facts import Prompt, ask, project_facts
from workbench.methods.relations.lesions import Ask, Lesions, checked_sizes, switch_off
from workbench.methods.relations.responses import Layout, parts_there
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.toggles import Clamp

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class Deactivation(Probe):
    """Switches off the best k neurons of each relation in turn and asks all relations. Data: `Lesions`, as
    `RelationNeuronsResult.lesions()` makes them, whose prompts share no subject with those that found the neurons.

    sizes       numbers of neurons to switch off, any order
    by          "zero", or "mean": each neuron's mean over the other relations' prompts, which keeps its average
    n_random    random sets per relation and size, drawn in the same layers and parts
    rule        "exact", or the paper's "prefix" of two tokens, which credits objects that share a first word
    """

    sizes: tuple[int, ...] = (10, 30, 100, 300)
    by: Literal["zero", "mean"] = "zero"
    n_random: int = 1
    rule: Literal["exact", "prefix"] = "exact"
    seed: int = 0

    bounds: ClassVar[Bounds] = {"n_random": 0}

    def measure(self, subject: Subject, data: Lesions) -> DeactivationResult:
        if not isinstance(data, Lesions):
            raise ValueError(f"Deactivation: got a {type(data).__name__}, expected Lesions, such as result.lesions().")

        def answered(units: np.ndarray | None, relation: int, chosen: np.ndarray) -> np.ndarray:
            prompts = [data.prompts[index] for index in chosen]
            if units is None:
                return ask(subject, prompts).right(self.rule)
            with subject.under(self.clamp(data, units, relation)):
                return ask(subject, prompts).right(self.rule)

        return self.result(answered, data)

    def clamp(self, lesions: Lesions, units: np.ndarray, relation: int) -> Clamp:
        """The toggle that switches units (unit, 2, in order) off, as neurons of that relation."""
        held = tuple(lesions.held[relation][units[:, 0], units[:, 1]].tolist()) if self.by == "mean" else 0.0
        return Clamp(lesions.layout.units_by_site(units), held)  # type: ignore[arg-type]

    def result(self, answered: Ask, lesions: Lesions) -> DeactivationResult:
        """The whole analysis of anything that answers prompts with units off: a subject, or a simulated network."""
        sizes = checked_sizes(self.sizes, lesions)
        outcome = switch_off(answered, lesions, sizes, self.n_random, self.seed)
        templates = tuple(dict.fromkeys(prompt.template for prompt in lesions.prompts))
        return DeactivationResult(
            base=outcome.base,
            correct=outcome.correct,
            relation=lesions.relation_of,
            template=np.array([templates.index(prompt.template) for prompt in lesions.prompts]),
            off=outcome.off,
            k=outcome.k,
            draw=outcome.draw,
            total=outcome.total,
            affected=outcome.affected,
            relations=lesions.relations,
            templates=templates,
            sizes=sizes,
            by=self.by,
            rule=self.rule,
            seed=self.seed,
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A network in which either half of 20 hidden units carries a relation: together fatal, each half harmless."""
        return _planted("planted", cls(sizes=(10, 20), n_random=5, seed=seed), through_units=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same network with a path around its hidden units: switching any of them off changes nothing."""
        return _planted("null", cls(sizes=(10, 20), n_random=5, seed=seed), through_units=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[Deactivation, Lesions]:
        layout = Layout.of(subject, parts_there(subject, ("neurons",)) or ("down",))
        places = np.argwhere(np.ones((len(layout.layers), layout.n_units)))
        names, rng = ("father", "river", "cargo"), np.random.default_rng(0)
        few = project_facts().of("statement")
        prompts = [prompt for name in names for prompt in few.where(lambda p, r=name: p.relation == r).prompts[:4]]
        units = np.stack([places[rng.permutation(len(places))[:20]] for _ in names])
        held = np.zeros((len(names), len(layout.layers), layout.n_units), dtype=np.float32)
        return cls(sizes=(5, 20)), Lesions(names, units, held, layout, tuple(prompts))


def _planted(name: str, probe: Deactivation, through_units: bool) -> Planted:
    """Four relations of 25 prompts; cue -> 20 hidden units of 400 -> answer, right while a quarter of them speaks."""
    rng, relations = np.random.default_rng(probe.seed), tuple(f"relation {r}" for r in range(4))
    hidden = rng.permutation(400)[:80].reshape(4, 20)  # (relation, unit)
    units = np.stack([np.stack([np.zeros(20, dtype=int), own], axis=1) for own in hidden])
    prompts = tuple(Prompt(r, f"subject {n}", "simulated", f"{r} {n}", ("yes",)) for r in relations for n in range(25))
    lesions = Lesions(relations, units, np.zeros((4, 1, 400)), Layout((0,), ("neurons",), (400,)), prompts)

    def answered(off: np.ndarray | None, _: int, chosen: np.ndarray) -> np.ndarray:
        speaks = np.ones(400)
        if off is not None and through_units:
            speaks[off[:, 1]] = 0.0
        return speaks[hidden[lesions.relation_of[chosen]]].mean(axis=1) > 0.25

    def accuracy(curve: str, k: int) -> Callable[[Any], float]:
        return lambda found: float(found.curves().set_index(["curve", "k"]).loc[(curve, k), "accuracy"])

    def pooled(found: Any) -> float:
        return float(found.cumulativity().set_index("relation").loc["all, micro", "value"])

    tests = [
        Expectation("accuracy with everything on", accuracy("own relation", 0), 1.0, 1.0),
        Expectation("own accuracy, either half off", accuracy("own relation", 10), 1.0, 1.0),
        Expectation("others' accuracy, all 20 off", accuracy("other relations", 20), 1.0, 1.0),
        Expectation("own accuracy, 20 random off", accuracy("own, random neurons off", 20), 1.0, 1.0),
    ]
    fatal = 0.0 if through_units else 1.0
    tests.append(Expectation("own accuracy, all 20 off", accuracy("own relation", 20), fatal, fatal))
    if through_units:
        tests.append(Expectation("cumulativity", pooled, 1.0, 1.0))
    return Planted(name, {"hidden": hidden}, lambda: probe.result(answered, lesions), tuple(tests))
