"""What would this model have written, with the same luck, had one word been different?

The text is sampled with dice that can be thrown again; one word is changed, and everything after it is sampled with the
same throws (counterfactual) and with fresh ones (interventional, the control). Source: Chatzi et al., 2024,
"Counterfactual Token Generation in Large Language Models" (arXiv 2409.17027); couplings: Beckers, 2025 (2509.22297).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch

from workbench.dice import Dice, Sampler
from workbench.generation import Generation, text_of
from workbench.methods.counterfactual.agreement import (
    COUNTERFACTUAL,
    INTERVENTIONAL,
    TEXTS,
    gumbel_agreement,
    independent_agreement,
    inverse_cdf_agreement,
    largest_agreement,
)
from workbench.methods.counterfactual.counterfacts import CounterfactualResult, Pair
from workbench.methods.counterfactual.edits import Edit, Plan, plan
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds

if TYPE_CHECKING:
    from workbench.subject import Subject

PLACES_AT_ONCE = 16  # whose two distributions are held together


@dataclass(frozen=True)
class Counterfactual(Probe):
    """Generates before an edit, after it with the same dice, and after it with fresh ones. Data: a list of Edits.

    samplers, temperatures   every pair of them is measured; see `Dice`. The coupling is a choice: compare two
    top_k, top_p             of the samplers of these names
    n_samples                texts per edit; at temperature 0 there is only one
    max_new_tokens           longest text after the edit
    noise_follows            where an edit changes the number of tokens: "position", each token takes the throw of its
                             own position; "distance", the throw of the factual token at the same distance from the edit
    Edit number e draws from the rows `row(e, sample)`, so that no two texts share a throw. Of one edit, the samples go
    through the model as one batch; each sample's prompt is read anew.
    """

    samplers: tuple[Sampler, ...] = ("full", "inverse_cdf")
    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0)
    n_samples: int = 20
    max_new_tokens: int = 16
    top_k: int = 10
    top_p: float = 0.9
    noise_follows: Literal["position", "distance"] = "position"
    seed: int = 0

    bounds: ClassVar[Bounds] = {"temperatures": 0, "top_k": 1, "top_p": (0, 1)}

    def dice(self, sampler: Sampler, temperature: float) -> Dice:
        """The dice of one sampler and temperature, to throw them again by `subject.generate(..., dice=, rows=)`."""
        top_k, top_p = self.top_k if sampler == "top_k" else None, self.top_p if sampler == "top_p" else None
        return Dice(self.seed, sampler, temperature, top_k, top_p)

    def row(self, edit: int, sample: int, *, fresh: bool = False) -> int:
        """The dice's row of a sample; `fresh` that of its interventional twin."""
        return (2 * edit + fresh) * self.n_samples + sample

    def measure(self, subject: Subject, data: Sequence[Edit]) -> CounterfactualResult:
        self._check(data)
        plans = [plan(subject, edit) for edit in data]
        settings = [self.dice(*setting) for setting in product(self.samplers, self.temperatures)]
        pairs = [pair for dice in settings for pair in self._pairs(subject, plans, dice)]
        wanted = len(plans) * sum(self.n_samples if dice.temperature else 1 for dice in settings)
        if not pairs:
            raise ValueError(f"Counterfactual: every text ended before its edit, at {[p.position for p in plans]}.")
        lost = f"{wanted - len(pairs)} of {wanted} texts ended before the edit and have no counterfactual"
        return CounterfactualResult.of(
            pairs,
            self.max_new_tokens,
            subject.tokenizer,
            edits=data,
            plans=plans,
            samplers=self.samplers,
            noise_follows=self.noise_follows,
            seed=self.seed,
            notes=(lost,) if len(pairs) < wanted else (),
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Two known distributions over 20 tokens, sampled by hand: agreement must be what the closed forms say."""
        return _planted("logits", seed, edited=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """An edit that changes nothing: the counterfactual is the factual text, its twin agrees by chance alone."""
        return _planted("nothing", seed, edited=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[Counterfactual, list[Edit]]:
        prompt, other = (text_of(subject.tokenizer, [8, 9, token, 11]) for token in (10, 12))
        words = {"half": {"first": tuple(text_of(subject.tokenizer, [token]) for token in range(8, 600))}}
        edits = [Edit(prompt, other, name="word", reads=words), Edit(prompt, prompt, name="nothing")]
        edits.append(Edit((8, 9, 10), position=3, ids=(13,), name="own text"))
        return cls(temperatures=(0.0, 1.0), n_samples=4, max_new_tokens=4), edits

    def _check(self, data: Sequence[Edit]) -> None:
        if not len(data) or not all(isinstance(edit, Edit) for edit in data):
            raise ValueError(
                f"Counterfactual: got {data!r:.60}, expected a list of Edit(prompt, edited), at least one."
            )
        if not self.samplers or not self.temperatures or min(self.n_samples, self.max_new_tokens) < 1:
            raise ValueError(
                f"Counterfactual: got samplers={self.samplers}, temperatures={self.temperatures}, n_samples="
                f"{self.n_samples}, max_new_tokens={self.max_new_tokens}, expected at least one of each."
            )
        for what, values in (("samplers", self.samplers), ("temperatures", self.temperatures)):
            if len(set(values)) < len(values):
                raise ValueError(f"Counterfactual: got {what}={values}, expected different ones. Name each once.")
        for sampler, temperature in product(self.samplers, self.temperatures):
            self.dice(sampler, temperature).check()

    def _pairs(self, subject: Subject, plans: Sequence[Plan], dice: Dice) -> Iterator[Pair]:
        """Every edit and sample under one setting of the dice; without those whose text ended before the edit."""
        jobs = list(product(range(len(plans)), range(self.n_samples if dice.temperature else 1)))
        factual = subject.generate(
            [plans[e].before for e, _ in jobs],
            max_new_tokens=self.max_new_tokens + max(one.start for one in plans),
            dice=dice,
            rows=[self.row(e, s) for e, s in jobs],
        )
        kept = [k for k, (e, _) in enumerate(jobs) if len(factual.ids[k]) >= plans[e].start]
        if not kept:
            return
        jobs, written = [jobs[k] for k in kept], [factual.ids[k] for k in kept]
        places = [Place(plans[e].factual(ids), plans[e].edited(ids)) for (e, _), ids in zip(jobs, written, strict=True)]
        twins = [self._edited(subject, plans, dice, jobs, places, fresh) for fresh in (False, True)]
        parts = [slice(plans[e].start, plans[e].start + self.max_new_tokens) for e, _ in jobs]
        ids = [(w[p], *(twin.ids[k] for twin in twins)) for k, (w, p) in enumerate(zip(written, parts, strict=True))]
        odds = first_tokens(subject, dice, places, ids)
        for k, (e, sample) in enumerate(jobs):
            log_probs = (factual.log_probs[kept[k]][parts[k]], *(twin.log_probs[k] for twin in twins))
            yield Pair(e, sample, dice.sampler, dice.temperature, ids[k], log_probs, *odds[k])

    def _edited(
        self,
        subject: Subject,
        plans: Sequence[Plan],
        dice: Dice,
        jobs: Sequence[tuple[int, int]],
        places: Sequence[Place],
        fresh: bool,
    ) -> Generation:
        """What follows the edit, with the factual throws or with fresh ones."""
        return subject.generate(
            [place.edited for place in places],
            max_new_tokens=self.max_new_tokens,
            dice=dice,
            rows=[self.row(e, s, fresh=fresh) for e, s in jobs],
            throws_from=[len(p.factual if self.noise_follows == "distance" else p.edited) for p in places],
            written=[plans[e].start for e, _ in jobs],
        )


class Place(NamedTuple):
    """The ids before the first compared token, without the edit and with it."""

    factual: tuple[int, ...]
    edited: tuple[int, ...]


Odds = tuple[tuple[float, float, float], tuple[float, float]]  # of a pair: expected agreements, shift of two tokens


def first_tokens(
    subject: Subject, dice: Dice, places: Sequence[Place], ids: Sequence[tuple[tuple[int, ...], ...]]
) -> list[Odds]:
    """For each pair, from the model's two distributions of the first token: `expected` and `shift` of the result.

    Pairs of one prompt share them, so each place is read once; memory is that of PLACES_AT_ONCE distributions.
    """
    found: dict[int, Odds] = {}
    unique = list(dict.fromkeys(places))
    for start in range(0, len(unique), PLACES_AT_ONCE):
        some = unique[start : start + PLACES_AT_ONCE]
        texts = [text for place in some for text in place]
        last = {row: dice.log_probs(values[-1]).cpu() for row, _, values in subject.predictions(texts, batch=512)}
        for number, place in enumerate(some):
            log_p, log_q = last[2 * number], last[2 * number + 1]
            expected = expected_agreement(log_p.exp().numpy(), log_q.exp().numpy(), dice.sampler)
            for pair in (pair for pair, its in enumerate(places) if its == place):
                before, after = (float(log_q[i[0]] - log_p[i[0]]) if i else np.nan for i in ids[pair][:2])
                # A factual text that ends where the edit does has no token that could stay.
                found[pair] = expected if ids[pair][0] else (0.0, 0.0, 0.0), (before, after)
    return [found[pair] for pair in range(len(places))]


def expected_agreement(p: np.ndarray, q: np.ndarray, sampler: str) -> tuple[float, float, float]:
    """Chance that a token from p stays when drawn from q: same dice (NaN: no closed form), fresh dice, largest."""
    same = {"rank": lambda p, q: np.nan, "inverse_cdf": inverse_cdf_agreement}.get(sampler, gumbel_agreement)
    return same(p, q), independent_agreement(p, q), largest_agreement(p, q)


def simulated(log_p: np.ndarray, log_q: np.ndarray, n_pairs: int, seed: int, name: str) -> CounterfactualResult:
    """Pairs of one token, drawn from two known distributions (V,) instead of a model's."""
    rows, position = torch.arange(n_pairs), torch.zeros(n_pairs, dtype=torch.int64)
    before, after = (torch.from_numpy(values).expand(n_pairs, -1) for values in (log_p, log_q))
    samplers = ("full", "inverse_cdf")
    columns = []
    for number, sampler in enumerate(samplers):
        dice = Dice(seed, sampler)
        drawn = [dice.choose(before, rows, position), dice.choose(after, rows, position)]
        drawn.append(dice.choose(after, rows + n_pairs, position))
        ids = torch.stack(drawn, 1).numpy()  # (n_pairs, 3)
        expected = np.tile(expected_agreement(np.exp(log_p), np.exp(log_q), sampler), (n_pairs, 1))
        log_probs = np.stack([log_p[ids[:, 0]], log_q[ids[:, 1]], log_q[ids[:, 2]]], axis=1)
        columns.append((ids, log_probs, expected, (log_q - log_p)[ids[:, :2]], np.full(n_pairs, number)))
    ids, log_prob, expected, shift, sampler = (np.concatenate(column) for column in zip(*columns, strict=True))
    return CounterfactualResult(
        factual=ids[:, :1].astype(np.int32),
        counterfactual=ids[:, 1:2].astype(np.int32),
        interventional=ids[:, 2:].astype(np.int32),
        log_prob=log_prob[:, :, None].astype(np.float32),
        expected=expected,
        shift=shift,
        edit=np.zeros(len(ids), dtype=np.int32),
        sample=np.tile(np.arange(n_pairs, dtype=np.int32), len(samplers)),
        sampler=sampler.astype(np.int32),
        temperature=np.ones(len(ids)),
        texts=pd.DataFrame({kind: ids[:, k].astype(str) for k, kind in enumerate(TEXTS)}),
        names=(name,),
        prompts=("simulated",),
        edited=("simulated",),
        edit_positions=(0,),
        reads=({},),
        pieces={token: f" {token}" for token in range(len(log_p))},
        samplers=samplers,
        seed=seed,
    )


def _planted(name: str, seed: int, *, edited: bool, n_pairs: int = 50_000) -> Planted:
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=20)
    moved = logits + 0.5 * rng.normal(size=20) * edited
    log_p, log_q = (values - np.log(np.exp(values).sum()) for values in (logits, moved))
    p, q = np.exp(log_p), np.exp(log_q)

    def agreement(sampler: str, kind: str) -> Callable[[Any], float]:
        def look(result: CounterfactualResult) -> float:
            table = result.first_token().set_index(["sampler", "kind"])
            return float(table.loc[(sampler, kind), "observed"])

        return look

    def violations(sampler: str) -> Callable[[Any], float]:
        return lambda result: float(result.stability(0.0).set_index("sampler").loc[sampler, "share"])

    # Slow and obvious truths: every ratio of the closed form, and the overlap of every pair of intervals.
    same = 1.0 / np.maximum(p[:, None] / p, q[:, None] / q).sum(axis=0)
    ends = np.cumsum(p)[:, None], np.cumsum(q)[None]
    overlap = np.maximum(0, np.minimum(*ends) - np.maximum(ends[0] - p[:, None], ends[1] - q))  # (before, after)
    ratio = log_q - log_p
    worse = (ratio[None] < ratio[:, None]) & ~np.eye(20, dtype=bool)
    truths = (
        ("agreement, same noise", agreement("full", COUNTERFACTUAL), same.sum()),
        ("agreement, fresh noise", agreement("full", INTERVENTIONAL), (p * q).sum()),
        ("agreement, inverse CDF", agreement("inverse_cdf", COUNTERFACTUAL), np.trace(overlap)),
        ("stability violations, Gumbel-max", violations("full"), 0.0),
        ("stability violations, inverse CDF", violations("inverse_cdf"), overlap[worse].sum()),
    )
    four_sd = [4 * np.sqrt(truth * (1 - truth) / n_pairs) if truth < 1 - 1e-9 else 1e-9 for *_, truth in truths]
    return Planted(
        name=name,
        arrays={"p": p, "q": q},
        solve=lambda: simulated(log_p, log_q, n_pairs, seed, name),
        expectations=tuple(
            Expectation(measure, look, truth - sd, truth + sd)
            for (measure, look, truth), sd in zip(truths, four_sd, strict=True)
        ),
    )
