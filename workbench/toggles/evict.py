"""Drop cached tokens that later queries will hardly need, and give their memory back.

After the prompt, and again whenever `every` tokens have come since, each layer and head keeps its n best tokens by a
score; sinks and a window of newest tokens are kept by force. Sources of the scores: `workbench.methods.scorers`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from workbench.cache.layer import View
from workbench.cache.stages import use_stage
from workbench.methods.budgets import adaptive, best, budget, pyramid
from workbench.methods.scorers import RUNNING, SCORERS
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class EvictKV(Toggle):
    """A cache of the best tokens only.

    keep       share of the tokens seen so far (float in (0, 1]), or a fixed number of tokens (int); forced ones count
    by         streaming, h2o, snapkv, tova, key_norm or random (the control)
    schedule   uniform; pyramid: more tokens in early layers; adaptive: more tokens in heads that need them
    sinks      first tokens that are always kept        window   newest tokens that are always kept
    every      evict again when this many tokens have come since; None: after the prompt only
    seed       of by="random"
    """

    keep: float | int = 0.5
    by: str = "snapkv"
    schedule: Literal["uniform", "pyramid", "adaptive"] = "uniform"
    sinks: int = 4
    window: int = 8
    every: int | None = 8
    seed: int = 0

    claims: ClassVar[frozenset[str]] = frozenset({"kv.select"})

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not (self.keep >= 1 if isinstance(self.keep, int) else 0 < self.keep <= 1):
            raise ValueError(
                f"EvictKV: got keep={self.keep!r}, expected a share kept, above 0 and up to 1.0, or a number of tokens."
            )
        if self.by not in SCORERS:
            raise ValueError(f"EvictKV: got by={self.by!r}, expected one of {', '.join(SCORERS)}.")
        if self.schedule not in ("uniform", "pyramid", "adaptive"):
            raise ValueError(f"EvictKV: got schedule={self.schedule!r}, expected uniform, pyramid or adaptive.")
        if self.sinks < 0 or self.window < 1 or (self.every is not None and self.every < 1):
            raise ValueError(
                f"EvictKV: got sinks={self.sinks}, window={self.window}, every={self.every}; "
                "expected sinks >= 0, window >= 1 (the newest token must stay), every >= 1 or None."
            )
        if isinstance(self.keep, int) and self.sinks + self.window > self.keep:
            raise ValueError(
                f"EvictKV: {self.sinks} sinks and a window of {self.window} are more than keep={self.keep} tokens. "
                "Keep more, or force fewer."
            )

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.keep != 1.0:
            use_stage(subject, "select", Evict(self, subject.n_layers), undo)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        schedules = tuple(cls(0.4, "key_norm", schedule, 1, 1, 2) for schedule in ("pyramid", "adaptive"))
        return (*(cls(4, by, "uniform", 1, 2, 1) for by in SCORERS), *schedules)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(1.0)

    def __str__(self) -> str:
        amount = f"{self.keep} tokens" if isinstance(self.keep, int) else f"{self.keep:.0%}"
        shape = "" if self.schedule == "uniform" else f", {self.schedule}"
        return f"EvictKV(keep {amount} by {self.by}{shape})"


@dataclass(frozen=True)
class Evict:
    """The select stage of an `EvictKV`."""

    settings: EvictKV
    n_layers: int

    @property
    def running(self) -> bool:
        return self.settings.by in RUNNING

    def keep(self, view: View) -> Tensor | None:
        """The slots to keep, or None where it is not yet time; running scores are updated either way."""
        settings = self.settings
        due = view.first or (settings.every is not None and view.since >= settings.every)
        if not due and not self.running:
            return None
        options: dict[str, Any] = {"seed": settings.seed} if settings.by == "random" else {}
        scores = SCORERS[settings.by](view, **options).expand(view.keys.shape[:3])
        if not due:
            return None
        positions = view.slots.positions.expand(scores.shape)
        filled = positions >= 0
        newest = positions.amax((1, 2))  # (batch,): the newest token is always kept, so this is what was seen
        forced = (positions < settings.sinks) | (positions > newest[:, None, None] - settings.window)
        counts = self._counts(view.layer, newest + 1)
        if settings.schedule == "adaptive":
            return adaptive(scores, filled, forced, counts)
        return best(scores, filled, forced, counts[:, None].expand(scores.shape[:2]))

    def _counts(self, layer: int, seen: Tensor) -> Tensor:
        """Tokens that each row may keep in this layer: never fewer than are kept by force."""
        floor = (seen - 1).clamp_max(self.settings.sinks + self.settings.window - 1) + 1
        counts = budget(self.settings.keep, seen).maximum(floor)
        if self.settings.schedule != "pyramid":
            return counts
        rows = zip(counts.tolist(), seen.tolist(), floor.tolist(), strict=True)
        sizes = [pyramid(n, total, self.n_layers, window=least)[layer] for n, total, least in rows]
        return torch.tensor(sizes, device=seen.device)
