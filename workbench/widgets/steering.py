"""SteeringDesk: push the residual stream along a direction and read what is written, beside the same push at random.

x' = x + s m_l v / |v| at layer l, m_l the mean residual norm there. Source: Turner et al. 2023; Arditi et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from workbench import plots
from workbench.directions import Direction, random_direction
from workbench.generation import Generation
from workbench.methods.steering.contrast import Contrast
from workbench.methods.steering.steered import SteeringMapResult
from workbench.methods.steering.target import Target, last_logprobs
from workbench.probes.steering_map import steering_map
from workbench.site import Site
from workbench.strength import mean_kl
from workbench.subject import Subject
from workbench.toggles.steer import Steer
from workbench.widgets import material
from workbench.widgets.controls import Choice, Control, Number, Slider, Text
from workbench.widgets.desk import Desk, given
from workbench.widgets.picture import Fact, Pane, Picture, lines_of

T = TypeVar("T")
ARMS = ("untouched", "pushed", "random direction")
VIEWS = ("next token", "layer by strength", "side effects")
STRENGTHS = (0.125, 0.25, 0.5, 1.0, 1.5)  # of the map
N_TOKENS = 8  # tokens in the figure


@dataclass(frozen=True)
class SteeringDesk(Desk):
    """Settings of a push; the picture shows answers, next tokens, and what else moved.

    direction   a name among `material.contrasts()`, one of `directions`, or a file that Direction.save wrote
    layer       the block after which it is added; -1: the middle        strength   in mean residual norms
    prompts     one per line; "": some that mean something to the subject
    target      words that the push should bring, for the map; "": those that tell the two kinds of text apart
    directions  name -> Direction, of the caller's own
    """

    view: str = "next token"
    direction: str = "refusal"
    layer: int = -1
    strength: float = 0.5
    positions: str = "prompt"
    prompts: str = ""
    target: str = ""
    shown_prompt: int = 1
    new_tokens: int = 10
    seed: int = 0
    directions: Mapping[str, Direction] = given(default_factory=dict)

    notebook = "71_steering_desk"
    question = "What does a push along one direction do, where, and how much of it?"

    def fitted(self) -> dict[str, Any]:
        layer = self.subject.n_layers // 2 if self.layer == -1 else self.layer
        return {"layer": layer, "prompts": self.prompts or "\n".join(material.prompts(self.subject))}

    def controls(self) -> tuple[Control, ...]:
        names = tuple(dict.fromkeys([*self.directions, *material.contrasts(), self.direction]))
        of_map = self.view == "layer by strength"
        return (
            Choice("view", "show", options=VIEWS),
            Choice("direction", "direction", options=names),
            Slider("layer", "layer", not of_map, 0, self.subject.n_layers - 1, 1),
            Slider("strength", "strength (mean residual norms)", not of_map, -2.0, 2.0, 0.05),
            Choice("positions", "push at", options=("all", "prompt", "generated", "last")),
            Text("prompts", "prompts, one per line", lines=3),
            Text("target", "words that it should bring", of_map, optional=True),
            Slider("shown_prompt", "prompt in the figure", self.view == "next token", 1, len(self._prompts), 1),
            Number("new_tokens", "tokens to write", True, 1, 64),
            Number("seed", "random direction no.", not of_map),
        )

    def changed(self, **settings: Any) -> Self:
        """This desk with other settings; where prompts go, the last that is left is shown, unless one is named."""
        if "prompts" in settings and "shown_prompt" not in settings:
            left = len(super().changed(prompts=settings["prompts"], shown_prompt=1)._prompts)
            settings = {"shown_prompt": min(self.shown_prompt, left)} | settings
        return super().changed(**settings)

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        return ("layer", "strength")

    def toggle(self, arm: str = "pushed") -> Steer:
        """The push of these settings, or its control: a random direction of the same length."""
        found = self._direction()
        vector = found if arm == "pushed" else random_direction(found, self.seed)
        return Steer(vector, self._site, self.strength * self._unit() / found.norm, self.positions)  # type: ignore[arg-type]

    def picture(self) -> Picture:
        written = {arm: self.answers(arm) for arm in ARMS}
        drawings = {"next token": self._next_token, "layer by strength": self._map, "side effects": self._side_effects}
        panes = (Pane(arm, lines_of(self._prompts, made.texts)) for arm, made in written.items())
        changed = [a != b for a, b in zip(written["untouched"].ids, written["pushed"].ids, strict=True)]
        plain, others = self._logprobs("untouched").double(), self._kl()
        effect = {arm: mean_kl(plain, self._logprobs(arm).double()) for arm in ARMS[1:]}
        facts = (
            Fact("answers changed", sum(changed) / len(changed), "share"),
            *(Fact(f"next token moved, {arm}", effect[arm], "nats") for arm in ARMS[1:]),
            *(Fact(f"other texts moved, {arm}", others[arm], "nats per token") for arm in ARMS[1:]),
        )
        idle = "" if self.strength else "At strength 0 nothing is pushed: all three are the same."
        return Picture(drawings[self.view](), tuple(panes), facts=facts, words=idle, code=self._code())

    def answers(self, arm: str = "pushed") -> Generation:
        """What is written after each prompt: "untouched", "pushed", or pushed along a "random direction"."""
        key = ("answers", self._prompts, self.new_tokens, self._push(arm))
        return self.once(key, lambda: self._under(arm, self._prompts, self._write))

    # Parts, each computed once for the settings that decide it

    @property
    def _prompts(self) -> tuple[str, ...]:
        return material.lines(self.prompts)

    @property
    def _site(self) -> Site:
        found = self.directions.get(self.direction)
        kind = found.site.kind if found is not None and found.site else "resid_out"
        return Site(self.layer, kind)

    def _direction(self) -> Direction:
        """The vector: the caller's, a file's, or that of a contrast."""
        if self.direction in self.directions:
            return self.directions[self.direction]
        if self.direction not in material.contrasts():
            return self.once(("file", self.direction), lambda: Direction.load(self.direction))
        return self.once(("direction", self.direction), lambda: material.direction(self.subject, self.direction))

    def _unit(self) -> float:
        """Mean norm of the residual stream where it is pushed: the unit of strength."""
        return self.once(("norm", self._site), lambda: material.norm(self.subject, self._site))

    def _push(self, arm: str) -> tuple[Any, ...]:
        """What decides what an arm writes; nothing of the push where nothing is pushed."""
        if arm == "untouched" or self.strength == 0:
            return ()
        seed = self.seed if arm == "random direction" else None
        return (arm, self._direction(), self._site, self.strength, self.positions, seed)

    def _write(self) -> Generation:
        return self.subject.generate(self._prompts, max_new_tokens=self.new_tokens)

    def _logprobs(self, arm: str) -> Tensor:
        key = ("logprobs", self._prompts, self._push(arm))
        return self.once(
            key, lambda: self._under(arm, self._prompts, lambda: last_logprobs(self.subject, self._prompts))
        )

    def _under(self, arm: str, texts: tuple[str, ...], work: Callable[[], T]) -> T:
        if not self._push(arm):
            return work()
        with self.resumed(texts), self.subject.under(self.toggle(arm)):
            return work()

    def _kl(self) -> dict[str, float]:
        """Nats per token by which predictions on other texts move, per arm."""
        texts = material.texts(self.subject)
        plain = self.once(("other texts",), lambda: _all_log_probs(self.subject, texts))

        def measure(arm: str) -> float:
            if not self._push(arm):
                return 0.0
            return mean_kl(plain, self._under(arm, texts, lambda: _all_log_probs(self.subject, texts)))

        return {arm: self.once(("kl", self._push(arm)), lambda arm=arm: measure(arm)) for arm in ARMS}

    # Figures

    def _next_token(self) -> go.Figure:
        row = self.shown_prompt - 1
        chances = {arm: self._logprobs(arm)[row].double().exp() for arm in ARMS}
        leading = {
            arm: chance.topk(min(N_TOKENS // 2, len(chance))).indices.tolist() for arm, chance in chances.items()
        }
        tokens = list(dict.fromkeys(leading["untouched"] + leading["pushed"] + leading["random direction"]))[:N_TOKENS]
        rows = [(self._word(token), float(chances[arm][token]), arm) for arm in ARMS for token in tokens]
        table = pd.DataFrame(rows, columns=["token", "probability", "arm"])
        before, after = (self._word(leading[arm][0]) for arm in ("untouched", "pushed"))
        goes_on = f"still with “{after}”" if after == before else f"with “{after}” instead of “{before}”"
        title = f"Pushed at layer {self.layer}, “{_short(self._prompts[row])}” goes on {goes_on}"
        return plots.bars(table, "token", "probability", color="arm", title=title, x_title="next token")

    def _word(self, token: int) -> str:
        """A token as an axis shows it: two that read alike stay apart."""
        return str(self.subject.tokenizer.decode([token])).strip() or f"token {token}"

    def _map(self) -> go.Figure:
        return self._mapped().plot("map")

    def _side_effects(self) -> go.Figure:
        return self._mapped().plot("tradeoff")

    def _mapped(self) -> SteeringMapResult:
        if self.positions == "generated":
            raise ValueError(
                "The map reads the first token after the prompt, where nothing is generated yet. Push elsewhere."
            )
        if not self.target and self.direction not in material.contrasts():
            raise ValueError("The map needs to know what the push is for. Set `target` to words that it should bring.")
        target = self.once(("target", self.target, self.direction), self._target)
        texts = material.texts(self.subject)
        settings = {"positions": self.positions, "n_controls": 3, "n_written": 0, "kind": self._site.kind}
        return self.once(
            ("map", self._prompts, self._direction(), self.positions, target),
            lambda: steering_map(
                self.subject,
                self._direction(),
                strengths=STRENGTHS,
                prompts=self._prompts,
                texts=texts,
                target=target,
                **settings,
            ),
        )

    def _target(self) -> Target:
        if self.target:
            return Target.of_words(self.subject, self.target.split())
        return Target.found(self.subject, Contrast(*material.contrasts()[self.direction]()))

    def _code(self) -> str:
        scale = self.strength * self._unit() / self._direction().norm
        push = f"Steer(direction, Site({self.layer}, {self._site.kind!r}), {scale:.4g}, {self.positions!r})"
        return f"with subject.under({push}):\n    print(subject.generate(prompts, max_new_tokens={self.new_tokens}))"


def _all_log_probs(subject: Subject, texts: tuple[str, ...]) -> Tensor:
    """(token, vocab) after every token of every text but its last, one text after the other, in float64."""
    rows = {row: values[:-1].double().cpu() for row, _, values in subject.predictions(texts, cut=True)}
    return torch.cat([rows[row] for row in range(len(texts))])


def _short(text: str) -> str:
    return text if len(text) <= 48 else "… " + text[-46:]
