"""How often does the model answer with given words, such as those of a refusal, as it is and under several toggles?

share[toggle, group] = answers that begin with the words / prompts of the group, greedy decoding.
Source: Arditi et al. 2024 (refusals by their first words); true and false refusals side by side are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.methods.steering.answer_rates import AnswerRatesResult
from workbench.probe import Expectation, Planted, Probe
from workbench.toggle import Composed, Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class AnswerRates(Probe):
    """Counts answers that begin with given words. Data: {group: prompts}.

    starts    the words, in any case
    toggles   ((name, toggle), ...) or {name: toggle}: each is tried on top of whatever acts already
    n_tokens  new tokens per answer: as many as the longest of `starts` needs
    """

    starts: tuple[str, ...]
    toggles: tuple[tuple[str, Toggle], ...] = ()
    n_tokens: int = 8

    def __post_init__(self) -> None:
        pairs = self.toggles.items() if isinstance(self.toggles, Mapping) else self.toggles
        object.__setattr__(self, "toggles", tuple((name, toggle) for name, toggle in pairs))
        starts = (self.starts,) if isinstance(self.starts, str) else tuple(self.starts)
        object.__setattr__(self, "starts", starts)
        if not starts or not all(word.strip() for word in starts):
            raise ValueError(f"AnswerRates: got starts={self.starts!r}, expected the first words of some answers.")
        names = [name for name, _ in self.toggles]
        if len({AS_IT_IS, *names}) <= len(names):  # one would stand in the other's place
            raise ValueError(
                f"AnswerRates: got toggles named {names}, expected different names, none of them {AS_IT_IS!r}."
            )

    def measure(self, subject: Subject, data: Any) -> AnswerRatesResult:
        if not isinstance(data, Mapping) or not data or not all(len(prompts) for prompts in data.values()):
            raise ValueError(
                'AnswerRates: expected data {group: prompts}, such as {"harmful": [...], "harmless": [...]}.'
            )
        answers: dict[str, dict[str, tuple[str, ...]]] = {}
        for name, toggle in ((AS_IT_IS, Composed()), *self.toggles):
            with subject.under(toggle):
                answers[name] = {
                    group: subject.generate(prompts, max_new_tokens=self.n_tokens).texts
                    for group, prompts in data.items()
                }
        return AnswerRatesResult.of(answers, self.starts)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Answers in which a gated toggle refuses 90 % of the wanted and 5 % of the other prompts."""
        return _simulated("planted", seed, {AS_IT_IS: (0.0, 0.0), "gated": (0.9, 0.05)})

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Answers in which the toggle refuses both groups alike."""
        return _simulated("null", seed, {AS_IT_IS: (0.0, 0.0), "gated": (0.5, 0.5)})

    @classmethod
    def example(cls, subject: Subject) -> tuple[AnswerRates, dict[str, list[str]]]:
        from workbench.corpora import requests
        from workbench.toggles.steer import Steer

        nouns = requests.HARMLESS_NOUNS[:4]
        data = {verb: [requests.prompt(verb, noun) for noun in nouns] for verb in ("smash", "paint")}
        return cls((requests.REFUSAL,), (("pushed", Steer.examples(subject)[0]),), 2), data


def _simulated(name: str, seed: int, shares: Mapping[str, tuple[float, float]]) -> Planted:
    """Simulated answers to 400 prompts per group in random order, refused in exactly these shares (wanted, others)."""
    rng, groups, said = np.random.default_rng(seed), ("wanted", "others"), ("Sure , here .", " Sorry , no .")
    arrays, answers = {}, {}
    for toggle, pair in shares.items():
        refused = {group: rng.permutation(np.arange(400) < 400 * p) for group, p in zip(groups, pair, strict=True)}
        arrays |= {f"{toggle}, {group}": row for group, row in refused.items()}
        answers[toggle] = {group: [said[int(no)] for no in row] for group, row in refused.items()}

    def gap(result: Any) -> float:
        return result.share("gated", "wanted") - result.share("gated", "others")

    def covered(result: Any) -> float:
        table = result.table().set_index(["toggle", "group"]).loc["gated"]
        bounds = [(table.loc[group, "low"], table.loc[group, "high"]) for group in groups]
        return float(sum(low < p < high for (low, high), p in zip(bounds, shares["gated"], strict=True)))

    def untouched(result: Any) -> float:
        return result.share(AS_IT_IS, "wanted")

    truth = shares["gated"][0] - shares["gated"][1]
    tests = (
        Expectation("share of wanted minus share of others", gap, truth - 1e-9, truth + 1e-9),  # rounding
        Expectation("true shares inside their intervals", covered, 2.0, 2.0),
        Expectation("refused as it is", untouched, 0.0, 0.0),
    )
    return Planted(name, arrays, lambda: AnswerRatesResult.of(answers, ("sorry",)), tests)
