"""How strongly to push? As strongly as moves the predictions by a chosen amount: pushes become comparable.

KL(p || p_s) in nats, p the plain prediction and p_s the one under `make(s)`, at the last token of neutral prompts,
mean over prompts. For small s it grows as s^2, but it need not grow for ever: nothing here takes it for monotone.
Source: Shafran, Geiger and Geva, 2025 (arXiv 2506.10920), who match features by KL; the search is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

GROWTH = 2.0, 16.0  # smallest and largest factor between two strengths while looking for a bracket
SMALLEST = 2.0**-30  # of `start`: below it a push is nothing in any number format


@dataclass(frozen=True)
class Strength:
    """The strength that came closest to a target.

    strength       signed                             kl     reached there, in nats
    reached        `kl` is within the tolerance       note   in words why not, else ""
    n_evaluations  forwards over the prompts
    """

    strength: float
    kl: float
    target_kl: float
    reached: bool
    n_evaluations: int
    note: str = ""


def strength_for_kl(
    subject: Subject,
    make: Callable[[float], Toggle],
    prompts: Sequence[str],
    target_kl: float,
    *,
    sign: int = 1,
    start: float = 1.0,
    limit: float = 1e6,
    tolerance: float = 0.05,
    max_evaluations: int = 30,
    positions: Sequence[int] = (-1,),
) -> Strength:
    """The strength s of one sign at which `make(s)` moves the predictions by `target_kl` nats.

    make         a toggle for a strength, such as `lambda s: Steer(direction, site, s)`
    sign         1 or -1: `make` gets strengths of this sign only. Ask for each: they need not be alike
    start, limit the first strength tried and the largest, both without sign
    tolerance    share of the target within which it counts as reached
    positions    tokens of each prompt where predictions are compared, negative ones from the end
    First a bracket by growing or shrinking, then bisection of the logarithm; the closest strength ever tried is kept.
    """
    _check(target_kl, sign, start, limit, tolerance, max_evaluations)
    plain = log_probs_at(subject, prompts, positions)
    tried: list[tuple[float, float]] = []  # (strength without sign, KL)

    def kl_at(strength: float) -> float:
        with subject.under(make(sign * strength)):
            moved = log_probs_at(subject, prompts, positions)
        kl = mean_kl(plain, moved)
        tried.append((strength, kl if math.isfinite(kl) else math.inf))  # a push that overflows is too strong
        return tried[-1][1]

    def done() -> bool:
        return len(tried) >= max_evaluations or abs(tried[-1][1] - target_kl) <= tolerance * target_kl

    low, high = _bracket(kl_at, done, target_kl, start, limit)
    while not done() and low is not None and high is not None and high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        if kl_at(middle) < target_kl:
            low = middle
        else:
            high = middle
    strength, kl = min(tried, key=lambda pair: (abs(pair[1] - target_kl), pair[0]))
    reached = abs(kl - target_kl) <= tolerance * target_kl
    note = "" if reached else _why_not(tried, target_kl, low, high, start, limit)
    return Strength(sign * strength, kl, target_kl, reached, len(tried), note)


def log_probs_at(
    subject: Subject, prompts: Sequence[str], positions: Sequence[int] = (-1,)
) -> Float[Tensor, "prompt position vocab"]:
    """Log-probabilities of the token after each of the positions of each prompt, float64 on the CPU."""
    if not len(positions):
        raise ValueError("strength: got no positions, expected at least one, such as (-1,) for the last token.")
    rows: dict[int, Tensor] = {}
    for row, ids, values in subject.predictions(prompts):
        outside = [p for p in positions if not -len(ids) <= p < len(ids)]
        if outside:
            raise ValueError(f"strength: prompt {row} has {len(ids)} tokens, so it has no position {outside[0]}.")
        rows[row] = values[list(positions)].double().cpu()
    return torch.stack([rows[row] for row in range(len(prompts))])


def mean_kl(plain: Tensor, moved: Tensor) -> float:
    """Mean over prompts and positions of KL(plain || moved), in nats."""
    terms = plain.exp() * (plain - moved)
    return float(torch.where(plain == -torch.inf, torch.zeros_like(terms), terms).sum(-1).mean())


def _bracket(
    kl_at: Callable[[float], float], done: Callable[[], bool], target: float, start: float, limit: float
) -> tuple[float | None, float | None]:
    """(a strength below the target, one at or above it); None where none was found."""
    strength, kl = start, kl_at(start)
    low, high = (strength, None) if kl < target else (None, strength)
    while not done():
        # The square law gives the size of the step; it is held to a range, as it holds for small pushes only.
        ratio = math.sqrt(target / kl) if 0 < kl < math.inf else (GROWTH[1] if kl == 0 else 1 / GROWTH[1])
        if high is None:
            strength = min(limit, strength * min(max(1.1 * ratio, GROWTH[0]), GROWTH[1]))
        else:
            strength = strength / min(max(1.1 / ratio, GROWTH[0]), GROWTH[1])
        kl = kl_at(strength)
        low, high = (strength, high) if kl < target else (low, strength)
        if (low is not None and high is not None) or strength >= limit or strength < SMALLEST * start:
            break
    return low, high


def _why_not(
    tried: list[tuple[float, float]], target: float, low: float | None, high: float | None, start: float, limit: float
) -> str:
    smallest, largest = (end(strength for strength, _ in tried) for end in (min, max))
    most = max(kl for _, kl in tried)
    far = largest >= limit if high is None else smallest < SMALLEST * start  # looked for as far as it goes
    what = "out of reach" if far else f"not found in {len(tried)} evaluations"
    if high is None:
        return f"{what}: up to strength {largest:.3g} the KL is at most {most:.3g}, the target {target:g}"
    if low is None:
        return f"{what}: even at strength {smallest:.3g} the KL exceeds the target {target:g}"
    return f"not within the tolerance after {len(tried)} evaluations: the KL jumps between {low:.4g} and {high:.4g}"


def _check(target_kl: float, sign: int, start: float, limit: float, tolerance: float, max_evaluations: int) -> None:
    if not 0 < target_kl < math.inf:
        raise ValueError(f"strength_for_kl: got target_kl={target_kl}, expected a positive number of nats.")
    if sign not in (1, -1):
        raise ValueError(f"strength_for_kl: got sign={sign}, expected 1 or -1. Each sign has its own strength.")
    if not 0 < start <= limit < math.inf:
        raise ValueError(f"strength_for_kl: got start={start}, limit={limit}, expected 0 < start <= limit.")
    if not 0 < tolerance < 1 or max_evaluations < 1:
        raise ValueError(
            f"strength_for_kl: got tolerance={tolerance}, max_evaluations={max_evaluations}, "
            "expected a share of the target between 0 and 1, and at least one evaluation."
        )
