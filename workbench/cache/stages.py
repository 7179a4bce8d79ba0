"""Stages: what the active toggles do to each cache layer, and how every forward comes to use such a cache.

One pre-hook on the decoder replaces a missing or fresh `past_key_values`; one attention function, registered with
transformers under a name of its own, reads the layers. Both are put back when the last stage leaves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.cache.layer import KVLayer, View
from workbench.pruned.blocks import blocks_of_slots

if TYPE_CHECKING:
    from workbench.cache.rotation import Rotation
    from workbench.cache.segments import Slots
    from workbench.subject import Subject
    from workbench.toggle import Receipt, Toggle

PREFIX = "workbench_kv_"


class Project(Protocol):
    """How a token is written down: keys and values to other tensors and back."""

    @property
    def exact(self) -> bool:
        """Whether new tokens attend to themselves exactly, in the forward that brings them."""
        ...

    def encode(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, ...]: ...

    def decode(self, layer: int, stored: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]: ...


class Selector(Protocol):
    """Which tokens live on."""

    @property
    def running(self) -> bool:
        """Whether it wants one running score per token and head, kept beside them."""
        ...

    def keep(self, view: View) -> Bool[Tensor, "batch kv_head slot"] | None:
        """True at the slots to keep (one head stands for all); None where nothing is to be dropped now."""
        ...


class Hide(Protocol):
    """Which held tokens the queries of one forward overlook."""

    def __call__(self, layer: int, held: Slots, positions: Tensor, real: Tensor) -> Bool[Tensor, "batch kv_head slot"]:
        """True at hidden slots; `held` with running scores, `positions` and `real` (batch, seq) of the new tokens."""
        ...


class Store(Protocol):
    """In which number format tokens are held."""

    def pack(self, layer: KVLayer) -> None:
        """Move what is due from `layer.kept` and `layer.recent` into `layer.packed`."""
        ...


@dataclass(eq=False)
class Stages:
    """The stages of the active toggles, in the order in which every cache layer runs them.

    piece      tokens that are read at once where a text is read, not generated: each attends to the cache as it is;
               None: a text can't be read in pieces
    chunk      tokens of a prompt that `Subject.generate` reads at once, so that selections bound the memory; None: all
    hide       whether held tokens are to be overlooked in one forward, though they stay
    rotation   how the model turns keys by their positions, where a stage has to know
    reindex    kept keys stand contiguously right before the next token, whatever lay between them
    """

    project: Project | None = None
    select: Selector | None = None
    store: Store | None = None
    piece: int | None = 1
    chunk: int | None = None
    hide: Hide | None = None
    rotation: Rotation | None = None
    reindex: bool = False
    receipts: dict[str, Receipt] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.receipts)

    def __str__(self) -> str:
        return " | ".join(str(receipt.toggle) for receipt in self.receipts.values()) or "no key/value toggle"

    @property
    def toggles(self) -> dict[str, Toggle]:
        """The toggle behind each stage."""
        return {stage: receipt.toggle for stage, receipt in self.receipts.items()}

    def acted(self, stage: str, tokens: int, bytes_freed: int) -> None:
        """Count in the receipt of a stage's toggle what it did."""
        receipt = self.receipts[stage]
        receipt.fired += 1
        receipt.sums["tokens"] = receipt.sums["tokens"] + tokens
        receipt.bytes_freed += bytes_freed


def use_stage(
    subject: Subject, stage: Literal["project", "select", "store"], what: Project | Selector | Store, undo: ExitStack
) -> None:
    """Let every cache of `subject` run `what` as one of its stages until `undo` closes.

    Raises ValueError where the model computes attention in a way of its own, so that no cache layer could be read.
    """
    stages = subject.stages
    if not stages:
        _host(subject, undo)
    stages.receipts[stage] = subject.receipt
    undo.callback(stages.receipts.pop, stage)
    setattr(stages, stage, what)
    undo.callback(setattr, stages, stage, None)


def _host(subject: Subject, undo: ExitStack) -> None:
    """Make the caches and the attention of the model ours."""
    trunk, stages = subject.model.get_submodule(subject.anatomy.trunk), subject.stages
    config: Any = trunk.config
    before = config._attn_implementation_internal
    refuse_own_attention(subject)
    name = _registered(before)
    config._attn_implementation_internal = name
    undo.callback(setattr, config, "_attn_implementation_internal", before)
    signature = inspect.signature(type(trunk).forward)

    def provide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = signature.bind_partial(module, *args, **kwargs).arguments
        cache, wanted = given.get("past_key_values"), given.get("use_cache")
        if isinstance(cache, KVCache):
            if cache.toggles != stages.toggles:
                raise ValueError(
                    f"cache: got a cache made under other key/value toggles than {stages}. Start from an empty one: "
                    "what was dropped or packed can't be adopted."
                )
            return None
        if cache is None and not (config.use_cache if wanted is None else wanted):
            return None
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"cache: got a cache that was filled without {stages}. Start from an empty one: "
                "what was read before the toggle acted can't be compressed afterwards."
            )
        if "past_key_values" not in kwargs and cache is not None:
            raise ValueError("cache: pass past_key_values by its name under key/value toggles.")
        return args, kwargs | {"past_key_values": KVCache(subject, config)}

    undo.callback(trunk.register_forward_pre_hook(provide, with_kwargs=True).remove)


class KVCache(Cache):
    """A transformers Cache whose full-attention layers run the stages; others are what transformers makes them."""

    def __init__(self, subject: Subject, config: Any) -> None:
        plain = DynamicCache(config=config).layers
        blocks = blocks_of_slots(subject.model, subject.anatomy)  # not the same where blocks are dropped
        layers = [
            KVLayer(blocks.get(slot, slot), subject.stages, lambda: subject.step)
            if type(layer) is DynamicLayer
            else layer
            for slot, layer in enumerate(plain)
        ]
        super().__init__(layers=layers)
        self.toggles = subject.stages.toggles
        alone = sum(type(layer) is not DynamicLayer for layer in plain)
        if alone:
            note = f"{alone} sliding-window or recurrent layers left alone"
            for receipt in subject.stages.receipts.values():
                receipt.notes[:] = [*(n for n in receipt.notes if n != note), note]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens of every layer, or of none; see `KVLayer.check_crop`."""
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)


def _registered(implementation: str) -> str:
    """The name under which transformers knows our attention beside `implementation`, which other layers go on using."""
    name = PREFIX + implementation.removeprefix(PREFIX)
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(implementation))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _attention(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(key, KVLayer):
            plain = ALL_ATTENTION_FUNCTIONS.get(implementation) or eager_attention(module)
            return plain(module, query, key, value, attention_mask, **options)
        if options.get("s_aux") is not None:
            raise ValueError("cache: attention with sink parameters is not supported under key/value toggles.")
        out = key.attend(query, module, options.get("scaling"), options.get("softcap"))
        return out.transpose(1, 2).contiguous(), None

    return attention


def eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of a model's own file."""
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"]


def refuse_own_attention(subject: Subject) -> None:
    file = vars(sys.modules[type(subject.model).__module__])
    if "ALL_ATTENTION_FUNCTIONS" not in file:
        raise ValueError(
            f"cache: {type(subject.model).__name__} computes attention in its own way, not through transformers' "
            "attention interface; key/value toggles can't act on it. Choose a model of another family."
        )
