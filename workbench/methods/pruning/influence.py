"""How much a block does to the residual stream: between its own two ends, and at the end of the model.

BI_i = 1 - mean cos(X_i, X_{i+1}); MI_i = 1 - mean cos(X_L, X_L without block i), means over tokens; X_i enters block i
and X_L leaves the last one. BI removes the lowest at once, MI one at a time and measures again. Sources: ShortGPT, Men
et al., 2024 (arXiv 2403.03853); FuseGPT, Pan et al., 2024 (arXiv 2411.14507). Unlike their code: no padding is counted,
X_L is read before the final norm, cosines are in float64 and of matching rows alone, and MI runs only what follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from tqdm.auto import tqdm

from workbench.anatomy import add_tap
from workbench.pruned.blocks import blocks_left, bypass, drop_blocks, refusal
from workbench.site import Site
from workbench.tokens import Batch, batches, left_pad

if TYPE_CHECKING:
    from workbench.subject import Subject

Ids = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Influence:
    """How far blocks turn the stream: 1 - cos, between 0 and 2. Means over the tokens of each text.

    alone    (text, block) BI; NaN for blocks that are dropped          at_end   (text, block) MI; NaN if not measured
    """

    alone: np.ndarray
    at_end: np.ndarray


def turned(before: Float[Tensor, "*row d_model"], after: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row"]:
    """1 - cos of each pair of rows, in float64; exactly 0 for equal rows, 1 where one of the two is zero.

    |a/|a| - b/|b||^2 / 2 is the same number, without the rounding of 1 - cos near 0.
    """
    sides = [side.double() for side in (before, after)]
    norms = [side.norm(dim=-1, keepdim=True) for side in sides]
    first, second = (side / norm.where(norm != 0, 1.0) for side, norm in zip(sides, norms, strict=True))
    one_is_zero = ((norms[0] == 0) != (norms[1] == 0))[..., 0]
    return ((first - second).square().sum(-1) / 2).where(~one_is_zero, 1.0)


def influence(
    subject: Subject, ids: Ids, blocks: Iterable[int] | None = None, *, batch: int = 2048, bar: Any = None
) -> Influence:
    """BI of every block that is there, and MI of `blocks`, as the model is now; None: of all that can be left out.

    Memory is a batch of about `batch` tokens at every block. Where toggles act, whole forwards are run: an edit may
    depend on what stands before it.
    """
    there = blocks_left(subject)
    measured = [block for block in there if not refusal(subject, [block])] if blocks is None else list(blocks)
    alone, at_end = (np.full((len(ids), subject.n_layers), np.nan) for _ in range(2))
    read = _by_capture if subject.active else _by_prefix
    with torch.no_grad():
        for rows in batches([len(row) for row in ids], batch):
            read(subject, ids, rows, there, measured, (alone, at_end))
            if bar is not None:
                bar.update()
    return Influence(alone, at_end)


def macro_rounds(
    subject: Subject, ids: Ids, n: int, allowed: Iterable[int], *, batch: int = 2048, progress: bool = True
) -> tuple[list[Influence], list[int]]:
    """Measure, drop the block with the lowest MI, and again, `n` times: what each round found and which block went.

    Fewer rounds where no allowed block can be dropped any more. The model is left as it was.
    """
    allowed, rounds, gone = set(allowed), list[Influence](), list[int]()
    n_batches = len(list(batches([len(row) for row in ids], batch)))
    bar = tqdm(total=n * n_batches, desc="macro influence", unit="batch", delay=2, disable=not progress)
    with ExitStack() as undo, bar:
        for _ in range(n):
            left = [block for block in blocks_left(subject) if block in allowed and not refusal(subject, [block])]
            if not left:
                break
            rounds.append(influence(subject, ids, left, batch=batch, bar=bar))
            means = token_mean(rounds[-1].at_end, ids)
            gone.append(left[int(np.argmin(means[left]))])
            drop_blocks(subject, gone[-1:], undo)
    return rounds, gone


def droppable(subject: Subject, order: Iterable[int], n: int) -> list[int]:
    """The first `n` blocks of `order` that can be dropped one after another; what the cache needs is passed over."""
    gone: list[int] = []
    with ExitStack() as undo:
        for block in order:
            if len(gone) < n and not refusal(subject, [block]):
                drop_blocks(subject, [block], undo)
                gone.append(block)
    return gone


def losses(subject: Subject, ids: Ids, order: Sequence[int]) -> Float[np.ndarray, "count text"]:
    """Nats per token of each text with 0, 1, ... of these blocks dropped, one after another."""
    rows = [subject.nll(ids).numpy()]
    with ExitStack() as undo:
        for block in order:
            drop_blocks(subject, [block], undo)
            rows.append(subject.nll(ids).numpy())
    return np.stack(rows)


def token_mean(values: np.ndarray, ids: Ids) -> np.ndarray:
    """Mean over tokens of what is given as means per text, (text, ...)."""
    return np.average(values, axis=0, weights=[len(row) for row in ids])


def run_blocks(
    subject: Subject,
    batch: Batch,
    states: Float[Tensor, "batch seq d_model"],
    first: int,
    last: int,
    weights: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "batch seq d_model"]:
    """What leaves block `last` when `states` enter block `first`; no other block runs.

    weights   tensors by name that act instead of the model's parameters; gradients flow to them and to the states
    """
    found: list[Tensor] = []
    with ExitStack() as undo:
        bypass(subject, [n for n in range(subject.n_layers) if not first <= n <= last], undo)
        add_tap(subject.model, subject.anatomy, Site(first, "resid_in"), lambda _: states, undo)
        add_tap(subject.model, subject.anatomy, Site(last, "resid_out"), found.append, undo)
        if weights:
            functional_call(subject.model, dict(weights), (), arguments(subject, batch))
        else:
            subject.model(**arguments(subject, batch))
    return found[0]


def arguments(subject: Subject, batch: Batch) -> dict[str, Any]:
    """What the model's forward is called with to read a batch, as far as it takes it; one logit is enough."""
    given = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "position_ids": batch.positions}
    given |= {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in given.items() if name in subject.accepts}


def entering(subject: Subject, batch: Batch, blocks: Iterable[int], last: int) -> tuple[dict[int, Tensor], Tensor]:
    """What enters each of `blocks` (batch, seq, d_model), and what leaves block `last`; nothing runs after it."""
    found: dict[Any, Tensor] = {}

    def keep(name: Any, value: Tensor) -> None:
        found[name] = value.clone()  # the model may reuse the memory of what it gave

    with ExitStack() as undo:
        bypass(subject, range(last + 1, subject.n_layers), undo)
        for block in blocks:
            site = Site(block, "resid_in")
            add_tap(subject.model, subject.anatomy, site, lambda value, name=block: keep(name, value), undo)
        add_tap(subject.model, subject.anatomy, Site(last, "resid_out"), lambda value: keep("out", value), undo)
        subject.model(**arguments(subject, batch))
    return found, found.pop("out")


def _by_prefix(
    subject: Subject,
    ids: Ids,
    rows: list[int],
    there: list[int],
    measured: list[int],
    into: tuple[np.ndarray, np.ndarray],
) -> None:
    """Without a block, what came before it is the same: run what follows it from where it began."""
    batch = left_pad(ids, rows, pad=subject.pad_id, device=subject.device)
    states, end = entering(subject, batch, there, there[-1])
    following = dict(itertools.pairwise(there))  # the last one has none
    real = batch.mask.to(end.device)

    def mean(before: Tensor, now: Tensor) -> np.ndarray:
        return (turned(before, now).where(real, 0.0).sum(1) / real.sum(1)).cpu().numpy()

    for block in there:
        into[0][rows, block] = mean(states[block], states[following[block]] if block in following else end)
    for block in measured:
        without = states[block]
        if block in following:
            without = run_blocks(subject, batch, without, following[block], there[-1])
        into[1][rows, block] = mean(end, without)


def _by_capture(
    subject: Subject,
    ids: Ids,
    rows: list[int],
    there: list[int],
    measured: list[int],
    into: tuple[np.ndarray, np.ndarray],
) -> None:
    """The slow obvious way: read everything once more without each block."""
    texts, end = [ids[row] for row in rows], Site(subject.n_layers - 1, "resid_out")
    ends = [(Site(block, "resid_in"), Site(block, "resid_out")) for block in there]
    read = subject.capture(texts, [*(site for pair in ends for site in pair), end], progress=False)

    def mean(before: Tensor, now: Tensor) -> np.ndarray:
        total = np.bincount(read.text.numpy(), weights=turned(before, now).numpy(), minlength=len(rows))
        return total / np.bincount(read.text.numpy(), minlength=len(rows))

    for block, (entry, leaving) in zip(there, ends, strict=True):
        into[0][rows, block] = mean(read[entry], read[leaving])
    for block in measured:
        with ExitStack() as undo:
            drop_blocks(subject, [block], undo)
            into[1][rows, block] = mean(read[end], subject.capture(texts, [end], progress=False)[end])
