"""Does a neuron do what its label says? Hold it at a value and watch the probability of its token.

push = value |d_j| / |h|: the length that the neuron writes with its column d_j, over that of the residual stream h.
The control is another neuron of the same layer, held where its push is equally long. Source: own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.site import Site

# (site, neuron, value) -> log-probabilities (prompt, vocab) of the next token while the neuron is held; None: as it is
Reader = Callable[[tuple[Site, int, float] | None], Float[Tensor, "prompt vocab"]]
LABELLED, CONTROL = "labelled neuron", "random neuron, equal push"
COLUMNS = (
    "layer", "neuron", "role", "sign", "token_id", "token", "push", "value", "site", "token_prob", "token_logit",
    "base_prob", "base_logit", "kl", "n",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A label to check: this neuron, pushed in the direction of `sign`, writes this token."""

    site: Site
    neuron: int
    sign: str
    token_id: int
    token: str = ""


def strongest_claims(
    strength: np.ndarray, top_token: np.ndarray, signs: Sequence[str], site: Site, count: int
) -> list[Claim]:
    """The `count` neurons of a layer whose label stands out most, by their better sign; the same token only once.

    strength, top_token   (neuron, sign)
    """
    claims: dict[int, Claim] = {}
    for neuron in map(int, np.argsort(-strength.max(axis=1), kind="stable")):
        sign = int(strength[neuron].argmax())
        token = int(top_token[neuron, sign])
        if len(claims) < count and token not in claims:
            claims[token] = Claim(site, neuron, signs[sign], token)
    return list(claims.values())


def clamp_table(
    read: Reader,
    claims: Sequence[Claim],
    pushes: Sequence[float],
    column_length: Callable[[int], np.ndarray],
    stream_length: Callable[[int], float],
    seed: int = 0,
) -> pd.DataFrame:
    """COLUMNS, one row per claim, role and push; probabilities are means over prompts at their last token.

    column_length   layer -> (neuron,) length of each down column       stream_length   layer -> that of the stream
    token_logit     the logit above the mean logit of the vocabulary: what a shift of all logits can't change
    kl              nats from the unclamped prediction                  base_...        without the clamp
    """
    base, rng, rows = read(None), np.random.default_rng(seed), []
    for claim in claims:
        lengths = column_length(claim.site.layer)
        taken = {one.neuron for one in claims if one.site == claim.site}
        others = [neuron for neuron in range(len(lengths)) if neuron not in taken and lengths[neuron] > 0]
        if not others or not lengths[claim.neuron] > 0:
            raise ValueError(
                f"clamp check: layer {claim.site.layer} leaves no neuron as a control for neuron {claim.neuron}, or "
                "that neuron writes nothing. Check fewer neurons per layer."
            )
        pair = ((LABELLED, claim.neuron), (CONTROL, int(rng.choice(others))))
        for role, neuron in pair:
            for push in pushes:
                length = (-push if claim.sign == "-" else push) * stream_length(claim.site.layer)
                value = length / float(lengths[neuron])
                after = read((claim.site, neuron, value))
                where = (claim.site.layer, neuron, role, claim.sign, claim.token_id, claim.token, push, value)
                rows.append((*where, claim.site.kind, *_measures(base, after, claim.token_id), len(base)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def monotone(table: pd.DataFrame, role: str = LABELLED) -> float:
    """The share of checked neurons whose token gains logit with every larger push."""
    own = table.query("role == @role")
    logits = own.pivot_table(index=["layer", "neuron", "token_id"], columns="push", values="token_logit")
    return float((np.diff(logits.to_numpy(), axis=1) > 0).all(axis=1).mean())


def _measures(base: Tensor, after: Tensor, token: int) -> Iterator[float]:
    base, after = base.double(), after.double()
    for logprobs in (after, base):
        yield float(logprobs[:, token].exp().mean())
        yield float((logprobs[:, token] - _finite_mean(logprobs)).mean())
    yield float((base.exp() * (base - after)).nan_to_num(nan=0.0, posinf=torch.inf).sum(1).mean())


def _finite_mean(logprobs: Tensor) -> Tensor:
    return torch.where(logprobs.isfinite(), logprobs, torch.nan).nanmean(1)
