"""Low-rank adapters trained beside frozen weights, until a smaller model says again what the whole one said.

out' = out + B A x, B = 0 at the start, so that training starts from the very model that is to recover.
loss: KL(whole || smaller) per token (distillation), or the nll of the text. Source: Hu et al., 2021 (LoRA); Hinton
et al., 2015 (distillation).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from workbench.discovery import is_linear
from workbench.pruned.blocks import is_dropped
from workbench.pruned.units import rows_of
from workbench.tokens import Batch, Tokens, right_pad

if TYPE_CHECKING:
    from workbench.subject import Subject

Loss = Literal["kl", "nll"]
TAUGHT_AT_ONCE = 4  # batches whose teacher is asked in one go: taking toggles off and on again costs time


@dataclass
class Training:
    """What a training leaves behind.

    update   tensors by name, of the best step on the held-out texts: "<path>.A" and "<path>.B"
    steps    one row per measurement: step, loss on the batches since the last one, kl and nll on the held-out texts
    best     the step that `update` belongs to
    stopped  why it ended
    """

    update: dict[str, Tensor] = field(default_factory=dict)
    steps: list[tuple[int, float, float, float]] = field(default_factory=list)
    best: int = 0
    stopped: str = ""


def targets(subject: Subject) -> dict[str, nn.Module]:
    """Path -> projection, of all in the blocks that run now and hold plain numbers."""
    found: dict[str, nn.Module] = {}
    blocks = subject.anatomy.blocks
    silent = [name for name, module in subject.model.named_modules() if name and is_dropped(module)]
    for name, module in subject.model.named_modules():
        inside = name.startswith(f"{blocks}.") and not any(name.startswith(f"{one}.") for one in silent)
        if inside and is_linear(module) and rows_of(module).is_floating_point() and rows_of(module).numel():
            found[name] = module
    return found


def adapted(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a projection as it is now."""
    d_out, d_in = rows_of(module).shape
    return int(d_out), int(d_in)


def parts(update: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> (A, B); ValueError where one of the two is missing or they don't fit each other."""
    paths = sorted({name.rpartition(".")[0] for name in update})
    found = {}
    for path in paths:
        a, b = update.get(f"{path}.A"), update.get(f"{path}.B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"LoRA: {path} needs A (rank, d_in) and B (d_out, rank) of one rank.")
        found[path] = a, b
    return found


def train(
    subject: Subject,
    texts: Tokens,
    held_out: Tokens,
    *,
    rank: int,
    steps: int,
    lr: float,
    batch: int,
    loss: Loss,
    every: int,
    patience: int,
    seed: int,
) -> Training:
    """Train adapters on `subject` as it is now, under its toggles; its own weights get no gradient and never change.

    Measured on the held-out texts every `every` steps; `patience` measurements in a row without a better one are
    borne, at the next it stops. An adapter whose projection doesn't run, as in a block that is carved, stays at zero.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters = Adapters.started(targets(subject), rank, generator)
    optimiser = torch.optim.AdamW(adapters.tensors(), lr=lr, weight_decay=0.0)
    training, losses = Training(), []
    with adapters, tqdm(total=steps, desc="recover", unit="step", delay=2) as bar:
        _measure(subject, adapters, held_out, batch, training, 0, losses, loss)
        for step, (one, taught) in enumerate(_taught(subject, adapters, texts, steps, batch, loss, generator), 1):
            found = _loss(subject, one, taught)
            # Of the adapters alone: backward() would leave gradients at the model's weights.
            gradients = torch.autograd.grad(found, adapters.tensors(), allow_unused=True)
            for tensor, gradient in zip(adapters.tensors(), gradients, strict=True):
                tensor.grad = gradient
            optimiser.step()
            losses.append(float(found.detach()))
            bar.update()
            if step % every == 0 or step == steps:
                _measure(subject, adapters, held_out, batch, training, step, losses, loss)
                if (step - training.best) // every > patience:
                    training.stopped = f"no better since step {training.best}"
                    return training
    training.stopped = f"all {steps} steps done"
    return training


class Adapters:
    """A and B beside every projection, in float32; they act inside `with adapters`, while `on`."""

    def __init__(self, modules: Mapping[str, nn.Module], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.modules, self.pairs, self.on = modules, pairs, True
        self._undo = ExitStack()

    @classmethod
    def started(cls, modules: Mapping[str, nn.Module], rank: int, generator: torch.Generator) -> Adapters:
        """A uniform within 1 / sqrt(d_in), as a projection is started; B zero."""
        pairs = {}
        for path, module in modules.items():
            (d_out, d_in), device = adapted(module), rows_of(module).device
            a = (torch.rand(rank, d_in, generator=generator) * 2 - 1) / d_in**0.5
            pairs[path] = a.to(device).requires_grad_(), torch.zeros(d_out, rank, device=device).requires_grad_()
        return cls(modules, pairs)

    def tensors(self) -> list[Tensor]:
        return [tensor for pair in self.pairs.values() for tensor in pair]

    def update(self) -> dict[str, Tensor]:
        """A copy, by name."""
        named = [(f"{path}.{name}", t) for path, pair in self.pairs.items() for name, t in zip("AB", pair, strict=True)]
        return {name: tensor.detach().cpu().clone() for name, tensor in named}

    def __enter__(self) -> Adapters:
        for path, module in self.modules.items():
            self._undo.callback(module.register_forward_hook(partial(self._adapt, path)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _adapt(self, path: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        a, b = self.pairs[path]
        return output + (args[0].float() @ a.T @ b.T).to(output.dtype)


def _taught(
    subject: Subject,
    adapters: Adapters,
    texts: Tokens,
    steps: int,
    batch: int,
    loss: Loss,
    generator: torch.Generator,
) -> Iterator[tuple[Batch, Tensor | None]]:
    """Batches of texts, each text once per round, with what the whole model says of them."""
    rounds: list[int] = []
    drawn = []
    for _ in range(steps):
        while len(rounds) < batch:
            rounds += torch.randperm(len(texts), generator=generator).tolist()
        drawn.append(right_pad(texts.ids, rounds[:batch], pad=subject.pad_id, device=subject.device))
        rounds = rounds[batch:]
    for start in range(0, steps, TAUGHT_AT_ONCE):
        several = drawn[start : start + TAUGHT_AT_ONCE]
        taught = _teacher(subject, adapters, several) if loss == "kl" else [None] * len(several)
        yield from zip(several, taught, strict=True)


@torch.no_grad()
def _teacher(subject: Subject, adapters: Adapters, several: Sequence[Batch]) -> list[Tensor]:
    """(batch, seq, vocab) log-probabilities without toggles and without adapters."""
    adapters.on = False
    try:
        with subject.untoggled():
            return [_log_probs(subject, one) for one in several]
    finally:
        adapters.on = True


def _log_probs(subject: Subject, one: Batch) -> Tensor:
    given: dict[str, Any] = {"input_ids": one.ids, "attention_mask": one.mask.long(), "position_ids": one.positions}
    given = {name: value for name, value in (given | {"use_cache": False}).items() if name in subject.accepts}
    return subject.model(**given).logits.float().log_softmax(-1)


def _loss(subject: Subject, one: Batch, taught: Tensor | None) -> Tensor:
    """KL to what was taught, the mean over all tokens; or the nll of the text, over those that have one before them."""
    said = _log_probs(subject, one)
    return _nll(said, one) if taught is None else _divergence(said, taught, one)


def _divergence(said: Tensor, taught: Tensor, one: Batch) -> Tensor:
    each = (taught.exp() * (taught - said)).sum(-1)  # (batch, seq)
    return each[one.mask].mean()


def _nll(said: Tensor, one: Batch) -> Tensor:
    following = one.mask[:, 1:]  # right-padded: a real token after a real one
    each = -said[:, :-1].gather(-1, one.ids[:, 1:, None])[..., 0]
    return each[following].mean()


@torch.no_grad()
def _measure(
    subject: Subject,
    adapters: Adapters,
    held_out: Tokens,
    batch: int,
    training: Training,
    step: int,
    losses: list[float],
    loss: Loss,
) -> None:
    """Add a row to the training's steps, and keep the adapters if they are the best so far."""
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(held_out), batch):
        rows = list(range(start, min(start + batch, len(held_out))))
        one = right_pad(held_out.ids, rows, pad=subject.pad_id, device=subject.device)
        taught, said = _teacher(subject, adapters, [one])[0], _log_probs(subject, one)
        tokens, predicted = int(one.mask.sum()), int(one.mask[:, 1:].sum())
        kl, nll = float(_divergence(said, taught, one)), float(_nll(said, one))
        sums += torch.tensor([tokens * kl, tokens, predicted * nll, predicted], dtype=torch.float64)
    kl, nll = float(sums[0] / sums[1]), float(sums[2] / sums[3])
    known = [row[2 if loss == "kl" else 3] for row in training.steps]
    training.steps.append((step, sum(losses) / len(losses) if losses else math.nan, kl, nll))
    losses.clear()
    if not known or (kl if loss == "kl" else nll) < min(known):
        training.best, training.update = step, adapters.update()
