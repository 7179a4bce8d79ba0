"""What mechanisms are asked: questions that a seed draws, answers word for word, and when they tell nothing.

Source: this project; the corpora are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from workbench.corpora import requests
from workbench.methods.relations.facts import Facts
from workbench.stats import wilson_interval

if TYPE_CHECKING:
    from workbench.subject import Subject

FEWEST_NEURONS = 10  # a set of fewer is no set to follow


def drawn_facts(facts: Facts, n_per_relation: int, seed: int) -> Facts:
    """Some subjects of every relation."""
    rng, chosen = np.random.default_rng([seed, 1]), set()
    for relation in facts.relations:
        subjects = [prompt.subject for prompt in facts.prompts if prompt.relation == relation]
        chosen |= {(relation, name) for name in rng.choice(subjects, min(n_per_relation, len(subjects)), replace=False)}
    return facts.where(lambda prompt: (prompt.relation, prompt.subject) in chosen)


def drawn_requests(n: int, seed: int) -> dict[str, list[str]]:
    """Harmful and harmless requests of the held-out combinations."""
    rng, items, groups = np.random.default_rng([seed, 2]), requests.items("held_out", seed), {}
    for form in ("harmful", "harmless"):
        some = [item.prompt for item in items if item.form == form]
        groups[form] = [some[i] for i in rng.choice(len(some), min(n, len(some)), replace=False)]
    return groups


def says(subject: Subject, asked: Sequence[tuple[str, str]]) -> np.ndarray:
    """(question,) whether each token of the answer is the most probable one, given the question and those before it.

    Without toggles this is what greedy decoding says. Under those of a cache, generation would read the question at
    once and exactly; here each token reads what the cache has become, so that a single word, too, can be lost.
    """
    tokens = subject.tokenize([f"{prompt} {answer}" for prompt, answer in asked])
    starts = [len(prompt) for prompt, _ in asked]
    right = np.zeros(len(asked), dtype=bool)
    for row, ids, logprobs in subject.predictions(tokens.ids):
        answer = [t for t, (_, stop) in enumerate(tokens.offsets[row]) if stop > starts[row] and t]
        right[row] = all(int(logprobs[t - 1].argmax()) == ids[t] for t in answer)
    return right


def guessed(facts: Facts) -> float:
    """Share of right answers of one who knows only how often each answer belongs to its relation, and draws one."""
    shares = []
    for relation in facts.relations:
        answers = [prompt.answers for prompt in facts.prompts if prompt.relation == relation]
        _, counts = np.unique([" / ".join(one) for one in answers], return_counts=True)
        shares.append(float(np.square(counts / counts.sum()).sum()))
    return float(np.mean(shares))


def too_few(right: np.ndarray, chance: float, what: str) -> str:
    """Why answers tell nothing, or ""."""
    low = float(wilson_interval(int(right.sum()), len(right))[0])
    return "" if low > chance else f"{right.sum()} of {len(right)} {what} are right; chance is {chance:.0%}"


def too_small(members: np.ndarray, what: str) -> str:
    """Why a set of neurons tells nothing, or ""."""
    n = int(members.sum())
    return "" if n >= FEWEST_NEURONS else f"{n} neurons follow {what}, fewer than {FEWEST_NEURONS}"
