"""DiceDesk: change a word, or push the model, and throw the same dice: what would it have written with the same luck?

token = argmax_i p_i e^(g_i): the edit changes p, the dice g stay; fresh dice tell how much luck alone changes.
Source: Chatzi et al., 2024, "Counterfactual Token Generation in Large Language Models" (arXiv 2409.17027).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isnan
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from workbench import plots
from workbench.dice import Dice
from workbench.directions import Direction
from workbench.methods.counterfactual.agreement import END
from workbench.methods.counterfactual.throws import Throw, kept_share, throws
from workbench.site import Site
from workbench.toggle import Composed, Toggle
from workbench.toggles.steer import Steer
from workbench.widgets import material
from workbench.widgets.controls import Choice, Control, Number, Slider, Text
from workbench.widgets.desk import Desk
from workbench.widgets.picture import Fact, Picture
from workbench.widgets.strip import Strip, StripRow

Ids = tuple[int, ...]
BEFORE, SAME, FRESH = ARMS = ("before", "same dice", "fresh dice")
LUCK = "no edit, fresh dice"
COLORS = {BEFORE: plots.GREY, SAME: plots.BLUE, FRESH: plots.VERMILLION, LUCK: plots.GREY}
VIEWS = ("one throw", "many throws")
EDITS = ("words", "push")
N_TEXTS = 20  # written per point of the figure of many throws
TEMPERATURES = (0.0, 0.25, 0.5, 1.0, 1.5)  # where it is drawn, beside the setting itself
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5)
N_TOKENS = 5  # in the figure of a throw
MOST_NATS = 4.0  # where the strip's colours end
MOST_TOKENS = 64  # that can be written, each of which the figure can take apart


@dataclass(frozen=True)
class DiceDesk(Desk):
    """Settings of an edit and of the dice; the picture shows the text before and after, and why tokens changed.

    edit           "words": another prompt; "push": the same prompt, the residual stream pushed at every token
    prompt, edited before and after, one line each; "": some that mean something to the subject
    direction      a name among `material.contrasts()`         layer   after which it is added; -1: the middle
    strength       in mean residual norms
    temperature    of the sampling; 0: no dice                 seed    of the dice
    place          token that the figure takes apart, from 1; 0: the first that changes
    Where the prompts differ in length, each token takes the throw of the token as far behind the prompt.
    """

    view: str = "one throw"
    edit: str = "words"
    prompt: str = ""
    edited: str = ""
    direction: str = "refusal"
    layer: int = -1
    strength: float = 0.5
    temperature: float = 1.0
    place: int = 0
    new_tokens: int = 12
    seed: int = 0

    notebook = "76_dice_desk"
    question = "What would the model have written, with the same luck, had something been different?"

    def fitted(self) -> dict[str, Any]:
        prompt, edited = material.edited_prompt(self.subject)
        layer = self.subject.n_layers // 2 if self.layer == -1 else self.layer
        return {"prompt": self.prompt or prompt, "edited": self.edited or edited, "layer": layer}

    def controls(self) -> tuple[Control, ...]:
        words, push = self.edit == "words", self.edit == "push"
        return (
            Choice("view", "show", options=VIEWS),
            Choice("edit", "what is changed", options=EDITS),
            Text("prompt", "prompt"),
            Text("edited", "prompt after the edit", words),
            Choice("direction", "direction", push, options=tuple(material.contrasts())),
            Slider("layer", "layer", push, 0, self.subject.n_layers - 1, 1),
            Slider("strength", "strength (mean residual norms)", push, -2.0, 2.0, 0.05),
            Slider("temperature", "temperature", True, 0.0, 2.0, 0.05),
            Slider(
                "place", "token in the figure (0: the first that changes)", self.view == VIEWS[0], 0, MOST_TOKENS, 1
            ),
            Number("new_tokens", "tokens to write", True, 1, MOST_TOKENS),
            Number("seed", "dice no."),
        )

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("temperature", "seed")

    @property
    def dice(self) -> Dice:
        """Text number s is sampled by row s of these; with fresh dice by row N_TEXTS + s."""
        return Dice(self.seed, temperature=self.temperature)

    def toggle(self) -> Toggle:
        """The push of these settings; nothing where words are edited, or the strength is 0."""
        if self.edit == "words" or self.strength == 0:
            return Composed()
        found = self._direction()
        return Steer(found, self._site, self.strength * self._unit() / found.norm)

    def texts(self, n: int = 1) -> dict[str, tuple[Ids, ...]]:
        """The ids that are written before the edit, after it with the same dice, and after it with fresh ones."""
        rows, setting = range(n), (self.dice, self.new_tokens, n)
        before = self.once(("before", self.prompt, *setting), lambda: self._write(self.prompt, rows))

        def write() -> tuple[Ids, ...]:
            with self.under(self.toggle()):
                return self._write(self._prompt_after, [*rows, *(N_TEXTS + row for row in rows)])

        after = self.once(("after", self.prompt, *self._change, *setting), write)
        return dict(zip(ARMS, (before, after[:n], after[n:]), strict=True))

    def shares(self) -> dict[str, tuple[float, float, float]]:
        """Share of tokens that stay in many texts, with interval: same dice, fresh dice, and fresh dice alone."""

        def compute() -> dict[str, tuple[float, float, float]]:
            before, same, fresh = self.texts(N_TEXTS).values()
            rivals = {SAME: same, FRESH: fresh, LUCK: (*before[1:], before[0])}
            return {arm: kept_share(before, after, self.seed) for arm, after in rivals.items()}

        return self.once(("shares", self.prompt, *self._change, self.dice, self.new_tokens), compute)

    def throws(self) -> tuple[Throw, ...]:
        """Between which tokens the dice chose, at each place of the three texts."""
        ids = [texts[0] for texts in self.texts().values()]

        def compute() -> tuple[Throw, ...]:
            before = self._predicted(self.prompt, ids[:1])
            with self.under(self.toggle()):
                after = self._predicted(self._prompt_after, ids[1:])
            return throws([*before, *after], ids, self.dice, [0, 0, N_TEXTS], len(self._ids(self.prompt)))

        return self.once(("throws", self.prompt, *self._change, self.dice, self.new_tokens), compute)

    def picture(self) -> Picture:
        if self.view == "one throw":
            figure, facts = self._one_throw()
        else:
            figure, facts = self._many_throws()
        return Picture(figure, strip=self._strip(), picks="place", facts=facts, words=self._words(), code=self._code())

    # Parts, each computed once for the settings that decide it

    @property
    def _prompt_after(self) -> str:
        return self.edited if self.edit == "words" else self.prompt

    @property
    def _change(self) -> tuple[Any, ...]:
        """What decides how the model differs after the edit."""
        pushed = self.edit == "push" and self.strength != 0
        return (self._prompt_after, *((self.direction, self.layer, self.strength) if pushed else ()))

    @property
    def _site(self) -> Site:
        return Site(self.layer, "resid_out")

    def _direction(self) -> Direction:
        return self.once(("direction", self.direction), lambda: material.direction(self.subject, self.direction))

    def _unit(self) -> float:
        return self.once(("norm", self._site), lambda: material.norm(self.subject, self._site))

    def _ids(self, prompt: str) -> Ids:
        return tuple(self.subject.tokenize([prompt]).ids[0])

    def _write(self, prompt: str, rows: Sequence[int]) -> tuple[Ids, ...]:
        start = [len(self._ids(self.prompt))] * len(rows)
        options: dict[str, Any] = {"dice": self.dice, "rows": rows, "throws_from": start}
        return self.subject.generate([prompt] * len(rows), max_new_tokens=self.new_tokens, **options).ids

    def _predicted(self, prompt: str, written: Sequence[Ids]) -> list[Tensor]:
        """Per text (length, vocab): log-probabilities of each token that was written."""
        start = self._ids(prompt)
        found = {row: values for row, _, values in self.subject.predictions([(*start, *ids) for ids in written])}
        return [found[row][len(start) - 1 : -1] for row in range(len(written))]

    @property
    def _shown(self) -> int:
        """Index of the token that the figure takes apart."""
        before, same, fresh = (texts[0] for texts in self.texts().values())
        if self.place:
            n = min(len(before), len(same))
            if self.place > n:
                raise ValueError(
                    f"place: got {self.place}, but one of the texts ends after {n} tokens. Choose one up to {n}."
                )
            return self.place - 1
        for other in (same, fresh):
            for place, (a, b) in enumerate(zip(before, other, strict=False)):
                if a != b:
                    return place
        return 0

    # Words and figures

    def _word(self, token: int) -> str:
        """A token as a label shows it."""
        return str(self.subject.tokenizer.decode([token])).strip() or f"token {token}"

    def _strip(self) -> Strip:
        """The text before and after, twice: what the same dice kept, and what fresh dice kept."""
        rows = []
        for number, arm in enumerate(ARMS[1:], start=1):
            chosen = [(int(throw.chosen[0]), int(throw.chosen[number])) for throw in self.throws()]
            kept = [True, *(a == b for a, b in chosen if a != END)]
            rows.append(self._row(self.prompt, 0, number, BEFORE, tuple(kept)))
            rows.append(self._row(self._prompt_after, number, number, arm))
        return Strip(tuple(rows), "nats likelier after the edit", diverging=True, low=-MOST_NATS, high=MOST_NATS)

    def _row(self, prompt: str, text: int, after: int, label: str, kept: tuple[bool, ...] = ()) -> StripRow:
        """One text, its prompt as one piece: token number k of the row is `place` k."""
        told = [self._told(throw, text, after) for throw in self.throws() if throw.chosen[text] != END]
        words = [self._word(int(throw.chosen[text])) for throw in self.throws() if throw.chosen[text] != END]
        values, notes = (None, *(value for value, _ in told)), ("the prompt", *(note for _, note in told))
        return StripRow((prompt, *words), values, notes, label, kept)

    def _told(self, throw: Throw, text: int, after: int) -> tuple[float | None, str]:
        """What the edit did to the token that `text` has here, in nats, and in words."""
        token, other = int(throw.chosen[text]), int(throw.chosen[after - text])
        if other == END:
            return None, "the other text is over"
        p, q = throw.log_prob(0, token), throw.log_prob(after, token)
        note = f"{exp(p):.0%} before the edit, {exp(q):.0%} after it"
        if other != token:
            instead = "replaced by" if text == 0 else "instead of"
            note += f"; {instead} “{self._word(other)}”, which went from {exp(throw.log_prob(0, other)):.0%} to "
            note += f"{exp(throw.log_prob(after, other)):.0%}"
        return q - p, note

    def _one_throw(self) -> tuple[go.Figure, tuple[Fact, ...]]:
        place, before = self._shown, self.texts()[BEFORE][0]
        throw, number = self.throws()[place], place + 1
        products = throw.products()  # (text, token)
        rivals = np.argsort(-np.nanmax(products, axis=0), kind="stable")[:N_TOKENS]
        rows = [
            (self._label(throw, rival), arm, products[text, rival])
            for text, arm in enumerate(ARMS)
            for rival in rivals
            if throw.chosen[text] != END
        ]
        table = pd.DataFrame(rows, columns=["token", "arm", "product"])
        x_title = "token, its luck: same dice | fresh dice"
        options: dict[str, Any] = {"x_title": x_title, "y_title": "probability times luck (1: the winner's)"}
        title = self._title_of_throw(throw, number)
        figure = plots.bars(table, "token", "product", color="arm", title=title, colors=COLORS, **options)
        shares = {arm: kept_share([before], [self.texts()[arm][0]]) for arm in ARMS[1:]}
        chances = zip((SAME, FRESH, "at most, by any coupling"), throw.expected, strict=True)
        facts = [Fact(f"tokens that stay in this text, {arm}", share[0], "share") for arm, share in shares.items()]
        facts += [Fact(f"token {number} stays, of all throws, {name}", value, "share") for name, value in chances]
        return figure, tuple(fact for fact in facts if not isnan(fact.value))

    def _label(self, throw: Throw, rival: int) -> str:
        """A token in question, and the factors that the dice give it: in the first two texts the same."""
        factors = [f"x {exp(g):{',.0f' if g > 2.3 else '.2g'}}" for g in throw.luck[[0, 2], rival] if not isnan(g)]
        return f"{self._word(int(throw.ids[rival]))}<br>{' | '.join(factors)}"

    def _title_of_throw(self, throw: Throw, number: int) -> str:
        before, same, fresh = (f"“{self._word(int(token))}”" if token != END else "" for token in throw.chosen)
        control = f"; fresh dice choose {fresh}" if fresh and self.temperature else ""
        if not same:
            return f"Token {number}: {before} before the edit, after it the text is over{control}"
        way = "with the same dice" if self.temperature else "without dice"
        if before == same:
            return f"Token {number}: {way} {before} wins again{control}"
        new, old = (self._moved(throw, int(throw.chosen[text])) for text in (1, 0))
        first = "" if self.place else ", the first that changes"
        return f"Token {number}{first}: {way} {same} ({new}) replaces {before} ({old}){control}"

    def _moved(self, throw: Throw, token: int) -> str:
        """The probability of a token before the edit and after it."""
        before, after = (exp(throw.log_prob(text, token)) for text in (0, 1))
        return f"{before:.0%} → {after:.0%}" if max(before, after) > 0.005 else "unlikely both times"

    def _many_throws(self) -> tuple[go.Figure, tuple[Fact, ...]]:
        name, values = ("strength", STRENGTHS) if self.edit == "push" else ("temperature", TEMPERATURES)
        now = getattr(self, name)
        rows = [
            (value, arm, *share)
            for value in sorted({*values, now})
            for arm, share in self.changed(**{name: value}).shares().items()
        ]
        table = pd.DataFrame(rows, columns=[name, "dice", "share", "low", "high"])
        shares = self.shares()
        title = (
            f"At {name} {now:g}, {shares[SAME][0]:.0%} of tokens stay with the same dice, {shares[FRESH][0]:.0%} with "
            f"fresh dice; luck alone, without an edit, leaves {shares[LUCK][0]:.0%}"
        )
        x_title = "strength of the push (mean residual norms)" if name == "strength" else "temperature"
        options: dict[str, Any] = {"colors": COLORS, "x_title": x_title, "y_title": "tokens that stay (share)"}
        figure = plots.lines(table, name, "share", "dice", "low", "high", title=title, **options)
        figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
        facts = (
            Fact(f"tokens that stay in {N_TEXTS} texts, {arm}", share, "share", low, high)
            for arm, (share, low, high) in shares.items()
        )
        return figure.add_vline(now, line={"color": plots.GREY, "width": 1, "dash": "dot"}), tuple(facts)

    def _words(self) -> str:
        if self.temperature == 0:
            return "At temperature 0 there are no dice: the likeliest token is taken, and fresh dice change nothing."
        idle = self.strength == 0 if self.edit == "push" else self.prompt == self.edited
        return "The edit changes nothing, so that the same dice give the same text; fresh dice do not." if idle else ""

    def _code(self) -> str:
        start, fresh = len(self._ids(self.prompt)), N_TEXTS
        options = f"max_new_tokens={self.new_tokens}, dice=Dice({self.seed}, temperature={self.temperature:g})"
        after = f"subject.generate([edited] * 2, {options}, rows=[0, {fresh}], throws_from=[{start}] * 2)"
        if self.edit == "words":
            return f"before = subject.generate([prompt], {options}, rows=[0])\nsame_and_fresh = {after}"
        scale = self.strength * self._unit() / self._direction().norm
        push = f"Steer(direction, Site({self.layer}, 'resid_out'), {scale:.4g})"
        after = after.replace("edited", "prompt")
        return (
            f"before = subject.generate([prompt], {options}, rows=[0])\n"
            f"with subject.under({push}):\n    same_and_fresh = {after}"
        )
