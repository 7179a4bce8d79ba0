"""GrAInS: a steering direction from the tokens that carry a preference, and from those that speak against it.

v = mean_i [h(x_i) - h(x_i without its k tokens for)] - mean_i [h(x_i) - h(x_i without its k tokens against)]
Source: Nguyen et al., 2025, "GrAInS: Gradient-based Attribution for Inference-Time Steering of LLMs and VLMs"
(arXiv 2507.18043). Ours: log-probabilities of whole answers, each token's read one before it; a mean embedding for
what is left out; means or uncentred components instead of centred ones, which lose what all pairs share.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.anatomy import add_tap
from workbench.directions import Direction
from workbench.methods.steering.attribution import (
    Attribution,
    Baseline,
    Preference,
    Triples,
    attributed,
    blank_embedding,
    embedded,
    forward_embedded,
)
from workbench.methods.steering.pairs import first_component
from workbench.site import Site
from workbench.values import fingerprint

if TYPE_CHECKING:
    from workbench.subject import Subject


def grains_direction(
    subject: Subject,
    triples: Triples,
    site: Site,
    *,
    k: int = 3,
    read: Literal["prompt", "answers"] = "prompt",
    combine: Literal["mean", "pca"] = "mean",
    replacement: Baseline = "mean",
    tolerance: float = 0.01,
    name: str = "GrAInS",
    **attribution: Any,
) -> Direction:
    """The direction at `site` from dispreferred to preferred, by leaving out the tokens that decide between them.

    triples      (prompt, preferred answer, dispreferred answer); test on others than these
    k            how many tokens are left out for each side, by score; never special tokens or template; as published
                 10, for longer prompts
    read         values at the prompt's last token, or at the last token of both answers, as published
    combine      "mean" of the differences, or their first uncentred component with the mean's side and norm
    replacement  what stands for a token left out, and the baseline of the attribution
    attribution  rule, steps, most_steps, separator, template: see `workbench.methods.steering.attribution.attributed`
    Raises ValueError where integrated gradients miss more than `tolerance` of a preference.
    """
    if k < 1 or read not in ("prompt", "answers") or combine not in ("mean", "pca"):
        raise ValueError(
            f"grains_direction: got k={k}, read={read!r}, combine={combine!r}, "
            "expected k >= 1, 'prompt' or 'answers', 'mean' or 'pca'."
        )
    blank = blank_embedding(subject, replacement)
    sides: dict[int, list[Tensor]] = {1: [], -1: []}
    for pair, found in attributed(subject, triples, baseline=replacement, tolerance=tolerance, **attribution):
        _refuse_incomplete(found, tolerance)
        for sign, differences in sides.items():
            chosen = strongest(sign * found.scores, torch.tensor(pair.free), k)
            if chosen.any():
                differences += _left_out(subject, pair, chosen, blank, site, read)
    if not any(sides.values()):
        raise ValueError("grains_direction: no token has any say in these preferences. Check prompts and answers.")
    vectors = [sign * _combined(torch.stack(values), combine) for sign, values in sides.items() if values]
    data = fingerprint(tuple(map(tuple, triples)))
    return Direction(sum(vectors), site, subject.fingerprint, name, "preferred - dispreferred", data)  # type: ignore[arg-type]


def strongest(scores: Float[Tensor, " seq"], free: Bool[Tensor, " seq"], k: int) -> Bool[Tensor, " seq"]:
    """The k tokens with the largest positive scores among the free ones, or as many as there are."""
    able = free & (scores > 0)
    order = torch.where(able, scores, -torch.inf).argsort(descending=True, stable=True)[:k]
    return torch.zeros_like(able).index_fill_(0, order, True) & able


@torch.no_grad()
def _left_out(
    subject: Subject, pair: Preference, chosen: Bool[Tensor, " seq"], blank: Tensor, site: Site, read: str
) -> list[Float[Tensor, " width"]]:
    """Value at the end of the text minus that with the chosen tokens blanked; one per answer, or one for the prompt."""
    whole = embedded(subject, pair.prompt)
    rows = torch.stack([whole, torch.where(chosen.to(whole.device)[:, None], blank, whole)])
    answers: Sequence[tuple[int, ...] | None] = [None] if read == "prompt" else [pair.preferred, pair.dispreferred]
    differences = []
    for answer in answers:
        tail = None if answer is None else embedded(subject, answer).to(subject.dtype).expand(2, -1, -1)
        seen: list[Tensor] = []
        with ExitStack() as undo:
            look = lambda value, seen=seen: seen.append(value[:, -1].double().flatten(1).cpu())  # noqa: E731
            add_tap(subject.model, subject.anatomy, site, look, undo)
            forward_embedded(subject, rows, tail)
        differences.append(seen[0][0] - seen[0][1])
    return differences


def _combined(differences: Float[Tensor, "row width"], combine: str) -> Float[Tensor, " width"]:
    mean = differences.mean(0)
    return mean if combine == "mean" else first_component(differences) * mean.norm()


def _refuse_incomplete(found: Attribution, tolerance: float) -> None:
    if not found.relative_gap <= tolerance:  # NaN is not complete either
        raise ValueError(
            f"grains_direction: with {found.steps} steps integrated gradients miss {found.relative_gap:.1%} of a "
            f"preference, expected at most {tolerance:.1%}. Raise most_steps, take replacement='mean', or allow more."
        )
