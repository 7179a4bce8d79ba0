"""The k largest products of each vector with the rows of a matrix, in plain PyTorch: every product is written down.

score_vi = a_i x_v . (w_i - c) + b_i in float32, c what is taken from every row, a and b one number per row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest(
    x: Tensor,
    w: Tensor,
    k: int,
    *,
    negated: bool = False,
    allowed: Tensor | None = None,
    centre: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scores float32, ids int64), each (sign, n, k): of the largest scores, and if `negated` of the largest times -1.

    Equal scores go to the smaller id; NaN counts as larger than any number, for both signs.
    """
    rows = torch.arange(len(w), device=w.device) if allowed is None else allowed.nonzero()[:, 0]
    scores = x.float() @ w[rows].to(x.dtype).float().T  # (n, row)
    if centre is not None:
        scores = scores - (x.float() @ centre.float())[:, None]
    if scale is not None:
        scores = scores * scale[rows].float()
    if bias is not None:
        scores = scores + bias[rows].float()
    best = [(sign * scores).sort(dim=1, descending=True, stable=True) for sign in (1, -1)[: 1 + negated]]
    values, order = torch.stack([one.values for one in best]), torch.stack([one.indices for one in best])
    return values[..., :k], rows[order[..., :k]]
