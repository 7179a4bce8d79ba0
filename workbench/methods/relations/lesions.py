"""What breaks when units are off: sets of units by rank, what is asked under them, and whether their effects add up.

drop(i, j) = (accuracy_i - accuracy_i with units of j off) / accuracy_i
cumulativity = 1 - affected / total; total: right under the smaller set, wrong under the larger; affected: of those,
wrong under the difference of both sets alone. Source: Liu et al., 2025 (arXiv 2502.17355), sections 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.methods.relations.facts import Prompt
from workbench.methods.relations.responses import Layout

# (units (unit, 2) or None, the relation they belong to, indices of prompts) -> whether each was answered
Ask = Callable[[np.ndarray | None, int, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Lesions:
    """Units to switch off, relation by relation, and the prompts to ask then.

    units    (relation, rank, 2: layer index, column), best first        layout   which unit that is
    held     (relation, layer, column) value that stands for "nothing of this relation": the mean over negatives
    """

    relations: tuple[str, ...]
    units: np.ndarray
    held: np.ndarray
    layout: Layout
    prompts: tuple[Prompt, ...]

    @property
    def relation_of(self) -> np.ndarray:
        """(prompt,) index of each prompt's relation."""
        return np.array([self.relations.index(prompt.relation) for prompt in self.prompts])

    def top(self, relation: int, start: int, stop: int) -> np.ndarray:
        """Units of ranks start to stop - 1, in the order of layers and columns."""
        return in_order(self.units[relation, start:stop])

    def random(self, relation: int, k: int, rng: np.random.Generator) -> np.ndarray:
        """As many units as the top k have in each part of each layer, drawn from all that are there."""
        like, ends = self.top(relation, 0, k), np.cumsum(self.layout.widths)
        part = self.layout.part_of(like[:, 1])[0]
        drawn = []
        for layer, p in sorted({(int(a), int(b)) for a, b in zip(like[:, 0], part, strict=True)}):
            count = int(((like[:, 0] == layer) & (part == p)).sum())
            inside = rng.choice(self.layout.widths[p], count, replace=False)
            drawn += [(layer, int(ends[p] - self.layout.widths[p] + column)) for column in inside]
        return in_order(np.array(drawn))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was answered. C conditions (one set of units off each), Q prompts.

    base, correct       (Q,), (C, Q) answered with everything on, and under each condition
    off, k, draw        (C,) relation whose units are off, how many; draw -1: the best ones, else a random set's number
    total, affected     (relation, pair of neighbouring sizes) prompts of the relation, see the module's equation
    """

    base: np.ndarray
    correct: np.ndarray
    off: np.ndarray
    k: np.ndarray
    draw: np.ndarray
    total: np.ndarray
    affected: np.ndarray


def switch_off(ask: Ask, lesions: Lesions, sizes: Sequence[int], n_random: int, seed: int) -> Outcome:
    """Ask all prompts with the best k units of every relation off, for each size k, and with matched random units."""
    everything, relation_of = np.arange(len(lesions.prompts)), lesions.relation_of
    base = ask(None, 0, everything)
    conditions, correct = [], []
    total, affected = np.zeros((2, len(lesions.relations), len(sizes) - 1), dtype=np.int64)
    for r in range(len(lesions.relations)):
        rng, own, before = np.random.default_rng([seed, r]), relation_of == r, base
        for n, k in enumerate(sizes):
            now = ask(lesions.top(r, 0, k), r, everything)
            conditions.append((r, k, -1))
            correct.append(now)
            lost = np.flatnonzero(own & before & ~now)
            if n and lost.size:
                total[r, n - 1] = lost.size
                affected[r, n - 1] = (~ask(lesions.top(r, sizes[n - 1], k), r, lost)).sum()
            before = now
            for draw in range(n_random):
                conditions.append((r, k, draw))
                correct.append(ask(lesions.random(r, k, rng), r, everything))
    off, k, draw = np.array(conditions).T
    return Outcome(base, np.array(correct), off, k, draw, total, affected)


def checked_sizes(sizes: Sequence[int], lesions: Lesions) -> tuple[int, ...]:
    """The sizes, ascending; ValueError where one is no number of units that were ranked."""
    if len(lesions.relations) < 2:
        raise ValueError(f"Deactivation: got the relations {lesions.relations}, expected two or more to compare.")
    n_ranked = lesions.units.shape[1]
    if not sizes or min(sizes) < 1 or max(sizes) > n_ranked or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"Deactivation: got sizes {tuple(sizes)}, expected different numbers from 1 to the {n_ranked} ranked units."
        )
    return tuple(sorted(sizes))


def in_order(units: np.ndarray) -> np.ndarray:
    """Units sorted by layer, then column."""
    return units[np.lexsort((units[:, 1], units[:, 0]))]
