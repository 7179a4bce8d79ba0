"""Steering that asks first: a condition read at one layer decides, for each row of the batch, whether to steer.

row r: x' = x + strength * v  where  score(mean or last prompt value of r) > threshold,  else x to the bit.
The decision is made once, from the prompt, and holds for the whole generation.
Source: Lee et al., 2024, "Programming Refusal with Conditional Activation Steering" (CAST). There, row 0 decides for
the whole batch, the score is blind to its sign, and the vector of a block's output is added at its input; not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.directions import Direction
from workbench.methods.steering.gates import Score, When, best_threshold, gate_quality, row_scores, three_parts
from workbench.reading import Pooling
from workbench.site import Site
from workbench.step import Step
from workbench.toggle import Toggle
from workbench.toggles.steer import Steer
from workbench.tokens import Texts

if TYPE_CHECKING:
    from workbench.subject import Subject

COLUMNS = ("layer", "kind", "threshold", "when", "f1", "precision", "recall", "auc", "split", "chosen")


@dataclass(frozen=True)
class Condition:
    """Which prompts match: those whose value at a site points along a direction.

    direction   a Direction, or any (width,) tensor
    centre      subtracted from the value before the score; None: nothing, as published
    threshold   of the score, which lies in [-1, 1]; `when` says which side matches
    tokens      "last": the prompt's last token; "mean": the mean over the prompt's tokens
    score       "cosine" keeps the sign; "tanh" is the published one, see `workbench.methods.steering.gates`
    """

    direction: Direction
    at: Site
    threshold: float
    when: When = "above"
    tokens: Pooling = "last"
    score: Score = "cosine"
    centre: Direction | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.direction, Direction):
            object.__setattr__(self, "direction", Direction(self.direction))
        choices = {"when": ("above", "below"), "tokens": ("last", "mean"), "score": ("cosine", "tanh")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Condition: got {name}={getattr(self, name)!r}, expected {' or '.join(allowed)}.")

    @classmethod
    def fit(
        cls,
        subject: Subject,
        match: Texts,
        other: Texts,
        at: Site | Sequence[Site],
        *,
        tokens: Pooling = "last",
        score: Score = "cosine",
        seed: int = 0,
    ) -> tuple[Condition, pd.DataFrame]:
        """The condition that tells the texts `match` from `other`, and a table with a row per site and split.

        Half of the texts give the direction (difference in means) and the centre (the mean of the two means), a
        quarter the threshold of best F1, and the last quarter, split "held out", what may be reported. The site with
        the best F1, then the best area under the curve, of the second part is taken; the table marks it.
        Columns: layer, kind, threshold, when, f1, precision, recall, auc, split, chosen.
        """
        sites = [at] if isinstance(at, Site) else list(at)
        rng = np.random.default_rng(seed)
        parts = [three_parts(len(match), rng), three_parts(len(other), rng)]
        prompts = subject.tokenize(match).ids + subject.tokenize(other).ids
        capture = subject.capture(prompts, sites, tokens=tokens)
        rows, fitted, merit = [], {}, {}
        for site in sites:
            groups = capture[site].float().flatten(1).split([len(match), len(other)])
            learned, chosen, held = ([g[p[k]] for g, p in zip(groups, parts, strict=True)] for k in range(3))
            blank = cls._between(subject, learned, site, tokens, score)
            scores, positive = blank._labelled(chosen)
            threshold = best_threshold(scores, positive, None if score == "tanh" else "above")
            fitted[site] = replace(blank, threshold=threshold.value, when=threshold.when)
            for split, texts in (("held out", held), ("threshold", chosen)):
                scores, positive = blank._labelled(texts)
                quality = gate_quality(scores, positive, threshold)
                rows.append((site.layer, site.kind, threshold.value, threshold.when, *astuple(quality), split))
            merit[site] = (quality.f1, quality.auc)  # of the second part: what is reported must not choose
        best = max(sites, key=lambda site: merit[site])
        table = pd.DataFrame(rows, columns=list(COLUMNS[:-1]))
        return fitted[best], table.assign(chosen=(table["layer"] == best.layer) & (table["kind"] == best.kind))

    @classmethod
    def _between(
        cls, subject: Subject, groups: Sequence[Tensor], site: Site, tokens: Pooling, score: Score
    ) -> Condition:
        """The condition half-way between two groups of values (text, width), with a threshold yet to be chosen."""
        means = [values.double().mean(0) for values in groups]
        direction = Direction(means[0] - means[1], site, subject.fingerprint, "condition")
        # As published the raw value is scored: what all prompts have in common then drowns the difference.
        centre = Direction((means[0] + means[1]) / 2, site, subject.fingerprint, "centre")
        return cls(direction, site, 0.0, tokens=tokens, score=score, centre=centre if score == "cosine" else None)

    def _labelled(self, groups: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Scores of both groups of values, and which of them are in the first."""
        scores = [self.row_scores(values).double().numpy() for values in groups]
        return np.concatenate(scores), np.arange(sum(map(len, scores))) < len(scores[0])

    def scores(self, subject: Subject, prompts: Texts) -> np.ndarray:
        """(prompt,) score of each prompt, on `subject` as it is."""
        values = subject.capture(prompts, [self.at], tokens=self.tokens)[self.at]
        return self.row_scores(values.float()).double().numpy()

    def row_scores(self, values: Tensor) -> Tensor:
        """(row,) scores of values (row, *width) in float32."""
        flat = values.flatten(1)
        if self.centre is not None:
            flat = flat - self.centre.vector.to(flat.device)
        return row_scores(flat, self.direction.vector.to(flat.device), self.score)

    def opens(self, scores: Any) -> Any:
        """True at the rows with these scores, an array or a tensor, that match."""
        return scores > self.threshold if self.when == "above" else scores < self.threshold

    def __str__(self) -> str:
        return f"{self.score} {'>' if self.when == 'above' else '<'} {self.threshold:.3g} at {self.at}"


@dataclass(frozen=True)
class ConditionalSteer(Toggle):
    """Steer only the rows whose prompt meets a condition; the others stay as they are, to the bit.

    steer      what is done to a row: one Steer, or several at different sites
    condition  read at one site; where that comes before every edit it costs a dot product, else a second prefill
    """

    steer: Steer | tuple[Steer, ...]
    condition: Condition

    values: ClassVar[tuple[type, ...]] = (Condition,)

    @property
    def steers(self) -> tuple[Steer, ...]:
        return (self.steer,) if isinstance(self.steer, Steer) else self.steer

    def install(self, subject: Subject, undo: ExitStack) -> None:
        condition, edited = self.condition, [steer.at for steer in self.steers]
        if not edited:
            raise ValueError("ConditionalSteer: got no Steer, expected at least one.")
        for direction in filter(None, (condition.direction, condition.centre)):
            direction.for_subject(subject, condition.at)

        def decide(values: Mapping[Site, Tensor]) -> Tensor:
            return condition.opens(condition.row_scores(values[condition.at])).float()[:, None]

        reading = subject.read_prompt([condition.at], decide, undo, edited=edited, tokens=condition.tokens)
        for steer in self.steers:

            def there(step: Step, steer: Steer = steer) -> Tensor:
                return step.where(steer.positions) & reading.now.bool().to(step.real.device)

            subject.edit(steer.at, steer.edit(subject), undo, positions=there)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        noise = Direction(
            torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(0)), name="random"
        )
        early, late = Site(0, "resid_out"), Site(subject.n_layers - 1, "resid_out")
        always = Condition(noise, early, -2.0, tokens="mean")
        push, last = Steer(noise, late, 4.0), Steer(noise, early, 4.0, "last")
        return cls(push, always), cls((last, push), always), cls(last, replace(always, at=late, score="tanh"))

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        toggle = cls.examples(subject)[2]
        assert isinstance(toggle, ConditionalSteer)
        return replace(toggle, steer=replace(toggle.steers[0], strength=0.0))

    def __str__(self) -> str:
        return f"ConditionalSteer({' and '.join(map(str, self.steers))} where {self.condition})"
