"""Which cached tokens will later queries need? Scorers of the literature, as functions of what a cache layer shows.

Each takes a View and gives one number per (row, kv_head, slot); higher is kept. Scores of query heads are averaged
over the heads that share a key. Sources: at each scorer. Those with settings are also values: `SnapKV(window=16)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool1d

from workbench.cache.layer import View
from workbench.methods.cache.retaining import RetainingHeads

Scores = Float[Tensor, "batch kv_head slot"]
BLOCK = 256  # queries whose weights are held at once: O(block x slot) memory
NEGLIGIBLE = 1e-6  # a decayed share below this is not worth a row of weights


def streaming(view: View) -> Scores:
    """The newest tokens; with sinks forced, this is StreamingLLM (Xiao et al., 2023, arXiv 2309.17453)."""
    return view.slots.positions.expand(*view.keys.shape[:3]).float()


def key_norm(view: View) -> Scores:
    """Short keys draw attention (Devoto et al., 2024, arXiv 2406.11430)."""
    return -view.keys.float().norm(dim=-1)


def tova(view: View) -> Scores:
    """Weight from the last query, averaged over all heads: one set for all (Oren et al., 2024, arXiv 2401.06104)."""
    return view.attention(1).sum(2).mean(1)[:, None].expand(*view.keys.shape[:3])


def snapkv(view: View, window: int = 32, kernel: int = 5) -> Scores:
    """Mean weight from the last queries, smoothed over neighbours (Li et al., 2024, arXiv 2404.14469)."""
    weights = view.attention(window)
    total = _per_kv_head(weights.sum(2), view)  # a mean would not change the order
    empty = (view.slots.positions < 0).expand(total.shape)
    order = empty.int().sort(dim=-1, stable=True).indices  # neighbours in the text, whatever slots lie between them
    smooth = avg_pool1d(total.gather(-1, order), kernel, stride=1, padding=kernel // 2)
    return torch.empty_like(total).scatter_(-1, order, smooth)


def h2o(view: View) -> Scores:
    """Sum of all weights that a token ever received (Zhang et al., 2023, arXiv 2306.14048); a running score."""
    return _received(view, decay=1.0)


def random(view: View, seed: int = 0) -> Scores:
    """No knowledge at all: the control of every scorer. The same for a row alone and in a batch."""
    positions = view.slots.positions.expand(*view.keys.shape[:3]).long()
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    mixed = positions * 2654435761 + (heads + 131 * view.layer + 524287 * seed) * 40503 + 12345
    for shift in (13, 17, 5):
        mixed = (mixed ^ (mixed >> shift)) * 1274126177 % (2**31 - 1)
    return mixed.float()


@dataclass(frozen=True)
class SnapKV:
    """`snapkv` of the last `window` queries, smoothed over `kernel` neighbours (odd; 1: not at all)."""

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"SnapKV: got {self}, expected a window of at least 1 and an odd kernel.")

    def __call__(self, view: View) -> Scores:
        return snapkv(view, self.window, self.kernel)


@dataclass(frozen=True)
class Random:
    """`random` of another seed."""

    seed: int = 0

    def __call__(self, view: View) -> Scores:
        return random(view, self.seed)


@dataclass(frozen=True)
class ExpectedAttention:
    """Weight expected from queries that are drawn like those so far, times the length of the value.

    S_j = softmax_j(s k_j . R mu + s^2 k_j^T R C R^T k_j / 2): E[exp(s q . k)] of a normal q, where mu and C are mean
    and covariance of the queries before their rotation, R the mean rotation to the next places, s the scaling.
    Source: kvpress 0.5 (NVIDIA). Positions below `sinks` count in no statistic and in no softmax: they draw weight
    whatever is asked, so they get the best score of their segment.

    future   places that R is the mean of        eps   added to S before it meets the length of the value
    """

    future: int = 512
    sinks: int = 4
    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.future < 1 or self.sinks < 0 or self.eps < 0:
            raise ValueError(f"ExpectedAttention: got {self}, expected future >= 1, sinks >= 0 and eps >= 0.")

    def observe(self, view: View) -> None:
        """Add the queries of this forward to the statistics of their rows: count, mean, sum of squared deviations."""
        step, query = view.step, view.query.float()
        positions, real = step.positions.to(query.device), step.real.to(query.device)
        if view.rotation is not None:
            query = view.rotation.turn(query, positions, back=True)
        weight = (real & (positions >= self.sinks)).float()[:, None, :, None]  # (batch, 1, seq, 1)
        came = weight.sum(2)  # (batch, 1, 1)
        mean = (query * weight).sum(2) / came.clamp_min(1)  # (batch, head, d_head)
        apart = (query - mean[:, :, None]) * weight
        spread = apart.transpose(2, 3) @ apart  # (batch, head, d_head, d_head)
        if "query_mean" in view.state:  # two samples become one (Chan et al., 1979): nothing cancels in float32
            count, old = view.state["query_count"], view.state["query_mean"]
            share, moved = came / (count + came).clamp_min(1), mean - old
            both = (moved[..., None] * moved[:, :, None]) * (count * share)[..., None]
            came, mean, spread = count + came, old + moved * share, view.state["query_spread"] + spread + both
        view.state.update(query_count=came, query_mean=mean, query_spread=spread)

    def forget(self, view: View) -> None:
        """Give the memory of the statistics back: (d_head + 1) d_head numbers per query head."""
        for name in ("query_count", "query_mean", "query_spread"):
            view.state.pop(name, None)

    def __call__(self, view: View) -> Scores:
        positions = view.slots.positions.expand(view.keys.shape[:3])
        logits = self.logits(view).masked_fill((positions < self.sinks)[:, :, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0).mean(2)
        scores = (weights + self.eps) * view.values.float().norm(dim=-1)
        sink = (positions >= 0) & (positions < self.sinks)
        return torch.where(sink, scores.amax(-1, keepdim=True), scores)

    def logits(self, view: View) -> Float[Tensor, "batch kv_head group slot"]:
        """log E[exp(s q . k)] of each key under each query head that reads it."""
        keys = view.keys.float()
        if view.rotation is not None:
            newest = view.slots.positions.amax((1, 2))
            places = newest[:, None] + torch.arange(1, self.future + 1, device=keys.device)
            keys = view.rotation.mean_back(keys, places)
        state, width, groups = view.state, keys.shape[-1], view.query.shape[1] // keys.shape[1]
        scale = width**-0.5 if view.scaling is None else view.scaling
        mean = state["query_mean"].unflatten(1, (-1, groups))
        covariance = (state["query_spread"] / state["query_count"].clamp_min(1)[..., None]).unflatten(1, (-1, groups))
        rows = []
        for group in range(groups):  # one query head at a time: O(batch x kv_head x slot x d_head) memory
            curved = ((keys @ covariance[:, :, group]) * keys).sum(-1)
            rows.append(scale * (keys @ mean[:, :, group, :, None])[..., 0] + scale**2 / 2 * curved)
        return torch.stack(rows, 2)


@dataclass(frozen=True)
class Alisa:
    """Half of the budget to the newest tokens, half to those that lately drew most weight; a running score.

    S_t = decay S_{t-1} + the weights of query t over all that is held. Source: Zhao et al., 2024 (arXiv 2403.17312),
    where S sums the last few steps: a decaying sum needs one number per token.

    mode     evict: what is dropped is gone; mask: all stays, each decoding step overlooks the others, so tokens return
    decay    of the score at each query; 1 makes it that of h2o        local   share of the budget for the newest
    """

    mode: Literal["evict", "mask"] = "evict"
    decay: float = 0.8
    local: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in ("evict", "mask") or not 0 < self.decay <= 1 or not 0 <= self.local <= 1:
            raise ValueError(f"Alisa: got {self}, expected mode evict or mask, decay in (0, 1] and local in [0, 1].")

    def __call__(self, view: View) -> Scores:
        return _received(view, self.decay)

    def newest(self, counts: Int[Tensor, " batch"], sinks: int) -> Int[Tensor, " batch"]:
        """Of so many tokens to keep, those that go to the newest; sinks have theirs before."""
        return (counts * self.local).floor().long().minimum(counts - sinks)


Scorer = Callable[[View], Scores]
SCORERS: dict[str, Scorer] = {
    "streaming": streaming,
    "h2o": h2o,
    "snapkv": snapkv,
    "tova": tova,
    "key_norm": key_norm,
    "expected_attention": ExpectedAttention(),
    "alisa": Alisa(),
    "random": random,
}
WITH_SETTINGS = (SnapKV, ExpectedAttention, Alisa, RetainingHeads, Random)


def is_running(scorer: Scorer) -> bool:
    """Whether a scorer keeps a running score beside each token."""
    return scorer is h2o or isinstance(scorer, Alisa | RetainingHeads)


def _received(view: View, decay: float) -> Scores:
    """The running scores after this forward: each query first lets them decay, then adds its weights."""
    step, device = view.step, view.query.device
    real = step.real.to(device)
    age = real.flip(1).cumsum(1).flip(1) - 1  # real queries of the row that come after each
    share = torch.where(real, decay ** age.double(), 0.0)  # (batch, seq)
    begin = int((share > NEGLIGIBLE).any(0).int().argmax()) if len(share[0]) > 1 else 0  # skips queries of long ago
    change = view.scores * (decay ** real.sum(1).double() - 1)[:, None, None].float()
    for start in range(begin, share.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        weights = view.attention(part) * share[:, None, part, None].float()
        change += _per_kv_head(weights.sum(2), view)
    scores = view.scores + change  # before the next line, which may change what view.scores looks at
    view.add_scores(change)
    return scores


def _per_kv_head(values: Float[Tensor, "batch head slot"], view: View) -> Scores:
    return values.unflatten(1, (view.keys.shape[1], -1)).mean(2)
