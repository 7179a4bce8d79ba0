"""The tokens that each vector writes most, and takes back most: products with a vocabulary that are never written down.

Serves read-outs of neurons, features and residual vectors: thousands of vectors, a hundred thousand rows, few answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels.dispatch import choose
from workbench_kernels.neuron_topk import reference

__all__ = ["MOST", "neuron_topk"]

MOST = 64  # answers per vector: their list lives in registers
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def neuron_topk(
    x: Tensor,
    w: Tensor,
    k: int,
    *,
    negated: bool = False,
    allowed: Tensor | None = None,
    centre: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(scores float32, ids int64) (n, k) of the rows with the largest scale (x . (w - centre)) + bias, best first.

    x, w      (n, d) and (vocab, d), of any strides, float32, float16 or bfloat16; rows of w are taken in x's type, and
              sums are float32
    negated   also those of the largest score times -1, from the same products: both answers are then (2, n, k)
    allowed   bool (vocab,): rows that may be answers        centre   (d,) what is taken from every row
    scale     (vocab,) factor of each row's score            bias     (vocab,) added to it
    impl      "auto", "triton" or "reference": see `dispatch.choose`

    Equal scores go to the smaller id. NaN is never hidden: it counts as larger than any number, for both signs. Sums
    of a product have another order in every implementation, so scores that differ by rounding alone may swap. Raises
    ValueError for shapes and dtypes that don't fit, and for k beyond the allowed rows or 64.
    """
    _check(x, w)
    for name, one, size in (("allowed", allowed, len(w)), ("centre", centre, w.shape[1]), ("scale", scale, len(w)),
                            ("bias", bias, len(w))):  # fmt: skip
        if one is not None and (one.shape != (size,) or (one.dtype == torch.bool) != (name == "allowed")):
            wanted = "bool" if name == "allowed" else "numbers"
            raise ValueError(f"neuron_topk: got {name} {tuple(one.shape)} {one.dtype}, expected {wanted} ({size},).")
    chosen = choose(impl, x, w, allowed, centre, scale, bias)
    known = len(w) if allowed is None else int(allowed.sum())
    if not 1 <= k <= min(known, MOST):
        raise ValueError(f"neuron_topk: got k={k}, expected 1 to {min(known, MOST)}: {known} rows, at most {MOST}.")
    largest = reference.largest
    if chosen == "triton" and len(x):
        from workbench_kernels.neuron_topk import kernel

        largest = kernel.largest
    scores, ids = largest(x, w, k, negated=negated, allowed=allowed, centre=centre, scale=scale, bias=bias)
    return (scores, ids) if negated else (scores[0], ids[0])


def _check(x: Tensor, w: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or not x.shape[1]:
        raise ValueError(f"neuron_topk: got {tuple(x.shape)} and {tuple(w.shape)}, expected (n, d) and (vocab, d).")
    for tensor in (x, w):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"neuron_topk: got {tensor.dtype}, expected float32, float16 or bfloat16.")
