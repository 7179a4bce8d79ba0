"""Training of a steering controller: what it should open for, and in which layers, taught by the frozen model.

corrected   loss = BCE(a, wanted) + mean_wanted -log p(behaviour | steered) + c mean_others KL(p || p steered)
paper       loss = BCE(a, wanted) + .1 mean_wanted(mean |w - .5| + .01 mean w): no task gradient reaches w
a is the gate's logit, w the weights of the edited sites; see `controller.py`.
Source: Hegazy et al., 2025, "Guiding Giants" (arXiv 2505.20309); the corrected loss is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from workbench.anatomy import add_tap
from workbench.methods.steering.controller import TENSORS, Controller, Mode, fresh_layers, outputs
from workbench.site import Site
from workbench.step import Positions, Step
from workbench.tokens import Batch, Texts, left_pad

if TYPE_CHECKING:
    from workbench.subject import Subject

# What pushes (row, K) do to the prompts of these rows: log p(behaviour) and KL from unsteered, (row,) each.
Response = Callable[[Tensor, Float[Tensor, "row site"]], tuple[Tensor, Tensor]]
NOTABLE = 1e-3  # nats: a smaller gain of the held-out loss is none


@dataclass(frozen=True)
class Training:
    """How a controller is trained. The paper's: 1024 hidden, rate 5e-5, 10 epochs, batch 8, see `as_published`.

    kl_weight     weight of the KL of the prompts that are to be left alone
    held_out      share of the rows that only decides when to stop
    patience      epochs without a better held-out loss before training stops; the best state is kept
    """

    mode: Mode = "corrected"
    d_hidden: int = 64
    rate: float = 1e-2
    epochs: int = 40
    batch: int = 32
    kl_weight: float = 1.0
    held_out: float = 0.2
    patience: int = 4
    seed: int = 0
    progress: bool = True

    @classmethod
    def as_published(cls, seed: int = 0) -> Training:
        """The paper's settings. Batches are mixed here, where the published script sees all harmful prompts first."""
        return cls(mode="paper", d_hidden=1024, rate=5e-5, epochs=10, batch=8, patience=10, seed=seed)


@dataclass(frozen=True, eq=False)
class Trained:
    """A controller and the losses of its training: epoch, split, gate, behaviour, kl, total; `kept` is its epoch."""

    controller: Controller
    losses: pd.DataFrame = field(repr=False)


def train(
    values: Float[Tensor, "row d"],
    wanted: Sequence[bool] | np.ndarray,
    response: Response | None,
    *,
    reads: Sequence[Site],
    edits: Sequence[Site],
    training: Training | None = None,
    model: str | None = None,
) -> Trained:
    """Train a controller on the values read of each prompt.

    wanted     (row,) True where steering is wanted
    response   what pushes do to the frozen model; mode "paper" never asks it
    Nothing but the controller learns, and the same seed gives the same controller. ValueError where a class is missing.
    """
    settings = training or Training()
    want = torch.as_tensor(np.asarray(wanted, dtype=bool))
    _check(values, want, response, settings)
    chance = torch.Generator().manual_seed(settings.seed)
    values = values.detach().float().cpu()
    learning, held = _split(want, settings.held_out, chance)
    state = dict(zip(("centre", "scale"), _standard(values[learning], settings.mode), strict=True))
    state |= fresh_layers(values.shape[1], len(edits), settings.d_hidden, chance)
    if settings.mode == "corrected":  # all layers alike at first: whatever tells them apart has come from the model
        state["w2"][1:] = 0.0
    learned = [state[name].requires_grad_() for name in TENSORS[2:]]
    optimiser = torch.optim.AdamW(learned, lr=settings.rate)
    losses = partial(_losses, state, values, want, response=response, settings=settings)
    history, kept, best, since = [], state, float("inf"), 0
    for epoch in tqdm(range(settings.epochs), desc="controller", unit="epoch", delay=2, disable=not settings.progress):
        order = learning[torch.randperm(len(learning), generator=chance)]
        batches = {"training": order.split(settings.batch), "held out": held.split(settings.batch)}
        found = {"training": [_descend(optimiser, learned, losses(rows)) for rows in batches["training"]]}
        with torch.no_grad():
            found["held out"] = [torch.stack(losses(rows)) for rows in batches["held out"]]
        for split, parts in batches.items():
            history.append((epoch, split, *_overall(found[split], parts, want, settings)))
        since += 1
        if history[-1][-1] < best - NOTABLE:
            best, since, kept = history[-1][-1], 0, {name: state[name].detach().clone() for name in TENSORS}
        if since >= settings.patience:
            break
    table = pd.DataFrame(history, columns=["epoch", "split", "gate", "behaviour", "kl", "total"])
    controller = Controller(tuple(reads), tuple(edits), **kept, mode=settings.mode, model=model)
    return Trained(controller, table.assign(kept=table["epoch"] == table["epoch"].max() - since))


def model_response(
    subject: Subject,
    prompts: Texts,
    direction: Float[Tensor, " d_model"],
    edits: Sequence[Site],
    behaviour: Sequence[int],
    positions: Positions = "all",
) -> Response:
    """The response of `subject` to pushes along `direction` at the sites `edits`, differentiable in the pushes.

    behaviour   token ids with which the behaviour begins; their total probability after the prompt counts
    Only the pushes get gradients; the model's parameters keep theirs. Active toggles act.
    """
    made = subject.tokenize(prompts)
    starts = torch.tensor(list(behaviour), device=subject.device)

    def respond(rows: Tensor, pushes: Tensor) -> tuple[Tensor, Tensor]:
        batch = left_pad(made.ids, rows.tolist(), pad=subject.pad_id, device=subject.device)
        with torch.no_grad():
            plain = _last_logits(subject, batch).float().log_softmax(-1)  # (row, vocab)
        acted = _step_of(batch).where(positions)[..., None].to(direction.dtype)  # (row, seq, 1)

        def tap(value: Tensor, index: int) -> Tensor:
            push = pushes[:, index, None, None].to(value.device) * direction.to(value.device) * acted.to(value.device)
            return value + push.to(value.dtype)

        with ExitStack() as undo:
            for index, site in enumerate(edits):
                add_tap(subject.model, subject.anatomy, site, partial(tap, index=index), undo)
            steered = _last_logits(subject, batch).float().log_softmax(-1)
        kl = (plain.exp() * (plain - steered)).sum(-1)
        return steered[:, starts].logsumexp(-1).to(pushes.device), kl.to(pushes.device)

    return respond


def _last_logits(subject: Subject, batch: Batch) -> Tensor:
    """(row, vocab) logits after the last token of each prompt, with a graph where something in it learns."""
    arguments = {"attention_mask": batch.mask.long(), "position_ids": batch.positions, "use_cache": False}
    arguments |= {"logits_to_keep": 1}
    taken = {name: value for name, value in arguments.items() if name in subject.accepts}
    return subject.model(input_ids=batch.ids, **taken).logits[:, -1]


def _step_of(batch: Batch) -> Step:
    """The step of a prompt that is read at once."""
    return Step(batch.positions, batch.mask, batch.mask.sum(1))


def _check(values: Tensor, want: Tensor, response: Response | None, settings: Training) -> None:
    if want.all() or not want.any() or len(want) != len(values):
        raise ValueError(
            f"train: got {len(values)} rows, {int(want.sum())} of them wanted; expected rows of both kinds."
        )
    if settings.mode == "corrected" and response is None:
        raise ValueError("train: mode 'corrected' needs the response of the model; see `model_response`.")
    if settings.epochs < 1 or settings.batch < 1 or settings.patience < 1:
        raise ValueError(f"train: got {settings}, expected epochs, batch and patience of at least 1.")


def _descend(optimiser: torch.optim.Optimizer, learned: list[Tensor], losses: list[Tensor]) -> Tensor:
    """One step down the last of the losses; returns them."""
    # Gradients of the controller alone: backward() would fill those of the frozen model too.
    for tensor, slope in zip(learned, torch.autograd.grad(losses[-1], learned), strict=True):
        tensor.grad = slope
    torch.nn.utils.clip_grad_norm_(learned, 1.0)
    optimiser.step()
    return torch.stack(losses).detach()


def _losses(
    state: dict[str, Tensor],
    values: Tensor,
    wanted: Tensor,
    rows: Tensor,
    *,
    response: Response | None,
    settings: Training,
) -> list[Tensor]:
    """(gate, behaviour, kl, total) of some rows; in mode "paper" the second is the pull of the weights to a half."""
    logits, weights = outputs(state, values[rows], settings.mode)
    want = wanted[rows]
    gate = functional.binary_cross_entropy_with_logits(logits, want.float())
    nothing = torch.zeros(())
    if settings.mode == "paper":
        pull = 0.1 * ((weights[want] - 0.5).abs().mean() + 0.01 * weights[want].mean()) if want.any() else nothing
        return [gate, pull, nothing, gate + pull]
    assert response is not None
    score, kl = response(rows, logits.sigmoid()[:, None] * weights)
    missed = -score[want].mean() if want.any() else nothing
    moved = kl[~want].mean() if not want.all() else nothing
    return [gate, missed, moved, gate + missed + settings.kl_weight * moved]


def _overall(losses: list[Tensor], parts: Sequence[Tensor], wanted: Tensor, settings: Training) -> list[float]:
    """(gate, behaviour, kl, total) of all rows from those of batches: each term a mean over the rows that it is of."""
    sizes = [(len(rows), int(wanted[rows].sum()), int((~wanted[rows]).sum())) for rows in parts]
    count = torch.tensor(sizes, dtype=torch.float32)  # (batch, term): all rows, wanted ones, others
    gate, behaviour, kl = ((torch.stack(losses)[:, :3] * count).sum(0) / count.sum(0)).tolist()
    return [gate, behaviour, kl, gate + behaviour + settings.kl_weight * kl]


def _split(wanted: Tensor, held_out: float, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices to learn from and to stop by, each with its share of both classes and at least one row of each."""
    learning, held = [], []
    for group in (wanted.nonzero()[:, 0], (~wanted).nonzero()[:, 0]):
        if len(group) < 2:
            raise ValueError(f"train: got {len(group)} row of one class, expected at least 2: to learn and to stop by.")
        order = group[torch.randperm(len(group), generator=chance)]
        count = min(max(1, round(held_out * len(group))), len(group) - 1)
        learning.append(order[count:])
        held.append(order[:count])
    return torch.cat(learning), torch.cat(held)


def _standard(values: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """Centre and scale (d,) of what is read. As published the network sees values as they are."""
    if mode == "paper":
        return torch.zeros(values.shape[1]), torch.ones(values.shape[1])
    centre = values.mean(0)
    # One scale for all coordinates: dividing each by its own would blow up those that hardly vary.
    return centre, (values - centre).square().mean().sqrt().clamp_min(1e-6).expand(len(centre)).clone()
