"""One layer of a key/value cache that projects, selects and stores its tokens; a layer of a transformers Cache.

Logical positions are kept apart from slots: `get_seq_length` counts every token that was seen, kept or not, so that
positions stay right after eviction. Padding takes no slot, so a padded row is cached as it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from workbench.cache.attention import attend, weights
from workbench.cache.held import held_bytes
from workbench.cache.segments import Frozen, Recent, Slots, joined

if TYPE_CHECKING:
    from workbench.cache.stages import Stages
    from workbench.step import Step
    from workbench.toggle import Receipt


class Part(Protocol):
    """Some of a layer's tokens: `Recent`, `Frozen`, or what a store makes. Its length is 0 where it is empty."""

    def __len__(self) -> int: ...

    def slots(self) -> Slots: ...

    def rows(self, index: Tensor) -> None: ...


@dataclass(eq=False)
class View:
    """What a selector may look at, once the attention of a forward is done. Read only.

    slots      keys and values (batch, kv_head, slot, d_head) that may still be dropped, and their positions
    query      (batch, head, seq, d_head) of this forward, rotated as the keys are
    step       logical positions and padding of this forward
    first      True for the forward that brought the prompt
    state      a dictionary that lives with the layer, for running scores
    """

    layer: int
    slots: Slots
    query: Float[Tensor, "batch head seq d_head"]
    step: Step
    scaling: float | None
    first: bool
    module: torch.nn.Module
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> Float[Tensor, "batch kv_head slot d_head"]:
        return self.slots.tensors[0]

    @property
    def values(self) -> Float[Tensor, "batch kv_head slot d_head"]:
        return self.slots.tensors[1]

    def attention(self, window: int) -> tuple[Float[Tensor, "batch head seq slot"], Bool[Tensor, "batch seq"]]:
        """Weights of the last `window` queries of each row, and which of them are real; float32."""
        last = slice(max(0, self.query.shape[2] - window), None)
        positions = self.step.positions[:, last].to(self.query.device)
        rows = weights(self.query[:, :, last], self.slots, positions, self.scaling)
        real = self.step.real[:, last].to(rows.device)
        return rows * real[:, None, :, None], real


class KVLayer(CacheLayerMixin):
    """The cache of one attention layer under the active stages.

    step     gives the Step of the forward under way; None once the toggles are gone
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, layer: int, stages: Stages, step: Callable[[], Step | None]) -> None:
        super().__init__()
        self.layer, self.stages, self.step = layer, stages, step
        self.seen = 0  # columns that came by, padding included: what transformers counts
        self.packed: list[Part] = []  # what a store made; never reopened
        self.kept: Frozen | None = None  # what the last selection left, whole
        self.recent = Recent()  # what came since, whole
        self.state: dict[str, Any] = {}
        self._new: tuple[Tensor, Tensor] | None = None

    # What transformers asks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take the new tokens; returns this layer twice, which the attention function of the stages reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.step() is None:
            raise ValueError(
                f"cache: this cache was made under {self.stages}, which acts no more. "
                "Go on inside the same subject.under(...), or start from an empty cache."
            )
        self._new = (key_states, value_states)
        return self, self

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget every token."""
        self.__init__(self.layer, self.stages, self.step)

    def crop(self, max_length: int) -> None:
        raise ValueError(
            f"cache: can't take back tokens from a cache made under {self.stages}: what was dropped or packed is gone. "
            "Assisted decoding needs a cache without such toggles."
        )

    def offload(self) -> None:
        raise ValueError("cache: offloading is not supported under key/value toggles. Switch it off.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        for part in self.parts:
            part.rows(indices)
        self.state = {
            name: value.index_select(0, indices.to(value.device)) if isinstance(value, Tensor) else value
            for name, value in self.state.items()
        }

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.recent.counts)).repeat_interleave(repeats))

    # What the attention function asks

    def attend(self, query: Tensor, module: torch.nn.Module, scaling: float | None, soft_cap: float | None) -> Tensor:
        """Attention of the new queries over all that is held and the new tokens, then the stages."""
        step = self.step()
        assert step is not None and self._new is not None
        positions, real = step.positions.to(query.device), step.real.to(query.device)
        (keys, values), self._new = self._new, None
        project = self.stages.project
        if project is None:
            self.recent.append((keys, values), positions, real)
            slots = self.slots()
        else:  # the new tokens attend exactly, whatever the past is held in
            fresh = Recent()
            fresh.append((keys, values), positions, real)
            slots = joined([*([self.slots()] if self.parts else []), fresh.slots()])
            self.recent.append(project.encode(self.layer, keys, values, positions), positions, real)
        out = attend(query, slots, positions, scaling=scaling, soft_cap=soft_cap)
        first, self.seen = self.seen == 0, self.seen + query.shape[2]
        if self.stages.select is not None:
            self._select(query, step, scaling, first, module)
        if self.stages.store is not None:
            self.stages.store.pack(self)
        return out

    @property
    def parts(self) -> list[Part]:
        """Everything held, oldest first."""
        return [*self.packed, *self.whole]

    @property
    def whole(self) -> list[Part]:
        """What is held in full precision, and may still be dropped or packed."""
        return [part for part in (self.kept, self.recent) if part is not None and len(part)]

    @property
    def longest(self) -> int:
        """Whole tokens of the longest segment, known without asking the device."""
        return self.recent.length + (self.kept.longest if self.kept is not None else 0)

    def hold(self, whole: Slots, keep: Bool[Tensor, "batch kv_head slot"]) -> None:
        """Of the whole tokens hold only these, in storage of their own."""
        self.kept, self.recent = Frozen.chosen(whole, keep), self.recent.emptied()

    def slots(self) -> Slots:
        """Everything held, as keys and values: unpacked and rebuilt where they are stored otherwise."""
        return self._rebuilt(joined([part.slots() for part in self.parts]))

    def _rebuilt(self, stored: Slots) -> Slots:
        project = self.stages.project
        if project is None or not stored.tensors:
            return stored
        return Slots(project.decode(self.layer, stored.tensors, stored.positions), stored.positions, stored.full)

    def _select(
        self, query: Tensor, step: Step, scaling: float | None, first: bool, module: torch.nn.Module
    ) -> None:
        """Let the selector drop whole tokens; what it keeps moves into storage of its own."""
        assert self.stages.select is not None
        stored = joined([part.slots() for part in self.whole])
        view = View(self.layer, self._rebuilt(stored), query, step, scaling, first, module, self.state)
        keep = self.stages.select.keep(view)
        if keep is None:
            return
        keep = keep.expand(*stored.tensors[0].shape[:3]) & stored.filled
        dropped = int((stored.filled & ~keep).sum())  # of one head each
        if not dropped:
            return
        before = held_bytes(*self.whole)
        self.hold(stored, keep)
        heads = keep.shape[1]
        self.stages.acted("select", dropped // heads, before - held_bytes(*self.whole))
