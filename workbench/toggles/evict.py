"""Drop cached tokens that later queries will hardly need, and give their memory back.

After the prompt, and again whenever `every` tokens have come since, each layer and head keeps its n best tokens by a
score; sinks and a window of newest tokens are kept by force. Sources of the scores: `workbench.methods.cache.scorers`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.cache.layer import View
from workbench.cache.rotation import Rotation
from workbench.cache.segments import Slots
from workbench.cache.stages import use_stage
from workbench.methods.cache.budgets import adaptive, best, budget, pyramid
from workbench.methods.cache.retaining import RetainingHeads
from workbench.methods.cache.scorers import (
    SCORERS,
    WITH_SETTINGS,
    Alisa,
    ExpectedAttention,
    Random,
    Scorer,
    SnapKV,
    is_running,
)
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class EvictKV(Toggle):
    """A cache of the best tokens only.

    keep       share of the tokens seen so far (float in (0, 1]), or a fixed number of tokens (int); forced ones count
    by         streaming, h2o, snapkv, tova, key_norm, expected_attention, alisa or random (the control); or one of
               them with settings, such as SnapKV(window=16), Alisa("mask"), Random(seed=1); or trained RetainingHeads
    schedule   uniform; pyramid: more tokens in early layers; adaptive: more tokens in heads that need them
    sinks      first tokens that are always kept        window   newest tokens that are always kept
    every      evict again when this many tokens have come since; None: after the prompt only, so never in a text that
               is read and not generated, as it has no prompt
    positions  keep: kept keys stay at their own positions; reindex: they stand contiguously right before the next
               token, turned anew at each reading (rotary models only)
    chunk      `Subject.generate` reads a prompt so many tokens at a time and evicts after each: with a fixed number of
               tokens no layer ever holds more than keep + chunk. None: the prompt at once, its attention exact
    """

    keep: float | int = 0.5
    by: str | SnapKV | ExpectedAttention | Alisa | RetainingHeads | Random = "snapkv"
    schedule: Literal["uniform", "pyramid", "adaptive"] = "uniform"
    sinks: int = 4
    window: int = 8
    every: int | None = 8
    positions: Literal["keep", "reindex"] = "keep"
    chunk: int | None = None

    claims: ClassVar[frozenset[str]] = frozenset({"kv.select"})
    values: ClassVar[tuple[type, ...]] = WITH_SETTINGS

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not (self.keep >= 1 if isinstance(self.keep, int) else 0 < self.keep <= 1):
            raise ValueError(
                f"EvictKV: got keep={self.keep!r}, expected a share kept, above 0 and up to 1.0, or a number of tokens."
            )
        if self.by not in SCORERS if isinstance(self.by, str) else not isinstance(self.by, WITH_SETTINGS):
            raise ValueError(
                f"EvictKV: got by={self.by!r}, expected one of {', '.join(SCORERS)}, or a value of "
                f"{', '.join(cls.__name__ for cls in WITH_SETTINGS)}."
            )
        if self.schedule not in ("uniform", "pyramid", "adaptive"):
            raise ValueError(f"EvictKV: got schedule={self.schedule!r}, expected uniform, pyramid or adaptive.")
        if self.positions not in ("keep", "reindex"):
            raise ValueError(f"EvictKV: got positions={self.positions!r}, expected keep or reindex.")
        if self.sinks < 0 or self.window < 1 or any(n is not None and n < 1 for n in (self.every, self.chunk)):
            raise ValueError(
                f"EvictKV: got sinks={self.sinks}, window={self.window}, every={self.every}, chunk={self.chunk}; "
                "expected sinks >= 0, window >= 1 (the newest token must stay), every and chunk >= 1 or None."
            )
        if isinstance(self.keep, int) and self.sinks + self.window > self.keep:
            raise ValueError(
                f"EvictKV: {self.sinks} sinks and a window of {self.window} are more than keep={self.keep} tokens. "
                "Keep more, or force fewer."
            )
        if self.masks:
            if self.positions == "reindex" or self.chunk is not None:
                raise ValueError(
                    "EvictKV: Alisa(mode='mask') drops nothing, so there is nothing to reindex and no chunk to bound. "
                    "Take mode='evict', or leave positions and chunk as they are."
                )
            # A packed token has no running score, and what is overlooked now may be wanted later.
            object.__setattr__(self, "claims", self.claims | {"kv.store"})

    @property
    def scorer(self) -> Scorer:
        return SCORERS[self.by] if isinstance(self.by, str) else self.by

    @property
    def masks(self) -> bool:
        """Whether tokens are overlooked for a step, not dropped."""
        return isinstance(self.scorer, Alisa) and self.scorer.mode == "mask"

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if self.keep == 1.0 and not isinstance(self.keep, int):  # 1 is one token, 1.0 is all of them
            return
        if isinstance(self.by, RetainingHeads):
            self.by.for_subject(subject)
        rotation = None
        if self.positions == "reindex":
            rotation = Rotation.of(subject)
        elif isinstance(self.scorer, ExpectedAttention | RetainingHeads):
            rotation = Rotation.if_any(subject)
        stages, evict = subject.stages, Evict(self, subject.n_layers)
        use_stage(subject, "select", evict, undo)
        settings = {
            "chunk": self.chunk,
            "rotation": rotation,
            "reindex": self.positions == "reindex",
            "hide": evict.hide if self.masks else None,
        }
        for name, value in settings.items():
            undo.callback(setattr, stages, name, getattr(stages, name))
            setattr(stages, name, value)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return (  # not key_norm: where a family normalises its keys, all untrained ones tie
            cls(4, "snapkv", "uniform", sinks=1, window=2, every=1),
            cls(4, "streaming", "uniform", sinks=1, window=2, every=1),
            cls(0.4, "tova", "pyramid", sinks=1, window=1, every=2),
            cls(0.4, "h2o", "adaptive", sinks=1, window=1, every=2),
            cls(4, "expected_attention", "uniform", sinks=1, window=2, every=1),
        )

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(1.0)

    def __str__(self) -> str:
        amount = f"{self.keep} tokens" if isinstance(self.keep, int) else f"{self.keep:.0%}"
        more = [] if self.schedule == "uniform" else [self.schedule]
        more += [] if self.positions == "keep" else ["reindexed"]
        more += [] if self.chunk is None else [f"{self.chunk} at a time"]
        return f"EvictKV({', '.join([f'keep {amount} by {self.by}', *more])})"


@dataclass(frozen=True)
class Evict:
    """The select stage of an `EvictKV`."""

    settings: EvictKV
    n_layers: int

    @property
    def running(self) -> bool:
        return is_running(self.settings.scorer)

    def keep(self, view: View) -> Bool[Tensor, "batch kv_head slot"] | None:
        """The slots to keep, or None where it is not yet time; what a scorer notes of each forward is noted anyway."""
        scorer = self.settings.scorer
        once = self.settings.every is None and self.settings.chunk is None
        if isinstance(scorer, ExpectedAttention) and (view.first or not once):
            scorer.observe(view)
        due = not self.settings.masks and self._due(view)
        if not due and not self.running:
            return None
        scores = scorer(view).expand(view.keys.shape[:3])
        if not due:
            return None
        if isinstance(scorer, ExpectedAttention) and once:
            scorer.forget(view)
        positions = view.slots.positions.expand(scores.shape)
        newest = positions.amax((1, 2))  # the newest token is always kept, so this is what was seen
        return self._chosen(view.layer, scores, positions, newest, view.fixed)

    def hide(
        self, layer: int, held: Slots, positions: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
    ) -> Bool[Tensor, "batch kv_head slot"]:
        """The held slots that the next queries overlook, by the running scores; the new tokens count in the budget."""
        scores = held.tensors[2][..., 0]
        places = held.positions.expand(scores.shape)
        newest = places.amax((1, 2)).maximum(positions.where(real, -1).amax(1))
        coming = real.sum(1)[:, None].expand(scores.shape[:2])
        return (places >= 0) & ~self._chosen(layer, scores, places, newest, coming)

    def _due(self, view: View) -> bool:
        every, chunk = self.settings.every, self.settings.chunk
        if view.first or (every is not None and view.since >= every):
            return True
        return chunk is not None and view.since >= chunk and bool(view.step.where("prompt").any())

    def _chosen(
        self,
        layer: int,
        scores: Float[Tensor, "batch kv_head slot"],
        positions: Int[Tensor, "batch kv_head slot"],
        newest: Int[Tensor, " batch"],
        elsewhere: Int[Tensor, "batch kv_head"],
    ) -> Bool[Tensor, "batch kv_head slot"]:
        """The best slots within the budget, of which tokens `elsewhere` take their part."""
        settings = self.settings
        budgets, window = self._counts(layer, newest + 1), settings.window
        if isinstance(settings.scorer, Alisa):
            window = settings.scorer.newest(budgets, settings.sinks).clamp_min(window)
        filled = positions >= 0
        forced = (positions < settings.sinks) | (positions > (newest - window)[:, None, None])
        least = (forced & filled).sum(-1)  # (batch, kv_head)
        counts = budgets[:, None] - elsewhere
        if settings.schedule == "adaptive":
            return adaptive(scores, filled, forced, counts.sum(1).maximum(least.sum(1)))
        return best(scores, filled, forced, counts.maximum(least))

    def _counts(self, layer: int, seen: Tensor) -> Tensor:
        """Tokens that each row may keep in this layer: never fewer than are kept by force."""
        floor = (seen - 1).clamp_max(self.settings.sinks + self.settings.window - 1) + 1
        counts = budget(self.settings.keep, seen).maximum(floor)
        if self.settings.schedule != "pyramid":
            return counts
        rows = zip(counts.tolist(), seen.tolist(), floor.tolist(), strict=True)
        sizes = [pyramid(n, total, self.n_layers, window=least)[layer] for n, total, least in rows]
        return torch.tensor(sizes, device=seen.device)
