"""LoRA: add a low-rank update to weights, as a recovery after pruning leaves one; any strength, back to the bit.

W' = W + strength * B A, A (rank, d_in), B (d_out, rank): merged, so that nothing is slower.
Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from workbench.methods.pruning.adapters import adapted, parts, targets
from workbench.pruned.cut import plain_weight
from workbench.pruned.units import in_layout
from workbench.pruned.weights import Weights
from workbench.swap import swap_weight
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class LoRA(Toggle):
    """A model with a low-rank update.

    update     Weights, or tensors by name: "<path of a projection>.A" (rank, d_in) and "<path>.B" (d_out, rank)
    strength   how much of it; 0 changes nothing
    An update belongs to the widths that it was trained on: after pruning, write `Prune(plan) | LoRA(update)`.
    """

    update: Weights
    strength: float = 1.0

    values: ClassVar[tuple[type, ...]] = (Weights,)
    precedes: ClassVar[frozenset[str]] = frozenset({"ffn.experts"})
    in_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.update, Mapping) and not isinstance(self.update, Weights):
            object.__setattr__(self, "update", Weights(self.update))
        if self.strength != self.strength or abs(self.strength) == float("inf"):
            raise ValueError(f"LoRA: got strength={self.strength}, expected a finite number.")

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.strength == 0 or not len(self.update):
            return
        for path, (a, b) in parts(self.update).items():
            module = self._module(subject, path)
            weight = plain_weight(module)
            change = self.strength * (b.double() @ a.double())  # (d_out, d_in)
            shape = tuple(in_layout(module, change).shape)
            if shape != tuple(weight.shape):
                raise ValueError(
                    f"LoRA: {path} is {tuple(weight.shape)} by now, the update {shape}. An update belongs to the "
                    "widths that it was trained on: prune in the same way before it."
                )
            change = in_layout(module, change).to(weight.device)
            swap_weight(module, "weight", (weight.double() + change).to(weight.dtype), undo)
        subject.count_forwards(undo)

    def _module(self, subject: Subject, path: str) -> Any:
        try:
            return subject.model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"LoRA: {subject.name} has no {path}. Was the update trained on another model?") from None

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        generator = torch.Generator().manual_seed(0)
        found = [(path, module) for path, module in targets(subject).items()][:3]
        update: dict[str, Tensor] = {}
        for path, module in found:
            d_out, d_in = adapted(module)
            update[f"{path}.A"] = torch.randn(2, d_in, generator=generator)
            update[f"{path}.B"] = torch.randn(d_out, 2, generator=generator) * 0.05
        return (cls(Weights(update)), cls(Weights(update), strength=-0.5))

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(Weights({}), strength=0.0)

    def __str__(self) -> str:
        part = "" if self.strength == 1 else f", x {self.strength:g}"
        return f"LoRA({len(self.update) // 2} projections, {self.update.digest[:8]}{part})"
