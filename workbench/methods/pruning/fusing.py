"""Fuse a block into its neighbours: its weights are added to theirs, and a short training tells how much of each.

W'_j = W_j + B A + (P Q) o W_i for every matrix of every neighbour j of the block i that leaves, trained until the group
without i gives what it gave with i, then multiplied out. Source: FuseGPT, Pan et al., 2024 (arXiv 2411.14507). Unlike
its code: the loss compares channels, not texts of a batch; biases are fused too; a group may begin at block 0; texts
are held out, and the best epoch stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.methods.pruning.fused import Fusion
from workbench.methods.pruning.grafts import Donor, Graft, make_grafts, share_of_donor
from workbench.methods.pruning.influence import Ids, entering, macro_rounds, run_blocks, token_mean
from workbench.pruned.blocks import block_of, blocks_left, bypass, drop_blocks
from workbench.swap import swap_weight
from workbench.tokens import Batch, left_pad

if TYPE_CHECKING:
    from workbench.subject import Subject

BETAS = (0.9, 0.95)  # of the paper's Adam
HELD_OUT = 8  # one text in so many


@dataclass(frozen=True)
class Fusing:
    """How blocks are fused; the defaults are the paper's, and its 20 epochs of 1,024 texts of 2,048 tokens suit 7B.

    group       blocks that are trained together, the leaving one among them
    rank        of P Q and of B A          epochs      at most so many            batch   texts per step
    rate        of the coefficients P Q    base_rate   of B A and of the norms; both fall to 0 by a cosine
    loss        mse: squared error of what leaves the group over its variance; kl_last: KL of softmaxes over channels
    patience    epochs without progress on the held-out texts before it stops
    donor       what is added: the leaving block; shuffled: its numbers in random places; none: nothing. Two controls
    seed        of the first weights, of the order of texts and of which are held out
    """

    group: int = 8
    rank: int = 128
    epochs: int = 20
    batch: int = 8
    rate: float = 1e-3
    base_rate: float = 9.65e-6
    loss: Literal["mse", "kl_last"] = "mse"
    patience: int = 3
    donor: Donor = "block"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 2 or min(self.rank, self.epochs, self.batch, self.patience) < 1:
            raise ValueError(f"FuseBlocks: got {self}, expected a group of at least 2 and counts of at least 1.")
        if min(self.rate, self.base_rate) < 0 or not math.isfinite(self.rate + self.base_rate):
            raise ValueError(f"FuseBlocks: got rates {self.rate} and {self.base_rate}, expected numbers from 0.")
        if self.loss not in ("mse", "kl_last") or self.donor not in ("block", "shuffled", "none"):
            raise ValueError(
                f"FuseBlocks: got loss={self.loss!r} and donor={self.donor!r}, expected mse or kl_last, and block, "
                "shuffled or none."
            )


def fuse(
    subject: Subject, ids: Ids, n: int, fusing: Fusing, *, progress: bool = True
) -> tuple[dict[str, Tensor], list[Fusion]]:
    """Fuse `n` blocks one after another, each time the one with the lowest macro influence.

    Returns the new tensors, named "block.parameter", and what each fusion did. The subject stays as it is; memory is
    that of one batch and of the group's tensors.
    """
    dice = torch.Generator().manual_seed(fusing.seed)
    order = torch.randperm(len(ids), generator=dice).tolist()
    cut = max(1, len(ids) // HELD_OUT)
    held_out, texts = ([ids[row] for row in some] for some in (order[:cut], order[cut:]))
    dense: dict[str, Tensor] = {}
    found: list[Fusion] = []
    for _ in range(n):
        with ExitStack() as undo:
            install_fused(subject, dense, [one.block for one in found], undo)
            new, fusion = _fuse_one(subject, texts, held_out, fusing, dice, progress)
        dense |= new
        with ExitStack() as undo:
            install_fused(subject, dense, [one.block for one in (*found, fusion)], undo)
            found.append(fusion.after(_nll(subject, held_out)))
    return dense, found


def install_fused(subject: Subject, dense: Mapping[str, Tensor], blocks: Sequence[int], undo: ExitStack) -> None:
    """Let these tensors act, named "block.parameter", and leave out the fused blocks."""
    for name, tensor in dense.items():
        layer, _, inside = name.partition(".")
        path, _, parameter = inside.rpartition(".")
        module = block_of(subject, int(layer)).get_submodule(path)
        old = module._parameters.get(parameter)
        if old is None or old.shape != tensor.shape:
            got = "missing" if old is None else tuple(old.shape)
            raise ValueError(
                f"FuseBlocks: {inside} of block {layer} is {got}, expected {tuple(tensor.shape)}. Whole blocks are "
                "fused: prune afterwards, FuseBlocks | Prune."
            )
        swap_weight(module, parameter, tensor.to(old.device, old.dtype), undo)
    drop_blocks(subject, blocks, undo)


def neighbours(left: Sequence[int], block: int, size: int) -> list[int]:
    """At most `size` of the blocks that are left, around `block` and the one before it, moved in at the ends."""
    start = left.index(block) - size // 2
    return list(left[max(0, min(start, len(left) - size)) :][:size])


# One fusion


def _fuse_one(
    subject: Subject, texts: Ids, held_out: Ids, fusing: Fusing, dice: torch.Generator, progress: bool
) -> tuple[dict[str, Tensor], Fusion]:
    left = blocks_left(subject)
    rounds, gone = macro_rounds(subject, texts, 1, left, progress=progress)
    if not gone:
        raise ValueError(f"FuseBlocks: no further block of {subject.name} can leave, {len(left)} are left.")
    block, group = gone[0], neighbours(left, gone[0], fusing.group)
    grafts = make_grafts(subject, group, block, rank=fusing.rank, donor=fusing.donor, dice=dice)
    teaching = Teaching(subject, group, block, fusing)
    curve = train(teaching, grafts, texts, held_out, dice, progress)
    before = _nll(subject, held_out)
    with ExitStack() as undo:
        drop_blocks(subject, [block], undo)
        dropped = _nll(subject, held_out)
    new = {name: graft.value().detach() for name, graft in grafts.items()}
    shares = tuple((other, share_of_donor(grafts, other)) for other in group if other != block)
    influence = float(token_mean(rounds[0].at_end, texts)[block])
    return new, Fusion(block, tuple(group), influence, tuple(curve), shares, (before, dropped))


def _nll(subject: Subject, ids: Ids) -> float:
    """Nats per token that is predicted: the first of a text is not."""
    return float(np.average(subject.nll(ids).numpy(), weights=[len(row) - 1 for row in ids]))


# Training


@dataclass(eq=False)
class Teaching:
    """What a group of blocks gives with all of them, and how far it is from that without the leaving one.

    scale   what losses are measured in
    """

    subject: Subject
    group: Sequence[int]
    block: int
    fusing: Fusing
    scale: float = 1.0

    def batches(self, ids: Ids, rows: Sequence[int]) -> Iterator[Batch]:
        size = self.fusing.batch
        for start in range(0, len(rows), size):
            chosen = list(rows[start : start + size])
            yield left_pad(ids, chosen, pad=self.subject.pad_id, device=self.subject.device)

    def taught(self, batch: Batch) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
        """What enters the whole group and what leaves it."""
        first, last = self.group[0], self.group[-1]
        with torch.no_grad():
            found, out = entering(self.subject, batch, [first], last)
        return found[first], out

    def loss(self, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        """How far the group is without its block, under these tensors, named "block.parameter"."""
        entry, target = self.taught(batch)
        named = {f"{self.subject.anatomy.blocks}.{name}": tensor for name, tensor in weights.items()}
        with ExitStack() as undo:
            bypass(self.subject, [self.block], undo)
            out = run_blocks(self.subject, batch, entry, self.group[0], self.group[-1], named)
        return distance(out, target, batch.mask.to(out.device), self.fusing.loss) / self.scale

    def variance(self, ids: Ids) -> float:
        """Of what leaves the whole group: over tokens, mean over channels; 1 where nothing varies."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in self.batches(ids, range(len(ids))):
            out = self.taught(batch)[1]
            rows = out[batch.mask.to(out.device)].double().cpu()
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
        return float((squares / count - (total / count).square()).mean()) or 1.0


def distance(
    out: Float[Tensor, "batch seq d_model"],
    target: Float[Tensor, "batch seq d_model"],
    real: Bool[Tensor, "batch seq"],
    loss: str,
) -> Tensor:
    """Mean over real tokens of the squared error per channel, or of KL(softmax(target) || softmax(out))."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    said, wanted = out[real].to(dtype), target[real].to(dtype)  # (token, d_model)
    if loss == "mse":
        return (said - wanted).square().mean()
    wanted = wanted.log_softmax(-1)
    return (wanted.exp() * (wanted - said.log_softmax(-1))).sum(-1).mean()


def train(
    teaching: Teaching, grafts: Mapping[str, Graft], texts: Ids, held_out: Ids, dice: torch.Generator, progress: bool
) -> list[float]:
    """Train the grafts, which keep the best epoch; the loss on held-out texts before training and after each epoch."""
    fusing = teaching.fusing
    teaching.scale = teaching.variance(held_out) if fusing.loss == "mse" else 1.0
    slow = [tensor for graft in grafts.values() for tensor in graft.base]
    fast = [tensor for graft in grafts.values() for tensor in graft.coefficients]
    rates = [{"params": part, "lr": rate} for part, rate in ((slow, fusing.base_rate), (fast, fusing.rate)) if part]
    optimizer = torch.optim.Adam(rates, betas=BETAS)
    steps = fusing.epochs * -(-len(texts) // fusing.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    curve, best, stale = [_held_out_loss(teaching, grafts, held_out)], _copied(slow + fast), 0
    with tqdm(total=steps, desc=f"fusing block {teaching.block}", disable=not progress, delay=2) as bar:
        for _ in range(fusing.epochs):
            order = torch.randperm(len(texts), generator=dice).tolist()
            for batch in teaching.batches(texts, order):
                _learn(teaching, grafts, batch, slow + fast)
                optimizer.step()
                schedule.step()
                bar.update()
            curve.append(_held_out_loss(teaching, grafts, held_out))
            bar.set_postfix(held_out_loss=f"{curve[-1]:.3g}")
            stale = 0 if curve[-1] < min(curve[:-1]) else stale + 1
            if not stale:
                best = _copied(slow + fast)
            if stale == fusing.patience:
                break
    with torch.no_grad():
        for tensor, kept in zip(slow + fast, best, strict=True):
            tensor.copy_(kept)
    return curve


def _learn(teaching: Teaching, grafts: Mapping[str, Graft], batch: Batch, learning: list[Tensor]) -> None:
    """Gradients of the learning tensors alone: the model's own parameters get none."""
    with torch.enable_grad():
        loss = teaching.loss(batch, {name: graft.value() for name, graft in grafts.items()})
        gradients = torch.autograd.grad(loss, learning, allow_unused=True)  # an expert may meet no token
    for tensor, gradient in zip(learning, gradients, strict=True):
        tensor.grad = gradient


@torch.no_grad()
def _held_out_loss(teaching: Teaching, grafts: Mapping[str, Graft], ids: Ids) -> float:
    weights = {name: graft.value() for name, graft in grafts.items()}
    losses, counts = [], []
    for batch in teaching.batches(ids, range(len(ids))):
        losses.append(float(teaching.loss(batch, weights)))
        counts.append(int(batch.mask.sum()))
    loss = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    if not math.isfinite(loss):
        raise ValueError(f"FuseBlocks: the held-out loss became {loss}. Train with rates below {teaching.fusing.rate}.")
    return loss


def _copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
