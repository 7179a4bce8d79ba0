"""How much the loss would change without a unit, to first order: |gradient x weight|, from backward passes.

S = |G * W| elementwise;  q, k, v: over a head's rows; output and down projection: over columns; gate, up: per row
score = sum over modules of S_unit / |S_module|_2, mean over texts
LoRA-guided: with adapters W + s B A the gradient of W is never made: G^ = g_B A + B g_A (- g_B g_A in the paper's
order), S = |G^ * (W + s B A)|, and score <- 0.9 score + 0.1 new over optimiser steps; a step with NaN is discarded.
Sources: LLM-Pruner (Ma et al., 2023, arXiv 2305.11627) for the variants; LoRAPrune (Zhang et al., 2023, arXiv
2305.18403). Here keys and values count for the heads that share them, in equal parts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workbench.anatomy import KEPT, Kept, spread
from workbench.methods.pruning.criteria import wide
from workbench.pruned.cut import plain_weight
from workbench.pruned.units import rows_of

if TYPE_CHECKING:
    from workbench.subject import Subject

KEEP_OLD = 0.9  # of the moving average over optimiser steps
Variant = Literal["param_first", "param_second", "param_mix", "vectorize"]
Scores = tuple[np.ndarray, np.ndarray]  # (layer, head), (layer, d_mlp)


@dataclass(frozen=True)
class Taylor:
    """Which gradients, and how they become a number per unit.

    source    "grad": the true gradient, one text at a time. "lora": through adapters that are trained meanwhile,
              which needs no gradient as large as a weight for the whole model
    variant   for "grad": of the elements w g "param_first" sums |w g|, "param_second" (w g)^2, "param_mix"
              |w g - (w g)^2 / 2|, "vectorize" takes |sum of w g| per row or column
    order     for "lora": "first", or "paper" with the third term, which dominates where the loss is large
    rank, alpha, learning_rate, steps, batch   of the adapters; `batch` texts per optimiser step
    """

    source: Literal["grad", "lora"] = "grad"
    variant: Variant = "param_first"
    order: Literal["first", "paper"] = "first"
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 1e-4
    steps: int = 10
    batch: int = 4

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {"source": ("grad", "lora"), "order": ("first", "paper")}
        choices["variant"] = ("param_first", "param_second", "param_mix", "vectorize")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Taylor: got {name}={getattr(self, name)!r}, expected one of {', '.join(allowed)}.")
        if min(self.rank, self.steps, self.batch) < 1:
            raise ValueError(
                f"Taylor: got rank={self.rank}, steps={self.steps}, batch={self.batch}, expected at least 1 of each."
            )


@dataclass(frozen=True, eq=False)
class Part:
    """Rows or columns of a projection that belong to units: `channels` (unit, number) of its output or input."""

    family: Literal["head", "group", "neuron"]
    side: Literal["out", "in"]
    channels: Tensor


@dataclass(eq=False)
class Adapter:
    """W + scale B A of one projection, in float32 or wider."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float


def taylor_scores(
    subject: Subject, ids: Sequence[Sequence[int]], settings: Taylor, *, seed: int = 0
) -> tuple[Scores, int]:
    """Scores of every head and neuron, and how many steps were discarded. Nothing of the model is changed.

    Raises ValueError under toggles that read a text in pieces or have sliced weights away, and if no step is left.
    """
    _check(subject, ids)
    by_gradient = settings.source == "grad"
    run = _by_gradient if by_gradient else _by_adapters
    keep, share = (1.0, 1.0) if by_gradient else (KEEP_OLD, 1 - KEEP_OLD)  # a mean over texts, or a moving average
    shape, n_layers = subject.anatomy, subject.n_layers
    total = (np.zeros((n_layers, shape.n_heads)), np.zeros((n_layers, shape.d_mlp or 0)))
    n_used = n_discarded = 0
    for new in run(subject, ids, settings, seed):
        if not all(np.isfinite(part).all() for part in new):
            n_discarded += 1
            continue
        n_used += 1
        for old, part in zip(total, new, strict=True):
            old *= keep
            old += share * part
    if not n_used:
        raise ValueError(
            f"taylor: all {n_discarded} steps gave NaN or infinity. Load the model in float32 or bfloat16."
        )
    scale = n_used if by_gradient else 1
    return (total[0] / scale, total[1] / scale), n_discarded


def adapter_gradient(adapter: Adapter, g_a: Tensor, g_b: Tensor, order: Literal["first", "paper"] = "first") -> Tensor:
    """(out, in) what the gradients of A and B tell of that of W: G^ = g_B A + B g_A, the paper's minus g_B g_A."""
    guessed = g_b @ adapter.a + adapter.b @ g_a
    return guessed - g_b @ g_a if order == "paper" else guessed


def parts_of(subject: Subject) -> dict[tuple[int, str], list[Part]]:
    """(layer, path below the block) of every projection -> whose its rows or columns are."""
    d_head, n_neurons = subject.anatomy.d_head, subject.anatomy.d_mlp or 0
    heads = spread(torch.arange(subject.anatomy.n_heads)[:, None], d_head)
    found: dict[tuple[int, str], list[Part]] = {}
    for units in subject.units:
        for path, rows in units.heads.items():
            parts = [Part("head", "out", rows.of_head), Part("group", "out", rows.of_group)]
            found[units.layer, path] = [part for part in parts if part.channels.numel()]
        found[units.layer, units.heads_out] = [Part("head", "in", heads)]
        neurons = torch.arange(n_neurons)[:, None]
        for path, times in units.gate_up.items():
            found[units.layer, path] = [Part("neuron", "out", neurons + n_neurons * k) for k in range(times)]
        if units.down is not None:
            found[units.layer, units.down] = [Part("neuron", "in", neurons)]
    return found


def per_unit(part: Part, weight: Tensor, gradient: Tensor, variant: str = "param_first") -> Tensor:
    """(unit,) float64 saliency of a module's units from its weight and gradient (out, in)."""
    moved = weight * gradient
    element = {
        "param_first": moved.abs,
        "param_second": moved.square,
        "param_mix": lambda: (moved - 0.5 * moved.square()).abs(),
        "vectorize": lambda: moved,
    }[variant]()
    channel = element.sum(1 if part.side == "out" else 0, dtype=torch.float64)
    channel = channel.abs() if variant == "vectorize" else channel
    return channel[part.channels.to(channel.device)].sum(1).cpu()


def combined(found: Sequence[tuple[Part, Tensor]], n_heads: int, n_kv_heads: int, n_neurons: int) -> Scores:
    """(head,) and (d_mlp,) sums over a layer's modules, each divided by its norm over groups or neurons.

    A group's score is the sum of its heads': what their queries and outputs say, and once its keys and values.
    """
    size = n_heads // n_kv_heads
    heads, neurons = torch.zeros(n_heads, dtype=torch.float64), torch.zeros(n_neurons, dtype=torch.float64)
    for part, value in found:
        norm = (value.reshape(n_kv_heads, size).sum(1) if part.family == "head" else value).norm()
        value = value / norm if norm > 0 else value
        if part.family == "neuron":
            neurons += value
        else:
            heads += value if part.family == "head" else (value / size).repeat_interleave(size)
    return heads.numpy(), neurons.numpy()


# The true gradient


def _by_gradient(subject: Subject, ids: Sequence[Sequence[int]], settings: Taylor, seed: int) -> Iterator[Scores]:
    """One backward per text. The gradient of one projection at a time is made, weighed and let go.

    It is made from what the projection got and what flows back into it, so no parameter ever holds a gradient.
    """
    parts, found = parts_of(subject), _Found(subject)

    def watch(key: tuple[int, str], module: nn.Module, args: Any, output: Tensor) -> None:
        given = args[0].detach()

        def take(back: Tensor) -> None:
            gradient = wide(back).flatten(0, -2).T @ wide(given).flatten(0, -2)  # (out, in)
            for part in parts[key]:
                found.add(key[0], part, per_unit(part, wide(rows_of(module)), gradient, settings.variant))

        if output.requires_grad:
            output.register_hook(take)

    with ExitStack() as undo, torch.enable_grad():
        for key in parts:
            undo.callback(_module(subject, key).register_forward_hook(partial(watch, key)).remove)
        leaf = undo.enter_context(_embedded(subject))
        for text in ids:
            torch.autograd.grad(_loss(subject, text), leaf)
            yield found.scores()


@contextmanager
def _embedded(subject: Subject) -> Iterator[list[Tensor]]:
    """Within: the embedded tokens of the last forward are where gradients end, in a list of one tensor."""
    leaf: list[Tensor] = []

    def cut(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf[:] = [output.detach().requires_grad_(True)]
        return leaf[0]

    handle = subject.model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaf
    finally:
        handle.remove()


# Adapters


def _by_adapters(subject: Subject, ids: Sequence[Sequence[int]], settings: Taylor, seed: int) -> Iterator[Scores]:
    """Train low-rank adapters of all projections, and after each backward say what it tells of the weights."""
    parts = parts_of(subject)
    adapters = {key: _adapter(_module(subject, key), settings, n, seed) for n, key in enumerate(parts)}
    tensors = [tensor for one in adapters.values() for tensor in (one.a, one.b)]
    optimiser = torch.optim.AdamW(tensors, lr=settings.learning_rate)
    rng = np.random.default_rng(seed)
    with ExitStack() as undo, torch.enable_grad():
        for key, adapter in adapters.items():
            undo.callback(_module(subject, key).register_forward_hook(_adapted(adapter)).remove)
        for _ in range(settings.steps):
            optimiser.zero_grad()
            chosen = rng.permutation(len(ids))[: settings.batch]
            for text in chosen:
                (_loss(subject, ids[text]) / len(chosen)).backward(inputs=tensors)
            yield _said_by_adapters(subject, parts, adapters, settings)
            # No gradient: nothing ran there, as in a dropped block, and the optimiser leaves it as it is.
            if all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in tensors):
                optimiser.step()


def _said_by_adapters(
    subject: Subject,
    parts: dict[tuple[int, str], list[Part]],
    adapters: dict[tuple[int, str], Adapter],
    settings: Taylor,
) -> Scores:
    found = _Found(subject)
    with torch.no_grad():
        for key, adapter in adapters.items():
            if adapter.a.grad is None or adapter.b.grad is None:  # nothing ran here, as in a dropped block
                continue
            gradient = adapter_gradient(adapter, adapter.a.grad, adapter.b.grad, settings.order)
            weight = wide(rows_of(_module(subject, key))) + adapter.scale * adapter.b @ adapter.a
            for part in parts[key]:
                found.add(key[0], part, per_unit(part, weight, gradient))
    return found.scores()


def _adapter(module: nn.Module, settings: Taylor, number: int, seed: int) -> Adapter:
    """A drawn as in peft, uniform in 1 / sqrt(in), and B zero, so that nothing changes at first."""
    weight = wide(rows_of(module))
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    drawn = torch.rand(settings.rank, weight.shape[1], generator=generator, dtype=torch.float32) * 2 - 1
    a = (drawn / math.sqrt(weight.shape[1])).to(weight)
    b = weight.new_zeros(len(weight), settings.rank)
    return Adapter(a.requires_grad_(True), b.requires_grad_(True), settings.alpha / settings.rank)


def _adapted(adapter: Adapter) -> Callable[..., Tensor]:
    def add(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + (adapter.scale * (wide(args[0]) @ adapter.a.T) @ adapter.b.T).to(output.dtype)

    return add


# Both


class _Found:
    """What the modules of each layer said in the step under way."""

    def __init__(self, subject: Subject) -> None:
        self.shape, self.n_layers = subject.anatomy, subject.n_layers
        self.said: dict[int, list[tuple[Part, Tensor]]] = defaultdict(list)

    def add(self, layer: int, part: Part, value: Tensor) -> None:
        self.said[layer].append((part, value))

    def scores(self) -> Scores:
        """(layer, head), (layer, d_mlp) of this step; the next one begins."""
        counts = self.shape.n_heads, self.shape.n_kv_heads, self.shape.d_mlp or 0
        heads, neurons = zip(*(combined(self.said[layer], *counts) for layer in range(self.n_layers)), strict=True)
        self.said.clear()
        return np.stack(heads), np.stack(neurons)


def _loss(subject: Subject, text: Sequence[int]) -> Tensor:
    """Mean negative log-likelihood of a text in nats per token, with a graph behind it."""
    ids = torch.tensor([list(text)], device=subject.device)
    logits = subject.model(input_ids=ids, use_cache=False).logits
    return cross_entropy(wide(logits[0, :-1]), ids[0, 1:])


def _module(subject: Subject, key: tuple[int, str]) -> Any:
    return subject.model.get_submodule(f"{subject.anatomy.blocks}.{key[0]}").get_submodule(key[1])


def _check(subject: Subject, ids: Sequence[Sequence[int]]) -> None:
    short = [row for row, text in enumerate(ids) if len(text) < 2]
    if short:
        raise ValueError(f"taylor: text {short[0]} has {len(ids[short[0]])} token, expected at least two.")
    if subject.stages:
        raise ValueError(f"taylor: {subject.stages} acts on the cache, where no gradient goes. Score without it.")
    for key in parts_of(subject):
        module = _module(subject, key)
        plain_weight(module)
        kept: Kept | None = vars(module).get(KEPT)
        if kept is not None and kept.there is not None:
            raise ValueError(
                f"taylor: weights of layer {key[0]} were sliced away, so rows have other numbers. "
                "Prune with form='mask' to score what is left."
            )
