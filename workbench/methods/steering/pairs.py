"""Directions from pairs of texts that differ in one thing: their mean, a single pair, their principal component.

v = mean_i(h(positive_i) - h(negative_i)), or the unit u that maximises sum_i (u . (h(positive_i) - h(negative_i)))^2.
Sources: Panickssery et al. 2023 (contrastive activation addition, CAA); Turner et al. 2023 (ActAdd: a single pair).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.directions import AT_ONCE, Direction, at_positions
from workbench.site import Site
from workbench.tokens import Texts
from workbench.values import fingerprint

if TYPE_CHECKING:
    from workbench.subject import Subject

Pairs = Sequence[tuple[str, str]] | Sequence[tuple[Sequence[int], Sequence[int]]]


def contrastive_pairs(
    subject: Subject,
    pairs: Pairs,
    site: Site,
    *,
    tokens: Literal["last"] | int = "last",
    name: str = "contrastive pairs",
) -> Direction:
    """Mean difference at one token of (positive, negative) texts that differ in one thing only (CAA).

    Questions with two answers end in the answer's letter: that token carries the difference.
    """
    differences = pair_differences(subject, pairs, site, tokens=tokens)
    data = fingerprint(tuple(map(tuple, pairs)))
    return Direction(differences.mean(0), site, subject.fingerprint, name, "mean(positive - negative) over pairs", data)


def single_pair(
    subject: Subject, positive: str, negative: str, site: Site, *, tokens: Literal["last"] | int = "last"
) -> Direction:
    """The difference of two texts at one token: noisier than a mean, and enough to try an idea (ActAdd)."""
    found = contrastive_pairs(subject, [(positive, negative)], site, tokens=tokens)
    return replace(found, name=f"{positive!r} - {negative!r}", sign="positive - negative")


def single_pair_by_position(subject: Subject, positive: str, negative: str, site: Site) -> tuple[Direction, ...]:
    """The difference of two texts at each of their tokens, which ActAdd adds to the first tokens of a prompt.

    `Steer(each[p], site, positions=(p,))` for every p, joined by |, is that addition. Both texts must have the same
    number of tokens: pad the shorter with spaces or filler words, as the authors do.
    """
    lengths = subject.tokenize([positive, negative]).lengths
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"single_pair_by_position: got texts of {lengths[0]} and {lengths[1]} tokens, expected as many in both. "
            "Pad the shorter one with filler."
        )
    values = subject.capture([positive, negative], [site], progress=False)[site].double().flatten(1)
    data = fingerprint((positive, negative))
    name = f"{positive!r} - {negative!r}"
    return tuple(
        Direction(vector, site, subject.fingerprint, f"{name}, token {position}", "positive - negative", data)
        for position, vector in enumerate(values[: lengths[0]] - values[lengths[0] :])
    )


def principal_direction(
    subject: Subject,
    pairs: Pairs,
    site: Site,
    *,
    tokens: Literal["last"] | int = "last",
    centred: bool = False,
    name: str = "principal direction of pairs",
) -> Direction:
    """First principal component of the pair differences, with the norm and the side of their mean.

    centred   A TRAP, here to be shown: taking the mean out of the differences takes out what all pairs share, which
              is what was asked for. What is left is the direction in which the pairs differ among themselves.
    """
    differences = pair_differences(subject, pairs, site, tokens=tokens)
    data = fingerprint(tuple(map(tuple, pairs)))
    vector = first_component(differences, centred=centred) * differences.mean(0).norm()
    marked = f"{name}, centred (a trap)" if centred else name
    return Direction(vector, site, subject.fingerprint, marked, "side of mean(positive - negative)", data)


def first_component(differences: Float[Tensor, "pair width"], *, centred: bool = False) -> Float[Tensor, " width"]:
    """Unit vector of the largest sum of squared projections, on the side of the mean; `centred` is the trap."""
    values = differences.double()
    mean = values.mean(0)
    if centred and len(values) < 2:
        raise ValueError("first_component: got one difference, which is nothing once it is centred; expected several.")
    component = torch.linalg.svd(values - mean if centred else values, full_matrices=False).Vh[0]
    return component if float(component @ mean) >= 0 else -component


def pair_differences(
    subject: Subject, pairs: Pairs, site: Site, *, tokens: Literal["last"] | int = "last"
) -> Float[Tensor, "pair width"]:
    """Positive minus negative of each pair at one token, in float64 on the CPU."""
    wrong = [index for index, pair in enumerate(pairs) if isinstance(pair, str) or len(pair) != 2]
    if wrong or not len(pairs):
        got = f"pair {wrong[0]} is {pairs[wrong[0]]!r:.60}" if wrong else "got no pairs"
        raise ValueError(f"pairs: {got}, expected [(positive text, negative text), ...].")
    position = -1 if tokens == "last" else tokens
    made = []
    for start in range(0, len(pairs), AT_ONCE):
        texts = [text for pair in pairs[start : start + AT_ONCE] for text in pair]
        values = at_positions(subject, cast(Texts, texts), [site], [position])[site][:, 0]  # (2 pairs, width)
        made.append(values[0::2] - values[1::2])
    return torch.cat(made)
