"""PruningDesk: heads and neurons leave by their scores, layer by layer if you like, beside as many of each at random.

loss added = nll(pruned) - nll(untouched), nats per token of held-out texts. Scores are made once: a plan is a sort.
Sources of the criteria: `workbench.methods.pruning.criteria` and `taylor`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from workbench import plots
from workbench.corpora import relations
from workbench.methods.pruning.budgets import Budget, Ranking
from workbench.methods.pruning.criteria import CRITERIA
from workbench.methods.pruning.curves import CONTROL, Trial, as_prompt, compare
from workbench.methods.pruning.scores import PruningScoresResult
from workbench.methods.pruning.speed import timed
from workbench.methods.relations.facts import Answers, Prompt, ask
from workbench.probes.pruning_curve import PruningCurve, dealt
from workbench.probes.pruning_scores import PruningScores
from workbench.pruned.plan import Plan
from workbench.pruned.report import kept_map
from workbench.stats import bootstrap_interval, wilson_interval
from workbench.toggle import Composed, Toggle
from workbench.toggles.prune import Prune
from workbench.widgets import material
from workbench.widgets.controls import Choice, Control, Number, Slider, Sliders, Switch
from workbench.widgets.controls import Text as Words
from workbench.widgets.desk import Desk
from workbench.widgets.picture import Fact, Pane, Picture, lines_of

PRUNED, CHANCE = "pruned", "random units"
ARMS = ("untouched", PRUNED, CHANCE)
VIEWS = ("units kept", "loss by text", "all budgets", "scores")
ALLOCATIONS = ("global", "uniform", "layer by layer")
KEEPS = (0.8, 0.6, 0.4)  # of the view of all budgets
N_FACTS = 16
N_LINES = 4  # answers shown
ROUNDS = 6  # of timing
NEURON_STEP = 0.05  # of the sliders of neurons; those of heads move by whole heads


class Judged(NamedTuple):
    """What one arm made of the texts and facts: (text,) nats per token, KL likewise, and what it answered."""

    nll: np.ndarray
    kl: np.ndarray
    answers: Answers | None


class Base(NamedTuple):
    """What the untouched subject made of them, with its predictions, (seq, vocab) per text."""

    judged: Judged
    logprobs: dict[int, Tensor]
    ids: dict[int, list[int]]


@dataclass(frozen=True)
class PruningDesk(Desk):
    """Settings of a smaller model; the picture shows who is kept and what that costs.

    criterion   scores heads and neurons        allocation   global: the lowest anywhere; uniform; or layer by layer
    keep        share of the parameters in heads and neurons that stays
    heads, neurons   share of each layer that stays, such as "1, 0.5, 1"; 0 switches the part off; "": all stay
    form        slice, or mask where heads can't be cut out
    texts       to judge by, one per line; "": a piece of each kind that the subject knows
    measure     take the time of the whole, the masked and the sliced model, which needs seconds
    seed        of the random units
    """

    view: str = "units kept"
    criterion: str = "amp_out"
    allocation: str = "global"
    keep: float = 0.6
    heads: str = ""
    neurons: str = ""
    form: str = "slice"
    texts: str = ""
    measure: bool = False
    seed: int = 0

    notebook = "73_pruning_desk"
    question = "What can a model lose?"

    def fitted(self) -> dict[str, Any]:
        whole = Sliders.spelt([1.0] * self.subject.n_layers)
        return {"heads": self.heads or whole, "neurons": self.neurons or whole}

    def controls(self) -> tuple[Control, ...]:
        by_layer, a = self.allocation == "layer by layer", self.subject.anatomy
        bundles = a.n_kv_heads if a.n_kv_heads > 1 else a.n_heads  # heads that share keys leave together
        names = tuple(map(str, range(self.subject.n_layers)))
        criteria = tuple(name for name in CRITERIA if name != CONTROL)
        return (
            Choice("view", "show", options=VIEWS),
            Choice("criterion", "score", options=criteria),
            Choice("allocation", "who pays", options=ALLOCATIONS),
            Slider("keep", "share of parameters kept", not by_layer, 0.1, 1.0, 0.05),
            Choice("form", "as a", options=("slice", "mask")),
            Number("seed", "random units no."),
            Switch("measure", "measure its speed"),
            Sliders("heads", "heads kept, by layer", by_layer, 0.0, 1.0, 1 / bundles, names),
            Sliders("neurons", "neurons kept, by layer", by_layer and bool(a.d_mlp), 0.0, 1.0, NEURON_STEP, names),
            Words("texts", "texts of your own to judge by, one per line", lines=2, optional=True),
        )

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("criterion", "keep")

    def scores(self) -> PruningScoresResult:
        """Scores of all units by the criterion, from texts that judge nothing."""
        return self.once(("scores", self.criterion), self._scored)

    def plan(self, arm: str = PRUNED) -> Plan:
        """What is kept; of "random units" as many of each layer and kind, but any."""
        decides = (self.heads, self.neurons) if self.allocation == "layer by layer" else self.keep
        key = ("plan", arm, self.seed if arm == CHANCE else None, self.criterion, self.allocation, decides)
        return self.once(key, lambda: self._planned(arm))

    def toggle(self, arm: str = PRUNED) -> Toggle:
        """The cut of these settings, or its control."""
        return Prune(self.plan(arm), self.form)  # type: ignore[arg-type]

    def picture(self) -> Picture:
        drawings = {VIEWS[0]: self._kept, VIEWS[1]: self._by_text, VIEWS[2]: self._budgets, VIEWS[3]: self._scores}
        facts, said = self._facts(), [*self._idle(), *self.scores().notes]
        if self.measure:
            timed_facts, verdict = self._speed()
            facts, said = facts + timed_facts, [*said, *verdict]
        return Picture(
            drawings[self.view](),
            tuple(self._pane(arm) for arm in ARMS if self._items()),
            facts=facts,
            words=" ".join(said),
            code=self._code(),
        )

    # Plans: sorts of scores that are kept

    def _scored(self) -> PruningScoresResult:
        texts = material.by_kind(self.subject, "train")
        result = PruningScores(self.criterion).run(self.subject, list(texts.values()))
        assert isinstance(result, PruningScoresResult)
        return result

    def _ranking(self, arm: str) -> Ranking:
        own = self.scores().ranking()
        return own if arm == PRUNED else self.once(("dealt", self.criterion, self.seed), lambda: dealt(own, self.seed))

    @property
    def _of(self) -> str:
        """Whose units can pay in this model."""
        no_heads, no_neurons = self.scores().refusals
        return "neurons" if no_heads else "heads" if no_neurons else "blocks"

    def _planned(self, arm: str) -> Plan:
        ranking, plan = self._ranking(arm), Plan.of(self.subject)
        if self.allocation == "layer by layer":
            for control in self._sliders():
                plan = plan & self._by_layer(ranking, control)
            return plan
        if self.keep == 1.0:
            return plan
        return ranking.plan(1 - self.keep, Budget(of=self._of, allocation=self.allocation))  # type: ignore[arg-type]

    def _sliders(self) -> list[Sliders]:
        """The sliders that can be moved now, one row of them for each kind of unit."""
        return [control for control in self.controls() if isinstance(control, Sliders) and control.shown]

    def _by_layer(self, ranking: Ranking, control: Sliders) -> Plan:
        """What the sliders of one kind leave: at least one unit where they leave any, none where they are at 0."""
        gone, off = self._gone(control)
        plan = Plan.of(self.subject)
        if gone:
            plan = ranking.plan(None, Budget(of=control.name, allocation=gone))  # type: ignore[arg-type]
        for layer in off:
            plan = plan.edit(layer, **{control.name: ()})
        return plan

    def _gone(self, control: Sliders) -> tuple[dict[int, float], list[int]]:
        """Layer -> share that leaves by score, no more than the scores allow; and the layers that are switched off."""
        kept = dict(enumerate(control.numbers(self.settings[control.name])))
        if min(kept.values()) == 1.0:
            return {}, []
        most = self.scores().ranking().most(Budget(of=control.name))  # type: ignore[arg-type]
        gone = {layer: min(round(1 - share, 6), most) for layer, share in kept.items() if 0 < share < 1}
        return gone, [layer for layer, share in kept.items() if share == 0]

    # Arms, each read once for the plan that decides it

    @property
    def _judging(self) -> dict[str, str]:
        """Name -> text to judge by."""
        own = material.lines(self.texts)
        return {f"text {n}": text for n, text in enumerate(own, 1)} or material.by_kind(self.subject, "held_out")

    def _items(self) -> list[Prompt]:
        """Facts to ask for, in forms in which they were never asked in training; none of a model that knows none."""
        if not material.knows_our_words(self.subject):
            return []
        return list(_asked_of_all())

    def _base(self) -> Base:
        return self.once(("base", self.texts), self._read_base)

    def _read_base(self) -> Base:
        texts, found, ids = self._trial().held_out, {}, {}
        for row, text, logprobs in self.subject.predictions(texts):
            if len(text) < 2:
                raise ValueError(f"texts: got {texts[row]!r}, which is one token, expected at least two.")
            found[row], ids[row] = logprobs.cpu(), text
        lost = np.array([compare(found[row], found[row], ids[row]) for row in range(len(texts))])
        return Base(Judged(lost[:, 0], lost[:, 1], self._asked()), found, ids)

    def _trial(self) -> Trial:
        return Trial(list(material.by_kind(self.subject, "train").values()), list(self._judging.values()))

    def _asked(self) -> Answers | None:
        return ask(self.subject, self._items()) if self._items() else None

    def _judged(self, arm: str) -> Judged:
        if arm == "untouched" or self.plan(arm) == Plan.of(self.subject):
            return self._base().judged
        return self.once(("judged", self.texts, self.plan(arm), self.form), lambda: self._judge(arm))

    def _judge(self, arm: str) -> Judged:
        base, texts = self._base(), self._trial().held_out
        lost = np.zeros((len(texts), 2))
        with self.subject.under(self.toggle(arm)):
            for row, ids, logprobs in self.subject.predictions(texts):
                lost[row] = compare(base.logprobs[row], logprobs.cpu(), ids)
            return Judged(lost[:, 0], lost[:, 1], self._asked())

    # What is told

    def _added(self, arm: str) -> tuple[float, float, float]:
        """Loss added in nats per token, with its interval over texts."""
        base = self._base()
        weights = np.array([len(base.ids[row]) - 1.0 for row in range(len(base.ids))])
        more = self._judged(arm).nll - base.judged.nll
        value, low, high = bootstrap_interval(more, weights=weights, n_bootstrap=1000)
        return float(value), float(low), float(high)

    def _right(self, arm: str) -> int:
        answers = self._judged(arm).answers
        return 0 if answers is None else int(answers.exact.sum())

    def _facts(self) -> tuple[Fact, ...]:
        plan, sizes, layers = self.plan(), self.scores().sizes, range(self.subject.n_layers)
        facts = [Fact("parameters kept", 1 - sizes.removed(plan) / sizes.total, "share")]
        for family in ("heads", "neurons"):
            if plan.total(family):
                kept = sum(plan.kept(layer, family) for layer in layers) / (len(layers) * plan.total(family))
                facts.append(Fact(f"{family} kept", kept, "share"))
        for arm in ARMS[1:]:
            more, low, high = self._added(arm)
            facts.append(Fact(f"loss added, {arm}", more, "nats per token", low, high))
        for arm in ARMS if self._items() else ():
            count = self._right(arm)
            ends = map(float, wilson_interval(count, N_FACTS))
            facts.append(Fact(f"facts recalled, {arm}", count / N_FACTS, "share", *ends))
        return tuple(facts)

    def _speed(self) -> tuple[tuple[Fact, ...], list[str]]:
        """Milliseconds per new token, whole and masked and sliced; and why they can't be compared, where they can't."""
        if self.form != "slice":
            raise ValueError("measure: a mask saves nothing, so there is no speed to measure. Set form='slice'.")
        plan = self.plan()
        whole = plan == Plan.of(self.subject)
        sliced, masked = (Composed(), Composed()) if whole else (Prune(plan), Prune(plan, "mask"))
        clock = self.once(
            ("timed", plan),
            lambda: timed(self.subject, sliced=sliced, masked=masked, prompt_tokens=64, repeats=ROUNDS),
        ).set_index("form")
        facts = []
        for form in ("dense", "masked", "sliced"):
            ms, low, high = clock.loc[form, ["decode_ms", "decode_low", "decode_high"]]
            facts.append(Fact(f"per new token, {form} (quartiles)", ms, "ms", low, high))
        verdict = clock.loc["sliced", "verdict"]
        return tuple(facts), [verdict] if verdict else []

    def _finding(self) -> str:
        left = 1 - self.scores().sizes.removed(self.plan()) / self.scores().sizes.units
        where = {"global": "lowest first", "uniform": "every layer alike"}.get(self.allocation, self.allocation)
        title = f"With {left:.0%} of heads and neurons kept ({self.criterion}, {where}) the loss grows by "
        title += f"{self._added(PRUNED)[0]:.2g} nats per token, with random units by {self._added(CHANCE)[0]:.2g}"
        if self._items():
            known = [self._right(arm) for arm in (PRUNED, CHANCE, "untouched")]
            title += f"; {known[0]} of {N_FACTS} facts are recalled, with random units {known[1]}, untouched {known[2]}"
        return title

    def _idle(self) -> list[str]:
        idle = [] if self.plan() != Plan.of(self.subject) else ["Everything is kept: all three are the same."]
        if self._items() and self._right("untouched") < N_FACTS / 2:
            right = self._right("untouched")
            idle.append(f"The untouched model itself recalls only {right} of {N_FACTS} facts: look at the loss.")
        return idle

    def _pane(self, arm: str) -> Pane:
        answers = self._judged(arm).answers
        assert answers is not None
        some = slice(N_FACTS // N_LINES - 1, None, N_FACTS // N_LINES)
        return Pane(arm, lines_of([prompt.text for prompt in self._items()][some], answers.texts[some]))

    # Figures

    def _kept(self) -> go.Figure:
        return kept_map(self.plan(), title=self._finding())

    def _by_text(self) -> go.Figure:
        """Loss added in each text: a mean over all hides who pays."""
        base, names = self._base().judged.nll, list(self._judging)
        rows = [
            (name, float(more), arm)
            for arm in ARMS[1:]
            for name, more in zip(names, self._judged(arm).nll - base, strict=True)
        ]
        drawn = pd.DataFrame(rows, columns=["text", "more", "arm"])
        colors = {PRUNED: plots.BLUE, CHANCE: plots.GREY}
        titles: dict[str, Any] = {"x_title": "held-out text", "y_title": "loss added (nats per token)"}
        return plots.bars(drawn, "text", "more", color="arm", title=self._finding(), colors=colors, **titles)

    def _budgets(self) -> go.Figure:
        """Loss against the share kept, several draws of random units beside it."""
        if self.allocation == "layer by layer":
            raise ValueError(
                "all budgets: shares of layers of your own are one budget. Set allocation to global or uniform."
            )
        budget = Budget(of=self._of, allocation=self.allocation)  # type: ignore[arg-type]
        most = self.scores().ranking().most(budget)
        keeps = tuple(sorted({keep for keep in (*KEEPS, self.keep) if 1 - keep <= most}, reverse=True))
        probe = PruningCurve((self.criterion,), keeps, n_random=2, budget=budget, form=self.form, seed=self.seed)  # type: ignore[arg-type]
        found: Any = self.once(("budgets", self.texts, probe), lambda: probe.run(self.subject, self._trial()))
        return found.plot("nll_added", at=self.keep if self.keep in keeps else None)

    def _scores(self) -> go.Figure:
        return self.scores().plot("curves", ratio=1 - self.keep)

    def _code(self) -> str:
        form = "" if self.form == "slice" else f", {self.form!r}"
        return (
            f"scores = PruningScores({self.criterion!r}).run(subject, texts)\nplan = {self._plan_code()}\n"
            f"with subject.under(Prune(plan{form})):\n    print(subject.nll(held_out))"
        )

    def _plan_code(self) -> str:
        if self.allocation != "layer by layer":
            of = "" if self._of == "blocks" else f", of={self._of!r}"
            return f"scores.plan(keep={self.keep:g}, allocation={self.allocation!r}{of})"
        cuts, edits = [], ""
        for control in self._sliders():
            gone, off = self._gone(control)
            cuts += [f"scores.plan(of={control.name!r}, allocation={gone})"] if gone else []
            edits += "".join(f".edit({layer}, {control.name}=())" for layer in off)
        plan = " & ".join(cuts) or "Plan.of(subject)"
        return (f"({plan})" if len(cuts) > 1 and edits else plan) + edits


@functools.cache
def _asked_of_all() -> tuple[Prompt, ...]:
    """Facts of all relations, which are mixed, evenly chosen."""
    items = relations.items("held_out", 0)
    return tuple(as_prompt(items[n * len(items) // N_FACTS]) for n in range(N_FACTS))
