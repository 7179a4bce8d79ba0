"""How many tokens each layer and head may keep, and which: pure functions of scores and counts.

pyramid: n_l falls linearly with depth around the mean n; adaptive: the best n H of all heads of a layer, each head at
least floor(alpha n). Sources: PyramidKV, Cai et al., 2024 (arXiv 2406.02069); AdaKV, Feng et al., 2024 (arXiv
2407.11550).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def budget(keep: float | int, tokens: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Tokens to keep of each row's: a share of them, at least one, or a fixed number."""
    if isinstance(keep, int):
        return tokens.clamp_max(keep)
    return (keep * tokens.double()).round().long().clamp_min(1).minimum(tokens)


def pyramid(n: int, tokens: int, n_layers: int, *, window: int = 1, beta: float = 20.0) -> list[int]:
    """Tokens of each layer: many in the first, few in the last, n on average; none beyond `tokens` or below `window`.

    The sum is n_layers * n to the token. Raises ValueError where the window alone is more than n.
    """
    if window > n:
        raise ValueError(f"pyramid: got a window of {window} tokens and a budget of {n}, expected window <= budget.")
    high = 2 * n - n / beta
    if high >= tokens - window:
        high = tokens - window
    high = max(high, n)
    low = 2 * n - high
    if low < window:  # the floor is kept, and the slope gives way
        low, high = window, 2 * n - window
    if n_layers == 1:
        return [n]
    exact = [high - layer * (high - low) / (n_layers - 1) for layer in range(n_layers)]
    sizes = [min(tokens, round(value)) for value in exact]
    for turn in range(abs(n_layers * n - sum(sizes))):  # rounding: give or take one, first layers first
        sizes[turn % n_layers] += 1 if sum(sizes) < n_layers * n else -1
    return sizes


def best(
    scores: Float[Tensor, "batch kv_head slot"],
    filled: Bool[Tensor, "batch kv_head slot"],
    forced: Bool[Tensor, "batch kv_head slot"],
    counts: Int[Tensor, "batch kv_head"],
) -> Bool[Tensor, "batch kv_head slot"]:
    """The `counts` best filled slots of each segment, forced ones first; equal scores go to the newer slot."""
    return (ranks(scores, filled, forced) < counts[..., None]) & filled


def adaptive(
    scores: Float[Tensor, "batch kv_head slot"],
    filled: Bool[Tensor, "batch kv_head slot"],
    forced: Bool[Tensor, "batch kv_head slot"],
    total: Int[Tensor, " batch"],
    alpha: float = 0.2,
) -> Bool[Tensor, "batch kv_head slot"]:
    """The `total` best slots of all heads of a row together; each head keeps its floor(alpha total / heads) best."""
    batch, heads, slots = scores.shape
    safe = ranks(scores, filled, forced) < (alpha * (total // heads).double()).floor()[:, None, None]
    together = (batch, 1, heads * slots)
    kept = best(scores.reshape(together), filled.reshape(together), (forced | safe).reshape(together), total[:, None])
    return kept.reshape(batch, heads, slots)


def ranks(scores: Tensor, filled: Tensor, forced: Tensor) -> Int[Tensor, "batch kv_head slot"]:
    """0 for the best slot of each segment: forced slots before others, empty ones last, ties to the newer."""
    value = scores.double().masked_fill(~filled, -torch.inf)
    # Two stable sorts: by score, then by being forced; newest first, so that it wins a tie.
    by_score = value.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    is_forced = (forced & filled).flip(-1).gather(-1, by_score)
    order = by_score.gather(-1, is_forced.int().sort(dim=-1, descending=True, stable=True).indices)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return rank.flip(-1)
