"""Does a direction cause its concept? Pushes of equal KL, and how much probability they move to the concept's words.

mass = sum of p(word) over the concept's words, next token of neutral prompts. A push of KL(p0 || p) = d cannot raise it
beyond q with d = b log(b/q) + (1-b) log((1-b)/(1-q)), b the mass before (data processing): the ceiling of every method.
Sources: Shafran, Geiger and Geva, 2025 (arXiv 2506.10920: matched KL); Cover and Thomas, 2006, section 2.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from workbench.directions import Direction
from workbench.methods.snmf.concepts import Question
from workbench.stats import bootstrap_interval
from workbench.strength import log_probs_at, strength_for_kl
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

TOLERANCE = 0.1  # of the target KL
COLUMNS = ("method", "concept", "sign", "target_kl", "kl", "strength", "reached", "base", "mass", "bound", "note")


def first_ids(subject: Subject, questions: Sequence[Question]) -> dict[str, list[int]]:
    """Token ids with which the words of each concept begin, after its prompts; those of two concepts belong to none."""
    found: dict[str, list[int]] = {}
    for question in questions:
        prompt = question.prompts[0]
        made = subject.tokenize([prompt, *(f"{prompt} {word}" for word in question.words)]).ids
        same = [ids[len(made[0])] for ids in made[1:] if ids[: len(made[0])] == made[0] and len(ids) > len(made[0])]
        found[question.concept] = sorted(set(same))
    every = [token for ids in found.values() for token in ids]
    return {concept: [token for token in ids if every.count(token) == 1] for concept, ids in found.items()}


def effects(
    subject: Subject,
    make: Callable[[Direction, float], Toggle],
    directions: Mapping[tuple[str, str], Direction],
    questions: Iterable[Question],
    target_kl: Sequence[float],
    *,
    signs: Sequence[int] = (1, -1),
    start: float = 1.0,
) -> pd.DataFrame:
    """One row per method, concept, sign and target: the strength found, and the concept's mass before and under it.

    make         a toggle for a direction and a strength     directions   by (method, concept)
    Columns: COLUMNS; bound is the most (sign 1) or least (-1) mass that any push of this KL could give. A concept
    whose words all begin like another's is left out.
    """
    questions, rows = list(questions), []
    ids = first_ids(subject, questions)
    for question in questions:
        concept, tokens = question.concept, ids[question.concept]
        if not tokens:
            continue
        base = _mass(subject, question, tokens)
        for (method, of), sign in product(directions, signs):
            direction, first = directions[method, of], start
            for target in sorted(target_kl) if of == concept else ():
                found = strength_for_kl(
                    subject,
                    lambda s, direction=direction: make(direction, s),
                    question.prompts,
                    target,
                    sign=sign,
                    start=first,
                    tolerance=TOLERANCE,
                )
                first = abs(found.strength)
                with subject.under(make(direction, found.strength)):
                    mass = _mass(subject, question, tokens)
                row = (target, found.kl, found.strength, found.reached, base, mass, bound(base, found.kl, sign))
                rows.append((method, concept, sign, *row, found.note))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def bound(base: float, kl: float, sign: int) -> float:
    """The largest (sign 1) or smallest (-1) mass that a push of mean KL `kl` can make of the mean mass `base`."""
    if not 0 < base < 1 or kl <= 0:
        return base

    def gap(q: float) -> float:
        return base * np.log(base / q) + (1 - base) * np.log((1 - base) / (1 - q)) - kl

    end = 1 - 1e-15 if sign > 0 else 1e-300
    return float(brentq(gap, base, end)) if gap(end) > 0 else end  # type: ignore[arg-type]


def summary(steering: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Mean mass over concepts per method, sign and target, 95 % interval over concepts; unreached rows are left out.

    Columns: method, sign, target_kl, kl, base, mass, low, high, bound, n_concepts.
    """
    rows = []
    reached = steering[steering["reached"].astype(bool)]
    for key in dict.fromkeys(zip(reached["method"], reached["sign"], reached["target_kl"], strict=True)):
        method, sign, target = key
        same = (reached["method"] == method) & (reached["sign"] == sign) & (reached["target_kl"] == target)
        some = reached[same]
        mass, low, high = bootstrap_interval(np.asarray(some["mass"]), seed=seed)
        means = some[["kl", "base", "bound"]].mean()
        rows.append((method, sign, target, means["kl"], means["base"], mass, low, high, means["bound"], len(some)))
    names = ["method", "sign", "target_kl", "kl", "base", "mass", "low", "high", "bound", "n_concepts"]
    return pd.DataFrame(rows, columns=names).astype({"mass": float, "low": float, "high": float})


def _mass(subject: Subject, question: Question, tokens: list[int]) -> float:
    """Mean over prompts of the probability that the next token is one of `tokens`."""
    return float(log_probs_at(subject, question.prompts)[:, 0, tokens].exp().sum(-1).mean())
