"""How retaining heads learn which cached tokens an answer will need, on texts whose answer is known.

loss = smooth L1(s, label) / layers + c (s_t - s_{t+1})^2, means over tokens, summed over layers.
Source: Locret, Huang et al., 2024 (arXiv 2410.01805), section 3.2. The model stays frozen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss, smooth_l1_loss
from tqdm.auto import tqdm

from workbench.methods.cache.retaining import RetainingHeads, network
from workbench.methods.cache.retaining_labels import Pair, Read, shown_texts

if TYPE_CHECKING:
    from workbench.subject import Subject

BETAS, CLIP = (0.9, 0.95), 0.5  # of the paper: AdamW's, and the largest gradient of a single weight
PER_WIDTH = 6  # inputs per hidden unit: the paper's 6144 inputs and 1024 units
LOOK = 10  # steps between two looks at the held-out texts
HELD_OUT = 10  # one text in so many


@dataclass(frozen=True)
class Training:
    """How `fit` trains; the defaults suit small models. The paper: 3000 steps of one text, rate 5e-4, warm-up 2/3.

    steps        at most so many; fewer where the loss on held-out texts no longer falls
    batch        texts per step            rate        of AdamW: up from 0 over `warm_up` of the steps, then down to 0
    smoothness   c in the loss             patience    looks at the held-out texts without progress before it stops
    seed         of first weights, and of the order of the texts
    """

    steps: int = 60
    batch: int = 4
    rate: float = 3e-3
    warm_up: float = 0.1
    smoothness: float = 0.0025
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.patience) < 1 or self.rate <= 0 or not 0 <= self.warm_up < 1:
            raise ValueError(
                f"Training: got {self}, expected steps, batch and patience of at least 1, a rate above 0, "
                "and warm_up in [0, 1)."
            )


def train_retaining_heads(
    subject: Subject,
    data: Sequence[Pair],
    *,
    training: Training | None = None,
    progress: bool = True,
) -> RetainingHeads:
    """Heads that score high what the answers of `data`, pairs (prompt, answer), attend to in their prompts.

    One text in ten is held out, and its loss decides when to stop. Memory is that of one text's forward, and of one
    layer's gradients. Reads `subject` as it is; raises ValueError under a toggle that selects cached tokens.
    """
    if len(data) < 2:
        raise ValueError(f"train_retaining_heads: got {len(data)} texts, expected at least two: one is held out.")
    with shown_texts(subject, data) as read:
        return fit(read, len(data), training or Training(), model=subject.fingerprint, progress=progress)


def top_recall(subject: Subject, heads: RetainingHeads, data: Sequence[Pair], k: int) -> dict[int, float]:
    """Layer -> share of the k prompt tokens with the highest labels that are among the k with the highest scores.

    The mean over key/value heads and texts; chance is k / n_tokens.
    """
    if not data or k < 1:
        raise ValueError(f"top_recall: got {len(data)} texts and k={k}, expected at least one text and k >= 1.")
    found: dict[int, list[float]] = {}

    def see(layer: int, x: Tensor, labels: Tensor) -> None:
        found.setdefault(layer, []).append(shared_top(heads.score(layer, x), labels, k))

    with shown_texts(subject, data) as read:
        for number in range(len(data)):
            read(number, see)
    return {layer: sum(shares) / len(shares) for layer, shares in found.items()}


def shared_top(scores: Float[Tensor, "token kv_head"], labels: Float[Tensor, "token kv_head"], k: int) -> float:
    """Share of the k highest labels of a head that are among its k highest scores, on average over heads."""
    wanted, given = (torch.zeros_like(x, dtype=torch.bool) for x in (labels, scores))
    wanted.scatter_(0, labels.topk(min(k, len(labels)), 0).indices, True)
    given.scatter_(0, scores.topk(min(k, len(scores)), 0).indices, True)
    return float((wanted & given).sum() / wanted.sum())


def fit(
    read: Read, n_texts: int, training: Training, *, model: str | None = None, progress: bool = True
) -> RetainingHeads:
    """Heads trained on `n_texts` texts, of which `read` shows inputs and labels; the best on the held-out ones.

    Deterministic on one device with one number of threads.
    """
    dice = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(n_texts, generator=dice).tolist()
    held_out, texts = order[: max(1, n_texts // HELD_OUT)], order[max(1, n_texts // HELD_OUT) :]
    weights = _first_weights(read, texts[0], dice)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=training.rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_share_of_rate, training))
    lowest, best, since = math.inf, weights.heads(model), 0
    with tqdm(total=training.steps, desc="retaining heads", disable=not progress) as bar:
        for step in range(training.steps):
            for number in range(step * training.batch, (step + 1) * training.batch):
                read(texts[number % len(texts)], functools.partial(_learn, weights, training))
            nn.utils.clip_grad_value_(weights.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            if (step + 1) % LOOK and step + 1 < training.steps:
                continue
            loss = _loss_on(read, held_out, weights, training)
            bar.set_postfix(held_out_loss=f"{loss:.2e}")
            since = 0 if loss < lowest else since + 1
            if loss < lowest:
                lowest, best = loss, weights.heads(model)
            if since == training.patience:
                break
    return best


class Weights(nn.Module):
    """The heads while they learn."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.ParameterDict(), nn.ParameterDict()

    def add(self, layer: int, n_inputs: int, kv_heads: int, dice: torch.Generator, device: torch.device) -> None:
        """Weights of one layer, uniform within 1/sqrt(number of inputs)."""
        width = max(8, n_inputs // PER_WIDTH)
        for part, shape in ((self.fc1, (width, n_inputs)), (self.fc2, (kv_heads, width))):
            drawn = (torch.rand(shape, generator=dice) * 2 - 1) * shape[1] ** -0.5
            part[str(layer)] = nn.Parameter(drawn.to(device))

    def forward(self, layer: int, x: Float[Tensor, "token inputs"]) -> Float[Tensor, "token kv_head"]:
        return network(x, self.fc1[str(layer)], self.fc2[str(layer)])

    def heads(self, model: str | None) -> RetainingHeads:
        """A copy of the weights as they are."""
        parts = ({int(n): w.detach().clone() for n, w in part.items()} for part in (self.fc1, self.fc2))
        return RetainingHeads(*parts, model=model)


def _first_weights(read: Read, number: int, dice: torch.Generator) -> Weights:
    """Untrained weights, of the sizes that a text shows."""
    weights = Weights()
    read(number, lambda layer, x, labels: weights.add(layer, x.shape[1], labels.shape[1], dice, x.device))
    if not len(weights.fc1):
        raise ValueError("train_retaining_heads: this model has no layer of full attention, expected one.")
    return weights


def _loss(weights: Weights, training: Training, layer: int, x: Tensor, labels: Tensor) -> Tensor:
    scores = weights(layer, x)
    rough = mse_loss(scores[1:], scores[:-1]) if len(scores) > 1 else 0.0
    return smooth_l1_loss(scores, labels) / len(weights.fc1) + training.smoothness * rough


def _learn(weights: Weights, training: Training, layer: int, x: Tensor, labels: Tensor) -> None:
    """Add one layer's gradients at once, so that no other layer's inputs wait in memory."""
    with torch.enable_grad():
        (_loss(weights, training, layer, x, labels) / training.batch).backward()


def _loss_on(read: Read, numbers: Sequence[int], weights: Weights, training: Training) -> float:
    losses: list[float] = []
    with torch.no_grad():
        for number in numbers:
            read(number, lambda *seen: losses.append(float(_loss(weights, training, *seen))))
    loss = sum(losses) / len(numbers)
    if not math.isfinite(loss):
        raise ValueError(f"fit: the held-out loss became {loss}. Train with a rate below {training.rate}.")
    return loss


def _share_of_rate(training: Training, step: int) -> float:
    rising = (step + 1) / max(1.0, training.warm_up * training.steps)
    return min(1.0, rising, (training.steps - step) / (training.steps * (1 - training.warm_up)))
