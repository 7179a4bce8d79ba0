"""Which cached tokens will later queries need? Scorers of the literature, as functions of what a cache layer shows.

Each takes a View and gives one number per (row, kv_head, slot); higher is kept. Scores of query heads are averaged
over the heads that share a key. Sources: at each scorer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from workbench.cache.layer import View

Scores = Float[Tensor, "batch kv_head slot"]


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


def h2o(view: View, block: int = 256) -> Scores:
    """Sum of all weights that a token ever received (Zhang et al., 2023, arXiv 2306.14048); a running score."""
    change = torch.zeros(view.keys.shape[:3], device=view.keys.device)
    for start in range(0, view.query.shape[2], block):  # O(block x slot) memory
        change += _per_kv_head(view.attention(slice(start, start + block)).sum(2), view)
    view.add_scores(change)
    return view.scores + change


def random(view: View, seed: int = 0) -> Scores:
    """No knowledge at all: the control of every scorer. The same for a row alone and in a batch."""
    positions = view.slots.positions.expand(*view.keys.shape[:3]).long()
    heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
    mixed = positions * 2654435761 + (heads + 131 * view.layer + 524287 * seed) * 40503 + 12345
    for shift in (13, 17, 5):
        mixed = (mixed ^ (mixed >> shift)) * 1274126177 % (2**31 - 1)
    return mixed.float()


SCORERS: dict[str, Callable[[View], Scores]] = {
    "streaming": streaming,
    "h2o": h2o,
    "snapkv": snapkv,
    "tova": tova,
    "key_norm": key_norm,
    "random": random,
}
RUNNING = ("h2o",)  # keep a running score beside each token


def _per_kv_head(values: Float[Tensor, "batch head slot"], view: View) -> Scores:
    return values.unflatten(1, (view.keys.shape[1], -1)).mean(2)
