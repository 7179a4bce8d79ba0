"""Which tokens of a prompt carry the preference for one answer over another? Integrated gradients, proved complete.

a_t = sum_j (x - b)_tj * mean over the path of dF/dx_tj, F = log p(y+) - log p(y-);  sum_t a_t = F(x) - F(b)
Sources: Sundararajan et al., 2017 (integrated gradients); Nguyen et al., 2025 (GrAInS, arXiv 2507.18043).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from workbench.corpora import code_styles
from workbench.methods.steering.attributed import TokenAttributionResult
from workbench.methods.steering.attribution import (
    Attribution,
    Baseline,
    Rule,
    Triples,
    attributed,
    integrated_gradients,
)
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds

if TYPE_CHECKING:
    from workbench.subject import Subject

N_PAIRS, N_TOKENS, D_MODEL = 20, 10, 8  # of the planted toy


@dataclass(frozen=True)
class TokenAttribution(Probe):
    """What each token adds to a preference. Data: triples (prompt, preferred answer, dispreferred answer).

    baseline    embedding that stands for "no word": "mean" over the vocabulary, "pad" or "zero" (as published)
    rule        "midpoint", or "right" (as published), which needs many more steps
    steps       points on the path from there to the prompt, doubled up to `most_steps` until complete to `tolerance`
    separator   between prompt and answers
    template    words or phrases that belong to the prompts' frame: like special tokens they stay as they are, score 0
    seed        of the intervals
    """

    baseline: Baseline = "mean"
    rule: Rule = "midpoint"
    steps: int = 64
    most_steps: int = 1024
    tolerance: float = 0.01
    separator: str = " "
    template: tuple[str, ...] = ()
    seed: int = 0

    bounds: ClassVar[Bounds] = {"tolerance": 0}

    def measure(self, subject: Subject, data: Triples) -> TokenAttributionResult:
        found = attributed(
            subject,
            data,
            baseline=self.baseline,
            rule=self.rule,
            steps=self.steps,
            most_steps=self.most_steps,
            tolerance=self.tolerance,
            separator=self.separator,
            template=self.template,
        )
        words = lambda ids: [str(subject.tokenizer.decode([token])) for token in ids]  # noqa: E731
        return self._result((words(pair.prompt), pair.free, each) for pair, each in found)

    def _result(self, found: Iterator[tuple[list[str], Any, Attribution]]) -> TokenAttributionResult:
        return TokenAttributionResult.of(
            found, tolerance=self.tolerance, baseline=self.baseline, rule=self.rule, seed=self.seed
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A preference that depends on two tokens only: they must come out on top, one for it and one against."""
        return _planted("planted", cls(baseline="zero", seed=seed), two_tokens=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """A preference to which all tokens add at random: the same two words must not stand out."""
        return _planted("null", cls(baseline="zero", seed=seed), two_tokens=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[TokenAttribution, Triples]:
        asked = code_styles.combinations("held_out")[:3]
        answers = (code_styles.FIRST_WORD["layout"], code_styles.FIRST_WORD["brace"])
        return cls(steps=16, most_steps=16), [(code_styles.prompt(*each, "layout"), *answers) for each in asked]


def _planted(name: str, probe: TokenAttribution, *, two_tokens: bool) -> Planted:
    """Toy prompts with "for" and "against" at random places, and a smooth preference over their embeddings."""
    rng = np.random.default_rng(probe.seed)
    places = np.stack([rng.permutation(N_TOKENS)[:2] for _ in range(N_PAIRS)])  # (pair, 2): for, against
    say = np.zeros((N_PAIRS, N_TOKENS))
    if two_tokens:
        np.put_along_axis(say, places, np.array([[1.0, -1.0]]), axis=1)
    else:
        say = rng.standard_normal((N_PAIRS, N_TOKENS)) / np.sqrt(N_TOKENS)
    x = rng.standard_normal((N_PAIRS, N_TOKENS, D_MODEL))
    x[..., 0] = 1.0  # the coordinate that F reads

    def solve() -> TokenAttributionResult:
        return probe._result(_toy(x[i], say[i], places[i], probe) for i in range(N_PAIRS))

    def hits(result: Any) -> float:
        score = result.score.reshape(N_PAIRS, N_TOKENS)
        return float(((score.argmax(1) == places[:, 0]) & (score.argmin(1) == places[:, 1])).mean())

    def elsewhere(result: Any) -> float:
        named = np.isin(np.array(result.words), ("for", "against"))
        return float(np.abs(result.score[~named]).max())

    complete = Expectation("largest relative gap", lambda result: float(cast(Any, result).relative_gap.max()), 0, 0.01)
    truth = (
        Expectation("prompts whose extremes are the two words", hits, 1.0, 1.0),
        Expectation("largest score of any other word (nats)", elsewhere, 0.0, 1e-6),
    )
    chance = (Expectation("prompts whose extremes are the two words", hits, 0.0, 0.2),)
    return Planted(name, {"x": x, "say": say, "places": places}, solve, (*(truth if two_tokens else chance), complete))


def _toy(
    x: np.ndarray, say: np.ndarray, places: np.ndarray, probe: TokenAttribution
) -> tuple[list[str], list[bool], Attribution]:
    """Attribution of F(x) = sum_t say_t tanh(2 x_t0), from zero."""
    words = [f"word{t}" for t in range(N_TOKENS)]
    words[places[0]], words[places[1]] = "for", "against"
    weight, start = torch.from_numpy(say), torch.from_numpy(x)

    def score(points: Tensor) -> Tensor:
        return (weight * torch.tanh(2 * points[..., 0])).sum(-1)

    found = integrated_gradients(score, start, torch.zeros_like(start), steps=probe.steps, rule=probe.rule)
    return words, [True] * N_TOKENS, found
