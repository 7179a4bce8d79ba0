"""Recovery: how much of what a toggle broke can a short training of low-rank adapters give back?

Run it under the toggles that broke it; `LoRA(result.update)` behind them is the recovered model.
Source: LoRA, Hu et al., 2021; the recipe after pruning as in LLM-Pruner, Ma et al., 2023, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from workbench.generation import text_of
from workbench.methods.pruning.adapters import Loss, targets, train
from workbench.methods.pruning.recovered import RecoveryResult
from workbench.probe import Expectation, Planted, Probe
from workbench.pruned.weights import Weights
from workbench.settings import Bounds
from workbench.toggles.lora import LoRA
from workbench.tokens import Tokens

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class Recovery(Probe):
    """A short training of adapters under the active toggles.

    rank       of every adapter                       lr         of AdamW, without decay
    steps      at most so many batches                batch      texts per step
    loss       kl: be like the model without toggles; nll: predict the texts
    held_out   share of the texts that only judges     every      steps between two measurements
    patience   measurements in a row without a better one that are borne; at the next it stops
    Data: texts, as many as can be had; those that judge are the last ones. Ctrl-C leaves the subject as it was.
    """

    rank: int = 8
    steps: int = 200
    lr: float = 3e-3
    batch: int = 16
    loss: Loss = "kl"
    held_out: float = 0.2
    every: int = 20
    patience: int = 3
    seed: int = 0

    bounds: ClassVar[Bounds] = {"patience": 0}

    def __post_init__(self) -> None:
        if self.loss not in ("kl", "nll"):
            raise ValueError(f"Recovery: got loss={self.loss!r}, expected 'kl' or 'nll'.")
        for name in ("rank", "steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recovery: got {name}={getattr(self, name)}, expected at least 1.")
        if not 0 < self.held_out < 1 or self.lr <= 0:
            raise ValueError(f"Recovery: got held_out={self.held_out}, lr={self.lr}, expected (0, 1) and above 0.")

    def measure(self, subject: Subject, data: Sequence[str]) -> RecoveryResult:
        tokens = subject.tokenize(data if isinstance(data, str) else list(data), cut=True)
        n_judges = max(1, round(self.held_out * len(tokens)))
        if len(tokens) <= n_judges or min(tokens.lengths) < 2:
            raise ValueError(
                f"Recovery: got {len(tokens)} texts, the shortest of {min(tokens.lengths)} tokens; expected at least "
                "two texts of two tokens: some to learn from and some to judge by."
            )
        if not targets(subject):
            raise ValueError(f"Recovery: {subject.name} has no projections of plain numbers to put adapters beside.")
        learn, judge = _split(tokens, len(tokens) - n_judges)
        settings = {name: getattr(self, name) for name in ("rank", "steps", "lr", "batch", "loss", "every", "patience")}
        with torch.enable_grad():
            training = train(subject, learn, judge, seed=self.seed, **settings)
        with subject.untoggled():
            nll, lengths = subject.nll(judge.ids), np.array(judge.lengths) - 1
        whole = float(np.average(nll.numpy(), weights=lengths))
        names = " | ".join(map(str, subject.active)) or "no toggle"
        return RecoveryResult.of(training, whole, names)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A model from which a rank-one part of two projections was taken: adapters can give exactly that back."""
        return _planted("rank-one damage", 1.0, (0.02, 50.0), (0.6, 1.0), seed)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The whole model: there is nothing to recover."""
        return _planted("nothing broken", 0.0, (0.0, 1e-9), (0.0, 0.0), seed)

    @classmethod
    def example(cls, subject: Subject) -> tuple[Probe, Any]:
        texts = [text_of(subject.tokenizer, range(start, start + 9)) for start in (8, 20, 32, 44)]
        return cls(rank=2, steps=4, every=2, batch=2), texts


def _split(tokens: Tokens, first: int) -> tuple[Tokens, Tokens]:
    """The first texts, and the rest."""
    return tuple(  # type: ignore[return-value]
        Tokens(*(getattr(tokens, name)[part] for name in ("ids", "offsets", "special")))
        for part in (slice(None, first), slice(first, None))
    )


def _planted(name: str, size: float, before: tuple[float, float], removed: tuple[float, float], seed: int) -> Planted:
    from workbench.subject import Subject

    subject = Subject.tiny("llama", seed)
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for path in [path for path in targets(subject) if path.endswith(("1.mlp.down_proj", "1.self_attn.o_proj"))]:
        d_out, d_in = subject.model.get_submodule(path).weight.shape  # type: ignore[union-attr]
        update[f"{path}.A"] = torch.randn(1, int(d_in), generator=generator) / int(d_in) ** 0.5
        update[f"{path}.B"] = torch.randn(int(d_out), 1, generator=generator)
    texts = [torch.randint(4, subject.anatomy.vocab, (12,), generator=generator).tolist() for _ in range(60)]

    def solve() -> RecoveryResult:
        probe = Recovery(rank=2, steps=60, lr=2e-2, batch=16, every=20, seed=seed)
        with subject.under(LoRA(Weights(update), strength=size)) if size else nullcontext():
            return probe.measure(subject, texts)  # type: ignore[arg-type]

    return Planted(
        name=name,
        arrays={"ids": np.array(texts)} | {key: tensor.numpy() for key, tensor in update.items()},
        solve=solve,
        expectations=(
            Expectation("kl after the last step, nats", lambda result: result.table()["kl"].iloc[-1], 0.0, 0.05),
            Expectation("kl before, nats", lambda result: result.table()["kl"].iloc[0], *before),
            Expectation("share of it removed", lambda result: result.kl_removed, *removed),  # type: ignore[attr-defined]
        ),
    )
