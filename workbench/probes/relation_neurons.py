"""Which neurons follow one factual relation? Those whose values pick out its prompts among those of other relations.

Score = average precision of a neuron's mean response, positives the prompts of one relation that the model answers.
Source: Liu et al., 2025, "On Relation-Specific Neurons in Large Language Models" (arXiv 2502.17355); see `mode`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from workbench.methods.relations.average_precision import chance_level
from workbench.methods.relations.facts import Facts, Prompt, ask, checked_rule, project_facts
from workbench.methods.relations.relational import RelationNeuronsResult
from workbench.methods.relations.responses import Layout, layer_responses, parts_there
from workbench.methods.relations.selectivity import Scorer, Scores, q_values, ranks
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds

if TYPE_CHECKING:
    from workbench.subject import Subject

PAPER_PARTS = ("gate", "up", "down")
PAPER_NEGATIVES = 4  # per positive
PAPER_SHARE = 3000 / 835_584  # of all units: the paper's top 3000 in Llama-2-7B


@dataclass(frozen=True)
class RelationNeurons(Probe):
    """Finds neurons that respond to one relation. Data: `Facts`, such as `project_facts()` or `read_lre(path)`.

    mode               "corrected": both signs, FDR, inputs of the down projection; "paper": as published
    templates          wordings: neurons are selected on the first; the others show what survives a change of words.
                       None: the first two that all relations have, one in mode "paper"
    parts              "neurons", "gate", "up", "down" (each a projection's output). None: neurons; in mode "paper"
                       gate, up and down, as far as the model has them
    two_sided          also find neurons that are low for their relation. None: not in mode "paper"
    rule               when a prompt counts as answered, "exact" or "prefix" (two tokens). None: prefix in mode "paper"
    only_answered      rank only prompts that the model answers; False: all, for models that know none of the facts
    held_out           share of each relation's subjects kept out of all this, for `Deactivation` (the paper: 50 facts)
    negatives_per_positive   None: all other relations' prompts; 4 in mode "paper"
    top_k              select at most so many. None: all with q <= fdr; 0.36 % of all units in mode "paper"
    tokens, special    mean over a prompt's tokens or the last one; whether special tokens count in the mean
    fewest             a relation with fewer prompts left is dropped, which `notes` says
    n_null             random orders behind the p-values, which a fitted tail extends
    """

    mode: Literal["corrected", "paper"] = "corrected"
    templates: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    two_sided: bool | None = None
    rule: Literal["exact", "prefix"] | None = None
    only_answered: bool = True
    held_out: float = 0.3
    negatives_per_positive: int | None = None
    top_k: int | None = None
    fdr: float = 0.05
    tokens: Literal["mean", "last"] = "mean"
    special: bool = False
    layers: tuple[int, ...] | None = None
    fewest: int = 5
    n_null: int = 20_000
    seed: int = 0

    bounds: ClassVar[Bounds] = {
        "negatives_per_positive": 1,
        "top_k": 1,
        "fdr": (0, 1),
        "layers": 0,
        "fewest": 1,
        "n_null": 1,
    }

    def measure(self, subject: Subject, data: Facts) -> RelationNeuronsResult:
        if not isinstance(data, Facts):
            raise ValueError(f"RelationNeurons: got a {type(data).__name__}, expected Facts, such as project_facts().")
        parts = self._default(self.parts, ("neurons",), parts_there(subject, PAPER_PARTS))
        layout, notes = Layout.of(subject, parts, self.layers), []
        if self.parts is None and self.mode == "paper" and parts != PAPER_PARTS:
            lacking = " and no ".join(part for part in PAPER_PARTS if part not in parts)
            notes.append(f"{subject.name} has no {lacking}: only {' and '.join(parts)} were read")
        detection, evaluation = data.split(self.held_out, self.seed)
        templates = self.templates or data.templates[: self._default(None, 2, 1)]
        if not templates:
            raise ValueError(
                f"RelationNeurons: {data.name!r} has no template that all of its {len(data.relations)} relations "
                "share, expected one. Keep some relations by Facts.where."
            )
        asked = {template: detection.of(template).prompts for template in templates}
        facts, kept = self._answered(subject, asked)
        count = [Counter(prompt.relation for prompt in prompts) for prompts in kept.values()]
        relations = tuple(name for name in data.relations if min(one[name] for one in count) >= self.fewest)
        if len(relations) < 2:
            raise ValueError(self._too_few(subject, facts))
        few = [name for name in data.relations if name not in relations]
        notes += [f"{name}: fewer than {self.fewest} prompts answered, left out" for name in few]
        scores = []
        for template in templates:
            used = [prompt for prompt in kept[template] if prompt.relation in relations]
            texts = [prompt.text for prompt in used]
            responses = layer_responses(subject, texts, layout, tokens=self.tokens, special=self.special)
            scores.append(self.scored(np.array([relations.index(prompt.relation) for prompt in used]), responses))
        held = tuple((p.relation, p.subject, p.template, p.text, *p.answers) for p in evaluation.prompts)
        return self.result(scores, facts, held, relations, tuple(templates), layout, tuple(notes))

    def scored(self, relation: np.ndarray, layers: Iterable[np.ndarray]) -> Scores:
        """Scores of responses (unit, prompt), layer after layer, for the relation (prompt,) of each prompt."""
        scorer = Scorer.of(
            relation,
            two_sided=self._default(self.two_sided, True, False),
            negatives_per_positive=self._default(self.negatives_per_positive, None, PAPER_NEGATIVES),
            n_null=self.n_null,
            seed=self.seed,
        )
        return scorer.score_all(layers)

    def result(
        self,
        scores: Sequence[Scores],
        facts: pd.DataFrame,
        evaluation: tuple[tuple[str, ...], ...],
        relations: tuple[str, ...],
        templates: tuple[str, ...],
        layout: Layout,
        notes: tuple[str, ...] = (),
    ) -> RelationNeuronsResult:
        """Select on the first template's scores, and put everything together."""
        ap, sign, p, null, chance = (
            np.stack([getattr(one, name) for one in scores]) for name in ("ap", "sign", "p", "null", "chance")
        )
        q, place = np.stack([q_values(one.p) for one in scores]), ranks(ap[0])
        paper_k = max(1, round(PAPER_SHARE * ap[0, ..., 0].size))
        selected = place < self._default(self.top_k, ap[0, ..., 0].size, paper_k)
        if self.mode == "corrected":
            selected &= q[0] <= self.fdr
        return RelationNeuronsResult(
            ap=ap,
            sign=sign,
            p=p,
            q=q,
            selected=selected,
            other_mean=scores[0].others,
            chance=chance,
            null=null[0],
            facts=facts,
            evaluation=evaluation,
            relations=relations,
            templates=templates,
            layers=layout.layers,
            parts=layout.parts,
            widths=layout.widths,
            mode=self.mode,
            two_sided=self._default(self.two_sided, True, False),
            fdr=self.fdr,
            seed=self.seed,
            notes=notes,
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """2000 neurons, 300 prompts of each of five relations: 0-49 high and 50-99 low for the first relation."""
        return _planted("planted", cls(seed=seed), shift=1.0)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same neurons without the shift: AP at its exact chance level, p-values uniform, nothing selected."""
        return _planted("null", cls(seed=seed), shift=0.0)

    @classmethod
    def example(cls, subject: Subject) -> tuple[RelationNeurons, Facts]:
        few = project_facts().where(lambda p: p.relation in ("father", "home", "river", "cargo") and p.subject[0] < "g")
        return cls(only_answered=False, n_null=500), few

    def _default(self, value: Any, corrected: Any, paper: Any) -> Any:
        return (corrected if self.mode == "corrected" else paper) if value is None else value

    def _answered(
        self, subject: Subject, asked: dict[str, tuple[Prompt, ...]]
    ) -> tuple[pd.DataFrame, dict[str, list[Prompt]]]:
        """How many prompts the subject answers, and those that are scored."""
        rule, rows, kept = checked_rule(self._default(self.rule, "exact", "prefix")), [], {}
        for template, prompts in asked.items():
            answers = ask(subject, prompts)
            use = answers.right(rule) if self.only_answered else np.ones(len(prompts), dtype=bool)
            kept[template] = [prompt for prompt, used in zip(prompts, use, strict=True) if used]
            table = pd.DataFrame({"relation": [p.relation for p in prompts], "template": template, "asked": 1})
            table = table.assign(prefix=answers.prefix, exact=answers.exact, scored=use.astype(int))
            groups = table.groupby(["relation", "template"], sort=False, as_index=False)
            rows.append(groups.agg({"asked": "sum", "prefix": "mean", "exact": "mean", "scored": "sum"}))
        return pd.concat(rows, ignore_index=True), kept

    def _too_few(self, subject: Subject, facts: pd.DataFrame) -> str:
        return (
            f"RelationNeurons: {subject.name} answers {facts['scored'].sum()} of {facts['asked'].sum()} prompts, "
            f"expected at least {self.fewest} in each of two relations. These facts mean nothing to it: "
            "give it facts that it knows, or only_answered=False to see which neurons follow the mere wording."
        )


def _planted(name: str, probe: RelationNeurons, shift: float) -> Planted:
    rng = np.random.default_rng(probe.seed)
    relation = np.repeat(np.arange(5), 300)
    responses = rng.normal(size=(2000, 1500)).astype(np.float32)  # (neuron, prompt)
    responses[:50, relation == 0] += shift
    responses[50:100, relation == 0] -= shift
    responses[100] = 1.0  # a neuron that never varies

    def solve() -> RelationNeuronsResult:
        names, layout = tuple(f"relation {r}" for r in range(5)), Layout((0,), ("neurons",), (2000,))
        counts = {"asked": 300, "prefix": 1.0, "exact": 1.0, "scored": 300}
        facts = pd.DataFrame({"relation": names, "template": "simulated"}).assign(**counts)
        return probe.result([probe.scored(relation, [responses])], facts, (), names, ("simulated",), layout)

    high, low, silent, level = slice(0, 50), slice(50, 100), slice(101, 2000), chance_level(1500, 300)

    def ap(units: slice, of: Callable = np.mean) -> Callable[[Any], float]:
        return lambda found: float(of(found.ap[0, 0, units, 0]))

    def rate(units: slice, sign: int | None = None) -> Callable[[Any], float]:
        """Share selected, with that sign."""
        fits = (lambda found: found.sign[0, 0, units, 0] == sign) if sign else (lambda found: True)
        return lambda found: float((found.selected[0, units, 0] & fits(found)).mean())

    def passed(found: Any) -> float:
        return float((found.p[0, 0, silent, 0] <= 0.05).mean())

    def exact(found: Any) -> float:
        return float(found.chance[0, 0])

    tests = [
        Expectation("p <= .05 among silent", passed, 0.035, 0.065),
        Expectation("chance level of AP", exact, level - 1e-12, level + 1e-12),
        Expectation("mean AP of silent", ap(silent), 0.210, 0.2135),  # of the better of both ends; .2037 of one end
        Expectation("AP of a constant neuron", ap(slice(100, 101)), 0.2 - 1e-6, 0.2 + 1e-6),
        Expectation("silent selected", rate(silent), 0.0, 0.01 if shift else 0.001),  # one of 1899
    ]
    if shift:
        tests += [
            Expectation("high found as high", rate(high, 1), 1.0, 1.0),
            Expectation("low found as low", rate(low, -1), 1.0, 1.0),
            Expectation("mean AP of high", ap(high), 0.44, 0.49),
            Expectation("smallest planted above the largest silent",
                        lambda found: ap(slice(0, 100), np.min)(found) - ap(silent, np.max)(found), 0.05, 1.0),
        ]  # fmt: skip
    return Planted(name, {"responses": responses, "relation": relation}, solve, tuple(tests))
