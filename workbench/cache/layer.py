"""One layer of a key/value cache that projects, selects and stores its tokens; a layer of a transformers Cache.

Logical positions are kept apart from slots: `get_seq_length` counts every token that was seen, kept or not, so that
positions stay right after eviction. Padding takes no slot, so a padded row is cached as it would be alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from workbench.cache.attention import attend, attend_in_blocks, weights
from workbench.cache.held import held_bytes
from workbench.cache.segments import Frozen, Recent, Slots, joined

if TYPE_CHECKING:
    from workbench.cache.rotation import Rotation
    from workbench.cache.stages import Stages
    from workbench.step import Step


class Part(Protocol):
    """Some of a layer's tokens: `Recent`, `Frozen`, or what a store makes. Its length is 0 where it is empty."""

    even: bool  # all segments are as long

    @property
    def filled(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def slots(self) -> Slots: ...

    def blocks(self, which: int) -> Iterator[Tensor]: ...

    def accounts(self) -> Iterator[tuple[str, int, int]]: ...

    def rows(self, index: Tensor) -> None: ...


class Whole(Part, Protocol):
    """A part in full precision."""

    def add(self, number: int, change: Tensor) -> None: ...


@dataclass(eq=False)
class View:
    """What a selector may look at, once the attention of a forward is done. Read only.

    slots      keys and values (batch, kv_head, slot, d_head) that may still be dropped, and their positions
    context    all that the queries attended to; `slots` are its last ones
    query      (batch, head, seq, d_head) of this forward, rotated as the keys are
    step       logical positions and padding of this forward
    first      True for the forward that brought the prompt
    since      columns that came since the last selection, whether or not it dropped anything
    add_scores adds (batch, kv_head, slot) to the running scores, for selectors that keep some
    state      tensors (batch, ...) that a selector keeps with the layer
    rotation   how queries and keys were turned by their positions, where the stages know
    soft_cap   c of logits c tanh(logits / c), in models that have one
    """

    layer: int
    slots: Slots
    context: Slots
    query: Float[Tensor, "batch head seq d_head"]
    step: Step
    scaling: float | None
    first: bool
    since: int
    module: torch.nn.Module
    add_scores: Callable[[Tensor], None]
    state: dict[str, Any] = field(default_factory=dict)
    rotation: Rotation | None = None
    soft_cap: float | None = None

    @property
    def keys(self) -> Float[Tensor, "batch kv_head slot d_head"]:
        return self.slots.tensors[0]

    @property
    def values(self) -> Float[Tensor, "batch kv_head slot d_head"]:
        return self.slots.tensors[1]

    @property
    def fixed(self) -> Int[Tensor, "batch kv_head"]:
        """Tokens held that can no longer be dropped, as they are packed: a budget counts them too."""
        return (self.context.lengths - self.slots.lengths).expand(self.keys.shape[:2])

    @property
    def scores(self) -> Float[Tensor, "batch kv_head slot"]:
        """Running scores of the tokens, as far as they were added."""
        return self.slots.tensors[2][..., 0]

    def attention(self, window: int | slice) -> Float[Tensor, "batch head query slot"]:
        """Weights in float32 that some queries of this forward gave to `slots`, 0 for padding; O(query x slot) memory.

        window   the last so many tokens of each row, or a slice of the columns
        """
        step, device = self.step, self.query.device
        columns = window if isinstance(window, slice) else slice(0, None)
        real = step.real[:, columns].to(device)
        if isinstance(window, int):
            newest = step.positions.where(step.real, -1).amax(1, keepdim=True)
            real = real & (step.positions > newest - window).to(device)
            first = int(real.any(0).int().argmax())  # no more columns than hold such a token
            columns, real = slice(first, None), real[:, first:]
        positions = step.positions[:, columns].to(device)
        rows = weights(self.query[:, :, columns], self.context, positions, self.scaling, self.soft_cap)
        return rows[..., -self.keys.shape[2] :] * real[:, None, :, None]


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
        self.since = 0  # columns since the last selection: a clock that rows share, so that none meddles with another
        self.state: dict[str, Any] = {}
        self.widths = ((1, 1), (1, 1))  # of keys and of values: numbers as they come, and as a projection stores them
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

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens; like transformers, this takes a negative number. See `check_crop`."""
        self.check_crop(-tokens_to_remove)
        self.recent.forget(-tokens_to_remove)
        self.seen, self.since = self.seen + tokens_to_remove, self.since + tokens_to_remove

    def check_crop(self, count: int) -> None:
        """Raises ValueError where taking back so many tokens would not lead back to what was.

        It does as long as nothing was selected or packed since they came, and no running score or statistic saw them.
        """
        watched = set(self.state) - {"sinks"} or (self.stages.select is not None and self.stages.select.running)
        if watched or not self.recent.even or not 0 <= count <= min(self.recent.length, self.since):
            raise ValueError(
                f"cache: can't take back tokens from a cache made under {self.stages}: "
                f"{'their attention is in the scores of others' if watched else 'what was dropped or packed is gone'}. "
                "Assisted decoding needs a cache without such toggles."
            )

    def offload(self) -> None:
        raise ValueError("cache: offloading is not supported under key/value toggles. Switch it off.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        for part in (*self.packed, self.kept, self.recent):  # an empty one has rows too
            if part is not None:
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
        project, slots, hidden = self.stages.project, None, self._hidden(positions, real)
        if project is None:
            self.recent.append(self._scored(keys, values), positions, real)
            slots = None if self._readable_in_blocks(query) else self.slots()
        else:
            if project.exact:  # before the new tokens are written down: what is held may be read as a view
                slots = joined([*([self.slots()] if self.parts else []), _alone(keys, values, positions, real)])
            self.recent.append(self._scored(*self._encoded(keys, values, positions, real)), positions, real)
            slots = self.slots() if slots is None else slots
        if slots is None:
            out = attend_in_blocks(query, self.parts, keys.shape[1], scaling=scaling, soft_cap=soft_cap)
        else:
            shown = slots if hidden is None else slots.without(hidden)
            out = attend(query, shown, positions, scaling=scaling, soft_cap=soft_cap)
        first, self.seen, self.since = self.seen == 0, self.seen + query.shape[2], self.since + query.shape[2]
        if self.stages.select is not None:
            self._select(query, step, scaling, soft_cap, first, module, slots if project is None else None)
        if self.stages.store is not None:
            self.stages.store.pack(self)
        return out

    @property
    def parts(self) -> list[Part]:
        """Everything held, oldest first."""
        return [*self.packed, *self.whole]

    @property
    def whole(self) -> list[Whole]:
        """What is held in full precision, and may still be dropped or packed."""
        return [part for part in (self.kept, self.recent) if part is not None and len(part)]

    @property
    def longest(self) -> int:
        """Whole tokens of the longest segment, known without asking the device."""
        return self.recent.length + (self.kept.longest if self.kept is not None else 0)

    def accounts(self) -> Iterator[tuple[str, int, int]]:
        """Part, bytes, and the keys and values that it stands for; what a store left whole is called sinks."""
        for part in self.packed:
            for name, size, numbers in self._accounts_of(part):
                yield "sinks" if name in ("keys", "values") and isinstance(part, Frozen) else name, size, numbers
        for part in (self.kept, self.recent):
            if part is not None:
                yield from self._accounts_of(part)

    def _accounts_of(self, part: Part) -> Iterator[tuple[str, int, int]]:
        for name, size, numbers in part.accounts():
            whole, stored = self.widths[name in ("values", "codes_v")]
            yield name, size, numbers // stored * whole

    def hold(self, whole: Slots, keep: Bool[Tensor, "batch kv_head slot"]) -> None:
        """Of the whole tokens hold only these, in storage of their own."""
        self.kept, self.recent = Frozen.chosen(whole, keep), self.recent.emptied()

    def slots(self) -> Slots:
        """Everything held, as keys and values: unpacked and rebuilt where they are stored otherwise."""
        plain = (part.slots() for part in self.parts)
        held = self._rebuilt(joined([Slots(slots.tensors[:2], slots.positions, slots.full) for slots in plain]))
        return self._reindexed(held) if self.stages.reindex and self.kept is not None else held

    def _reindexed(self, held: Slots) -> Slots:
        """Keys turned to stand contiguously up to the newest token; always from where they were, so nothing drifts.

        Rotary attention sees distances alone, so queries stay, segments of unequal lengths too. Positions say what was.
        """
        assert self.stages.rotation is not None
        keys, values = held.tensors
        last = held.positions.amax(-1, keepdim=True)
        after = held.filled.flip(-1).cumsum(-1).flip(-1) - 1  # tokens of the segment that come after each
        turned = self.stages.rotation.move(keys, held.positions.clamp_min(0), (last - after).clamp_min(0))
        return Slots((turned, values), held.positions, held.full)

    def _hidden(self, positions: Tensor, real: Tensor) -> Bool[Tensor, "batch kv_head slot"] | None:
        """Which held tokens the queries of this forward overlook; None where all are seen."""
        if self.stages.hide is None or not self.whole:
            return None
        hidden = self.stages.hide(self.layer, joined([part.slots() for part in self.whole]), positions, real)
        tokens = int(hidden.sum()) // hidden.shape[1]
        if not tokens:
            return None
        self.stages.acted("select", tokens, 0)
        return hidden

    def _readable_in_blocks(self, query: Tensor) -> bool:
        """Decoding with something packed: every token held is in the past of every query."""
        return query.shape[2] == 1 and len(self.packed) > 0 and not self.stages.reindex

    def _scored(self, *stored: Tensor) -> tuple[Tensor, ...]:
        """What is written down of new tokens: with a running score each, where the selector keeps one."""
        if self.stages.select is None or not self.stages.select.running:
            return stored
        return (*stored, stored[0].new_zeros(*stored[0].shape[:3], 1, dtype=torch.float32))

    def _encoded(self, keys: Tensor, values: Tensor, positions: Tensor, real: Tensor) -> tuple[Tensor, ...]:
        """The new tokens as the project stage writes them down."""
        assert self.stages.project is not None
        stored = self.stages.project.encode(self.layer, keys, values, positions)
        self.widths = (keys.shape[-1], stored[0].shape[-1]), (values.shape[-1], stored[1].shape[-1])
        saved = sum(a.nbytes - b.nbytes for a, b in zip((keys, values), stored, strict=True)) // real.numel()
        if saved:  # bytes of one token
            tokens = int(real.sum())
            self.stages.acted("project", tokens, tokens * saved)
        return stored

    def _rebuilt(self, stored: Slots) -> Slots:
        project = self.stages.project
        if project is None or not stored.tensors:
            return stored
        keys, values = project.decode(self.layer, stored.tensors[:2], stored.positions)
        return Slots((keys, values, *stored.tensors[2:]), stored.positions, stored.full)

    def _add_scores(self, whole: Slots, change: Tensor) -> None:
        """Add to the running scores of the parts and of `whole`, their reading: a copy of them, or a view."""
        changed, start = whole.tensors[2] + change[..., None], 0
        for part in self.whole:
            count = part.slots().positions.shape[-1]
            part.add(2, change[:, :, start : start + count, None])
            start += count
        whole.tensors[2].copy_(changed)

    def _select(
        self,
        query: Tensor,
        step: Step,
        scaling: float | None,
        soft_cap: float | None,
        first: bool,
        module: torch.nn.Module,
        context: Slots | None,
    ) -> None:
        """Let the selector drop whole tokens; what it keeps moves into storage of its own.

        context   `slots()`, where it is known already
        """
        assert self.stages.select is not None
        stored = joined([part.slots() for part in self.whole])
        if self.packed or self.stages.reindex:
            context, count = self.slots() if context is None else context, stored.positions.shape[-1]
            newest = (tensor[:, :, -count:] for tensor in context.tensors)
            shown = Slots((*newest, *stored.tensors[2:]), stored.positions, stored.full)
        else:
            shown = context = self._rebuilt(stored)
        view = View(
            self.layer,
            shown,
            context,
            query,
            step,
            scaling,
            first,
            self.since,
            module,
            functools.partial(self._add_scores, stored),
            state=self.state,
            rotation=self.stages.rotation,
            soft_cap=soft_cap,
        )
        keep = self.stages.select.keep(view)
        if keep is None:
            return
        self.since = 0
        keep = keep.expand(*stored.tensors[0].shape[:3]) & stored.filled
        dropped = int((stored.filled & ~keep).sum())  # of one head each
        if not dropped:
            return
        before = held_bytes(*self.whole)
        self.hold(stored, keep)
        heads = keep.shape[1]
        self.stages.acted("select", dropped // heads, before - held_bytes(*self.whole))


def _alone(keys: Tensor, values: Tensor, positions: Tensor, real: Tensor) -> Slots:
    """The new tokens in slots of their own, as they came."""
    fresh = Recent()
    fresh.append((keys, values), positions, real)
    return fresh.slots()
