"""ComposeDesk: stack up to three toggles and see what a mechanism keeps under each alone and under all together.

kept(together) beside the product of what each alone leaves: less means that the toggles get in each other's way.
Source: this project; the mechanisms and the toggles name theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from workbench import plots
from workbench.generation import Generation
from workbench.methods.pruning.budgets import Budget
from workbench.probes.pruning_scores import PruningScores
from workbench.site import Site
from workbench.studies.compressions import Bits, Blocks, Ranks
from workbench.studies.costs import calibration
from workbench.studies.mechanisms import CodesRecalled, FactsAnswered, Fluency, Mechanism, Reading, mechanisms
from workbench.toggle import Composed, Toggle
from workbench.toggles.evict import EvictKV
from workbench.toggles.prune import Prune
from workbench.toggles.sparsify import Sparsify
from workbench.toggles.steer import Steer
from workbench.widgets import material
from workbench.widgets.controls import Choice, Control, Number, Slider, Text
from workbench.widgets.desk import Desk
from workbench.widgets.picture import Fact, Pane, Picture, lines_of

NOTHING = "nothing"
UNTOUCHED, OTHER_DATA, TOGETHER, PRODUCT = "untouched", "untouched, other data", "together", "product of those alone"
SLOTS = ("first", "second", "third")
BITS = ((0.25, 8), (0.625, 4), (1.0, 2))  # up to this cut so many bits of 16 are left
VIEWS = ("this mechanism", "every mechanism")
AGAIN = 10_000  # added to the seed: other data of the same kind


@dataclass(frozen=True)
class ComposeDesk(Desk):
    """Toggles that act one after the other, each with how much it takes away, and what is asked of the model.

    first, second, third               names among `TOGGLES`, or "nothing"
    first_cut, second_cut, third_cut   0 takes nothing away; 1 as much as can go: some units of each layer, one block,
                                       one rank, two bits, a fiftieth of the tokens, a hundredth of the weights stay;
                                       of a push its strength in mean residual norms
    mechanism                          what is asked: the first number of one of `workbench.studies.mechanisms`;
                                       "": facts of the organism, perplexity of any other model
    seed                               draws questions and texts
    """

    view: str = "this mechanism"
    mechanism: str = ""
    first: str = "fewer heads"
    first_cut: float = 0.3
    second: str = "fewer neurons"
    second_cut: float = 0.5
    third: str = NOTHING
    third_cut: float = 0.5
    prompts: str = ""
    new_tokens: int = 10
    seed: int = 0

    notebook = "77_compose_desk"
    question = "Which mechanism survives which changes, alone and together?"

    def fitted(self) -> dict[str, Any]:
        asked = self.mechanism or ("facts" if self.subject.name.startswith("organism") else "perplexity")
        return {"mechanism": asked, "prompts": self.prompts or "\n".join(material.prompts(self.subject))}

    def controls(self) -> tuple[Control, ...]:
        one = self.view == "this mechanism"
        slots: list[Control] = []
        for slot in SLOTS:
            chosen = getattr(self, slot)
            slots.append(Choice(slot, slot, options=(NOTHING, *TOGGLES)))
            slots.append(Slider(f"{slot}_cut", f"taken away by the {slot}", chosen != NOTHING, 0.0, 1.0, 0.05))
        return (
            Choice("view", "show", options=VIEWS),
            Choice("mechanism", "what is asked", one, options=tuple(_mechanisms())),
            *slots,
            Text("prompts", "prompts, one per line", lines=3),
            Number("new_tokens", "tokens to write", True, 1, 64),
            Number("seed", "questions drawn, no."),
        )

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("first_cut", "second_cut")

    def toggle(self) -> Toggle:
        """All of them, the first acts first."""
        parts = [self._toggle(slot) for slot in self._slots]
        return functools.reduce(lambda a, b: a | b, parts, Composed())

    def picture(self) -> Picture:
        kept = self._kept_by(self._asked)
        written, receipts = {UNTOUCHED: self.answers(together=False)[0], TOGETHER: self.answers()[0]}, self.answers()[1]
        measure = next(iter(self._asked.measures))
        changed = [a != b for a, b in zip(*(one.ids for one in written.values()), strict=True)]
        facts = [Fact(f"{measure} kept, {name}", value, "share") for name, value in kept.items()]
        facts.append(Fact("answers changed", sum(changed) / len(changed), "share"))
        panes = [Pane(name, lines_of(self._prompts, made.texts)) for name, made in written.items()]
        told = tuple((receipt, "") for receipt in receipts)
        panes.append(Pane("did they act?", told or (("no toggle is chosen", ""),)))
        figure = self._one(kept) if self.view == "this mechanism" else self._every()
        idle = "" if self._slots else "No toggle is chosen: the model is untouched."
        return Picture(figure, tuple(panes), facts=tuple(facts), words=idle, code=self._code())

    def answers(self, *, together: bool = True) -> tuple[Generation, tuple[str, ...]]:
        """The continuations of the prompts under all toggles, or under none, and the receipts in words."""
        return self._written(self._all if together else ())

    # Parts, each computed once for the settings that decide it

    @property
    def _prompts(self) -> tuple[str, ...]:
        return material.lines(self.prompts)

    @property
    def _slots(self) -> tuple[str, ...]:
        return tuple(slot for slot in SLOTS if getattr(self, slot) != NOTHING)

    @property
    def _all(self) -> tuple[Toggle, ...]:
        return self.toggle().parts

    @property
    def _asked(self) -> Mechanism:
        return _mechanisms()[self.mechanism]

    def _toggle(self, slot: str) -> Toggle:
        name, cut = getattr(self, slot), getattr(self, f"{slot}_cut")
        if cut == 0:
            return Composed()
        return self.once(("toggle", name, cut, self.seed), lambda: TOGGLES[name](self, cut))

    def _written(self, toggles: tuple[Toggle, ...]) -> tuple[Generation, tuple[str, ...]]:
        """The continuations under toggles, and their receipts in words."""

        def write() -> tuple[Generation, tuple[str, ...]]:
            around = len(self.subject.active)
            with self.under(Composed(toggles)):
                made = self.subject.generate(self._prompts, max_new_tokens=self.new_tokens)
                return made, tuple(map(str, self.subject.receipts[around:]))

        return self.once(("written", self._prompts, self.new_tokens, toggles), write)

    def _reading(self, asked: Mechanism, toggles: tuple[Toggle, ...], seed: int) -> Reading:
        def read() -> Reading:
            with self.under(Composed(toggles)):
                return asked.read(self.subject, seed)

        return self.once(("reading", asked, toggles, seed), read)

    def _kept_by(self, asked: Mechanism) -> dict[str, float]:
        """Condition -> how much of the untouched model's mechanism is left; ValueError where it has none."""
        before = self._reading(asked, (), self.seed)
        if why := asked.lacking(before):
            raise ValueError(f"{next(iter(asked.measures))} can't be asked of {self.subject.name}: {why}")

        def kept(toggles: tuple[Toggle, ...], seed: int = self.seed) -> float:
            return asked.kept(before, self._reading(asked, toggles, seed))[0]

        found = {OTHER_DATA: kept((), self.seed + AGAIN)}
        alone = [kept(self._toggle(slot).parts) for slot in self._slots]
        named = [f"{getattr(self, slot)}, {getattr(self, f'{slot}_cut'):.0%}" for slot in self._slots]
        found |= {f"{name} ({slot})": value for name, slot, value in zip(named, self._slots, alone, strict=True)}
        if len(alone) > 1:
            found |= {TOGETHER: kept(self._all), PRODUCT: math.prod(max(0.0, value) for value in alone)}
        return found

    # Figures

    def _one(self, kept: Mapping[str, float]) -> go.Figure:
        measure, meaning = next(iter(self._asked.measures.items()))
        table = pd.DataFrame({"condition": list(kept), "kept": list(kept.values())})
        if TOGETHER in kept:
            title = (
                f"Of {measure}, {kept[TOGETHER]:.0%} is left under all, {kept[PRODUCT]:.0%} if each did its own damage"
            )
        else:
            alone = [name for name in kept if name != OTHER_DATA]
            title = f"Of {measure}, {kept[alone[0]]:.0%} is left under {alone[0]}" if alone else f"{measure}: untouched"
        scale = f"{measure} kept (1: as before, 0: gone)"
        figure = plots.bars(table, "condition", "kept", title=title, x_title=meaning, y_title=scale)
        figure.update_xaxes(tickangle=-35)  # names reach to the left, where there is room
        return figure.add_hline(1.0, line={"color": plots.GREY, "width": 1, "dash": "dot"})

    def _every(self) -> go.Figure:
        rows: list[tuple[str, str, float]] = []
        for name, asked in _mechanisms().items():
            try:
                rows += [(name, condition, value) for condition, value in self._kept_by(asked).items()]
            except ValueError:
                continue  # this model lacks it, as choosing it says in words
        if not rows:
            raise ValueError(
                f"None of the mechanisms can be asked of {self.subject.name}: it has not learned our texts."
            )
        table = pd.DataFrame(rows, columns=["mechanism", "condition", "kept"])
        last = TOGETHER if len(self._slots) > 1 else table["condition"].iloc[-1]
        ranked: Any = table[table["condition"] == last]
        ranked = ranked.sort_values("kept")
        worst, best = ranked.iloc[0], ranked.iloc[-1]
        title = f"{best['mechanism'].capitalize()} keeps {best['kept']:.0%}, {worst['mechanism']} {worst['kept']:.0%}"
        named: dict[str, Any] = {"x_title": "", "y_title": "", "value_title": "kept"}
        title = f"{title} ({worst['condition']})"
        return plots.heatmap(table, "condition", "mechanism", "kept", title=title, span=(0.0, 1.0), **named)

    def _code(self) -> str:
        stack = " | ".join(type(part).__name__ + "(…)" for part in self._all) or "Composed()"
        return (
            f"with subject.under({stack}):\n"
            f"    after = mechanism.read(subject, seed={self.seed})\n"
            "mechanism.kept(before, after)"
        )


@functools.cache
def _mechanisms() -> Mapping[str, Mechanism]:
    """First measure -> mechanism; those that are asked most with little data, so that a slider answers at once."""
    small = {Fluency: Fluency(12), FactsAnswered: FactsAnswered(3), CodesRecalled: CodesRecalled(10)}
    return {next(iter(one.measures)): small.get(type(one), one) for one in mechanisms()}


def _bits(desk: ComposeDesk, cut: float) -> Toggle:
    bits = next(bits for most, bits in BITS if cut <= most)
    return Bits.packed(desk.subject, bits, bits)


def _tokens(desk: ComposeDesk, cut: float) -> Toggle:
    return EvictKV(max(1.0 - cut, 0.02), sinks=1, window=2, every=1)


def _ranks(desk: ComposeDesk, cut: float) -> Toggle:
    return Ranks().toggle(desk.subject, 1 - cut, desk.seed)


def _units(desk: ComposeDesk, cut: float, of: Any) -> Toggle:
    texts, budget = calibration(desk.seed), Budget(of=of, allocation="global")
    ranking: Any = desk.once(
        ("scores", desk.seed),
        lambda: PruningScores(seed=desk.seed).run(desk.subject, texts).ranking(),  # type: ignore[attr-defined]
    )
    return Prune(ranking.plan(min(cut, ranking.most(budget)), budget))


def _blocks(desk: ComposeDesk, cut: float) -> Toggle:
    n = min(round(cut * desk.subject.n_layers), desk.subject.n_layers - 1)
    if not n:
        return Composed()
    return desk.once(("influence", n, desk.seed), lambda: Blocks.least_missed(desk.subject, n, desk.seed))


def _zeros(desk: ComposeDesk, cut: float) -> Toggle:
    return Sparsify(min(cut, 0.99))


def _push(desk: ComposeDesk, cut: float) -> Toggle:
    """As many mean residual norms as `cut` says towards refusal, in the middle of the model."""
    site = Site(desk.subject.n_layers // 2, "resid_out")
    found = desk.once(("direction",), lambda: material.direction(desk.subject, "refusal"))
    norm = desk.once(("norm",), lambda: material.norm(desk.subject, site))
    return Steer(found, site, cut * norm / found.norm)


TOGGLES: Mapping[str, Callable[[ComposeDesk, float], Toggle]] = {
    "fewer bits in the cache": _bits,
    "fewer tokens in the cache": _tokens,
    "lower rank of the cache": _ranks,
    "fewer heads": lambda desk, cut: _units(desk, cut, "heads"),
    "fewer neurons": lambda desk, cut: _units(desk, cut, "neurons"),
    "fewer blocks": _blocks,
    "zero weights": _zeros,
    "push towards refusal": _push,
}
