"""From responses to relation neurons: scores against other relations, p- and q-values, ranks.

A unit's score for relation r is the AP of its responses for the prompts of r; p from random orders, q by relation.
Source: Liu et al., 2025 (arXiv 2502.17355): negatives, top k; the permutation threshold and both signs are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from workbench.methods.relations.average_precision import (
    PrecisionNull,
    average_precision,
    chance_level,
    two_sided_precision,
)
from workbench.stats import benjamini_hochberg

N_QUANTILES = 401  # of each null, kept to draw it


@dataclass(frozen=True, eq=False)
class Field:
    """Prompts ranked together: their columns, the label of each, and the relations that labels 0, 1, ... stand for.

    Labels beyond the last relation are prompts that only serve as negatives.
    """

    columns: np.ndarray
    labels: np.ndarray
    relations: tuple[int, ...]


def fields(relation: np.ndarray, negatives_per_positive: int | None, seed: int = 0) -> list[Field]:
    """All relations against all others in one ranking, or each against so many times its own number of prompts."""
    count = np.bincount(relation)
    if negatives_per_positive is None:
        return [Field(np.arange(len(relation)), relation, tuple(range(len(count))))]
    rng, made = np.random.default_rng(seed), []
    for r, n_own in enumerate(count):
        own, others = np.flatnonzero(relation == r), np.flatnonzero(relation != r)
        wanted = negatives_per_positive * int(n_own)
        if wanted > len(others):
            raise ValueError(
                f"RelationNeurons: relation {r} wants {wanted} negatives, but the others have {len(others)} prompts. "
                "Lower negatives_per_positive, or None takes all others."
            )
        chosen = np.sort(rng.choice(others, wanted, replace=False))
        made.append(Field(np.concatenate([own, chosen]), np.repeat([0, 1], [n_own, wanted]), (r,)))
    return made


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores the units of one layer after another for every relation."""

    fields: tuple[Field, ...]
    nulls: tuple[PrecisionNull, ...]
    two_sided: bool

    @classmethod
    def of(
        cls, relation: np.ndarray, *, two_sided: bool, negatives_per_positive: int | None, n_null: int, seed: int
    ) -> Scorer:
        made = fields(relation, negatives_per_positive, seed)
        sizes = [tuple(np.bincount(one.labels).tolist()) for one in made]
        drawn = {size: PrecisionNull.of(size, n_null, two_sided=two_sided, seed=seed) for size in dict.fromkeys(sizes)}
        return cls(tuple(made), tuple(drawn[size] for size in sizes), two_sided)

    def score(self, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(ap, sign, p, mean of the negatives), each (unit, relation), of responses (unit, prompt) in float32."""
        parts: list[tuple[np.ndarray, ...]] = []
        for one, null in zip(self.fields, self.nulls, strict=True):
            values = responses[:, one.columns]
            if self.two_sided:
                ap, sign = two_sided_precision(values, one.labels)
            else:
                ap = average_precision(values, one.labels)
                sign = np.ones(ap.shape, dtype=np.int8)
            other = 1 - np.eye(ap.shape[1], dtype=np.float32)[one.labels]  # (prompt, label)
            others = values @ (other / other.sum(axis=0))  # float32: a value to hold a unit at, no statistic
            kept = slice(len(one.relations))
            parts.append(tuple(array[:, kept] for array in (ap, sign, null.p(ap), others)))
        ap, sign, p, others = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        return ap.astype(np.float32), sign, p, others

    def score_all(self, layers: Iterable[np.ndarray]) -> Scores:
        """The scores of every layer's responses (unit, prompt), which are dropped one after another."""
        arrays = [np.stack(column) for column in zip(*map(self.score, layers), strict=True)]
        null, chance = [], []
        for one, drawn in zip(self.fields, self.nulls, strict=True):
            for label in range(len(one.relations)):
                null.append(np.quantile(drawn.draws[label], np.linspace(0, 1, N_QUANTILES)))
                chance.append(chance_level(len(one.labels), drawn.sizes[label]))
        return Scores(*arrays, null=np.array(null), chance=np.array(chance))


@dataclass(frozen=True, eq=False)
class Scores:
    """Of one template: ap, sign, p, others (layer, unit, relation), see `Scorer.score`; null (relation, quantile)
    and chance (relation,), the exact mean of a one-sided AP."""

    ap: np.ndarray
    sign: np.ndarray
    p: np.ndarray
    others: np.ndarray
    null: np.ndarray
    chance: np.ndarray


def q_values(p: np.ndarray) -> np.ndarray:
    """Benjamini-Hochberg over all units of all layers, relation by relation: p (layer, unit, relation)."""
    return np.stack([benjamini_hochberg(p[..., r]) for r in range(p.shape[-1])], axis=-1)


def ranks(ap: np.ndarray) -> np.ndarray:
    """(layer, unit, relation) place of each unit by AP, 0 the best; ties go to the earlier layer and unit."""
    flat = ap.reshape(-1, ap.shape[-1])
    order = np.argsort(-flat, axis=0, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(len(flat))[:, None], axis=0)
    return place.reshape(ap.shape)
