"""Steering by a controller: a small network reads the prompt and sets a strength and a weight for each layer.

row r: x' = x + strength * s_r * w_rl * v  at each edited site l;  s_r, w_r = controller(values of r's prompt)
Two passes where the controller reads late: first the prompt as it is, then prefill and decoding with fixed strengths.
Source: Hegazy et al., 2025, "Guiding Giants" (arXiv 2505.20309). Their hooks fire in layer order while the controller
waits for the last layers, so that only the last one is ever steered; here every edited site is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch
from torch import Tensor

from workbench.directions import Direction
from workbench.methods.steering.controller import Controller
from workbench.methods.steering.controller_training import Trained, Training, model_response, train
from workbench.site import Site
from workbench.step import Positions, Step, check_positions
from workbench.toggle import Toggle
from workbench.tokens import Texts

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class WeightedSteer(Toggle):
    """Steer each row as strongly, and in the layers, as a controller says after reading the row's prompt.

    direction   a Direction, or any (d_model,) tensor; the same at every site the controller edits
    threshold   a row whose gate is below it is left alone, to the bit; None: every row is steered by its gate
    positions   as in Steer
    """

    direction: Direction
    controller: Controller
    strength: float = 1.0
    threshold: float | None = 0.5
    positions: Positions | tuple[int, ...] = "all"

    values: ClassVar[tuple[type, ...]] = (Controller,)

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            object.__setattr__(self, "direction", Direction(self.direction))
        object.__setattr__(self, "positions", check_positions(self.positions))

    @classmethod
    def fit(
        cls,
        subject: Subject,
        wanted: Texts,
        others: Texts,
        direction: Direction,
        *,
        reads: Sequence[Site],
        edits: Sequence[Site],
        behaviour: Sequence[int],
        strength: float = 1.0,
        positions: Positions = "all",
        training: Training | None = None,
    ) -> tuple[WeightedSteer, Trained]:
        """A controller trained to steer the prompts `wanted` and to leave `others` alone, on `subject` as it is.

        reads       sites read at the prompt's last token        edits   sites along which it spreads the strength
        behaviour   token ids with which the behaviour begins; the controller learns which layers bring it about
        strength    of a fully open gate, on average over the edited sites
        """
        training = training or Training()
        if positions == "generated":
            raise ValueError("WeightedSteer.fit: positions 'generated' moves nothing before the first answer token.")
        if not reads or not edits:
            raise ValueError(
                f"WeightedSteer.fit: got {len(reads)} reads and {len(edits)} edits, expected some of each."
            )
        prompts = subject.tokenize(wanted).ids + subject.tokenize(others).ids
        vector = direction.for_subject(subject, edits[0]) * strength
        values = _read(subject, prompts, reads)
        response = model_response(subject, prompts, vector, edits, behaviour, positions)
        labels = [True] * len(wanted) + [False] * len(others)
        made = train(values, labels, response, reads=reads, edits=edits, training=training, model=subject.fingerprint)
        threshold = 0.5 if training.mode == "corrected" else None
        return cls(direction, made.controller, strength, threshold, positions), made

    def decisions(self, subject: Subject, wanted: Texts, others: Texts) -> pd.DataFrame:
        """What the controller does on prompts, on `subject` as it is: layer, kind, weight, gate, gate_others, gate_auc.

        One row per edited site. The weight is the mean over `wanted`, a gate is a group's mean before the threshold.
        """
        prompts = subject.tokenize(wanted).ids + subject.tokenize(others).ids
        values = _read(subject, prompts, self.controller.reads)
        return self.controller.table(values, [True] * len(wanted) + [False] * len(others))

    def install(self, subject: Subject, undo: ExitStack) -> None:
        controller = self.controller
        if controller.model not in (None, subject.fingerprint):
            raise ValueError(
                f"{controller}: was trained on model {controller.model}, but {subject.name} is {subject.fingerprint}. "
                "Train it on this model."
            )

        def decide(values: Mapping[Site, Tensor]) -> Tensor:
            gates, weights = controller(torch.cat([values[site].flatten(1) for site in controller.reads], 1))
            if self.threshold is not None:
                gates = gates * (gates >= self.threshold)
            return self.strength * gates[:, None] * weights

        reading = subject.read_prompt(controller.reads, decide, undo, edited=controller.edits)
        for index, site in enumerate(controller.edits):
            vector = self.direction.for_subject(subject, site).reshape(subject.anatomy.width(site))

            def edit(value: Tensor, step: Step, index: int = index, vector: Tensor = vector) -> Tensor:
                strength = reading.now[:, index].reshape(-1, *(1,) * (value.dim() - 1))
                return value + (strength.to(value.device) * vector.to(value.device)).to(value.dtype)

            def there(step: Step, index: int = index) -> Tensor:
                return step.where(self.positions) & (reading.now[:, index, None] != 0).to(step.real.device)

            subject.edit(site, edit, undo, positions=there)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        first, *later = (Site(layer, "resid_out") for layer in range(subject.n_layers))
        width, last = subject.anatomy.d_model, Site(subject.n_layers - 1, "resid_out")
        noise = Direction(torch.randn(width, generator=torch.Generator().manual_seed(0)), name="random")
        late = Controller.random((last,), (first, *later), width)
        early = Controller.random((first,), later, width)
        paper = Controller.random((first, last), (first, *later), 2 * width, mode="paper")
        return (
            cls(noise, late, 4.0, threshold=None),
            cls(noise, early, 4.0, threshold=None, positions="last"),
            cls(noise, paper, 4.0, threshold=None, positions="last"),
        )

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        toggle = cls.examples(subject)[0]
        assert isinstance(toggle, WeightedSteer)
        return replace(toggle, strength=0.0)

    def __str__(self) -> str:
        edits = self.controller.edits
        where = ", ".join(map(str, edits)) if len(edits) <= 3 else f"{len(edits)} sites"
        gate = "" if self.threshold is None else f", gate from {self.threshold:g}"
        name = self.direction.name or self.direction.digest
        return f"WeightedSteer({name} x {self.strength:g} at {where}{gate})"


def _read(subject: Subject, prompts: Texts, reads: Sequence[Site]) -> Tensor:
    """(prompt, d) in float32: what a controller reads, at the last token of each prompt."""
    capture = subject.capture(prompts, reads, tokens="last")
    return torch.cat([capture[site].float().flatten(1) for site in reads], 1)
