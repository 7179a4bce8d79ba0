"""What a push does besides: to the prediction of other text, and to the text that the pushed model writes.

KL(p0 || p) = sum_v p0(v) (log p0(v) - log p(v)) per token; perplexity ratio = exp(nll - nll_0), nll in nats per token;
fluency = nats per token that the unpushed model gives to what the pushed one writes.
Source: Arditi et al. 2024, section 3.3 (loss on other text); own-likelihood fluency: Turner et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.site import Site
from workbench.tokens import Texts, batches, left_pad

if TYPE_CHECKING:
    from workbench.subject import Subject

VALUES_AT_ONCE = 2**26  # numbers captured before their norms join a running mean: 256 MB


@torch.no_grad()
def divergence_by_text(
    subject: Subject,
    texts: Texts,
    n_arms: int,
    under: Callable[[Tensor], AbstractContextManager[object]],
    *,
    batch: int = 2048,
) -> tuple[Float[Tensor, "arm text"], Float[Tensor, "arm text"]]:
    """(KL from arm 0, nll), both in nats per predicted token, of every arm on every text, in float64.

    under   (arm of each row) -> a context in which each row is treated as its arm says; arm 0 is the base
    The base runs as a row of every batch: nothing is kept from one batch to the next.
    """
    ids = subject.tokenize(texts).ids
    short = [index for index, row in enumerate(ids) if len(row) < 2]
    if short:
        raise ValueError(f"texts: text {short[0]} has one token, expected at least two: one to predict.")
    found = torch.full((2, n_arms, len(ids)), torch.nan, dtype=torch.float64)
    at_once = max(1, min(n_arms - 1, batch // max(map(len, ids)) - 1))
    for first in range(1, n_arms, at_once):
        arms = [0, *range(first, min(first + at_once, n_arms))]
        for group in batches([len(row) * len(arms) for row in ids], batch):
            rows = [(text, arm) for text in group for arm in arms]
            with under(torch.tensor([arm for _, arm in rows])):
                logits = _all_logits(subject, [ids[text] for text, _ in rows])
            for k, text in enumerate(group):
                own = logits[k * len(arms) : (k + 1) * len(arms), -len(ids[text]) :]
                found[:, arms, text] = _compare(own, torch.tensor(ids[text], device=own.device)).cpu()
    return found[0], found[1]


def mean_residual_norm(subject: Subject, texts: Texts, sites: tuple[Site, ...]) -> Float[Tensor, " site"]:
    """Mean norm of the values at each site, over all tokens but each text's first, in float64: the unit of strength.

    Many models give the first token a norm a hundred times that of the others (attention sinks): it would set the unit.
    """
    ids = subject.tokenize(texts).ids
    at_once = max(1, VALUES_AT_ONCE // (len(sites) * subject.anatomy.d_model * max(map(len, ids))))
    total, count = torch.zeros(len(sites), dtype=torch.float64), 0
    for start in range(0, len(ids), at_once):
        part = [row for row in ids[start : start + at_once] if len(row) > 1]
        if part:
            capture = subject.capture(part, sites, progress=False)
            later = capture.position > 0
            total += torch.stack([capture[site][later].double().flatten(1).norm(dim=1).sum() for site in sites])
            count += int(later.sum())
    if not count:
        raise ValueError("texts: every text has one token only, expected some with two or more.")
    return total / count


def own_likelihood(subject: Subject, prompts: Texts, written: tuple[tuple[int, ...], ...]) -> Float[Tensor, " prompt"]:
    """Nats per token that `subject`, as it is, gives to what was written after each prompt, in float64."""
    ids = subject.tokenize(prompts).ids
    whole = [(*before, *after) for before, after in zip(ids, written, strict=True)]
    found = torch.zeros(len(whole), dtype=torch.float64)
    for row, tokens, logprobs in subject.predictions(whole):
        start = len(ids[row])
        following = torch.tensor(tokens[start:], device=logprobs.device)
        found[row] = -logprobs[start - 1 : -1].gather(1, following[:, None]).double().mean()
    return found


def _compare(logits: Float[Tensor, "arm seq vocab"], ids: Tensor) -> Float[Tensor, "2 arm"]:
    """Mean KL from the first row and mean nll, one row after another: only two are ever in float64."""
    base = logits[0, :-1].float().log_softmax(-1)
    found = []
    for row in logits:
        logprobs = row[:-1].float().log_softmax(-1)
        kl = (base.double().exp() * (base - logprobs)).sum(-1).mean()
        nll = -logprobs.gather(1, ids[1:, None]).double().mean()
        found.append(torch.stack([kl, nll]))
    return torch.stack(found, 1)


def _all_logits(subject: Subject, ids: list[list[int]]) -> Float[Tensor, "row seq vocab"]:
    batch = left_pad(ids, list(range(len(ids))), pad=subject.pad_id, device=subject.device)
    options = {"attention_mask": batch.mask.long(), "position_ids": batch.positions}
    options = {name: value for name, value in options.items() if name in subject.accepts}
    return subject.model(input_ids=batch.ids, use_cache=False, **options).logits
