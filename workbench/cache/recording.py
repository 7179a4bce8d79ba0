"""What attention reads: the queries, keys and values of every layer of one forward, as they come by.

see(Read) is called inside each layer's attention, rotated keys and all, and nothing is kept: memory is one layer's.
Source: this project, on transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.cache.stages import eager_attention, refuse_own_attention
from workbench.pruned.blocks import blocks_of_slots

if TYPE_CHECKING:
    from workbench.subject import Subject

NAME = "workbench_recording"


@dataclass(frozen=True, eq=False)
class Read:
    """One layer's attention in one forward; keys and values as a cache holds them."""

    layer: int
    query: Float[Tensor, "batch head seq d_head"]
    keys: Float[Tensor, "batch kv_head seq d_head"]
    values: Float[Tensor, "batch kv_head seq d_value"]
    scaling: float | None
    soft_cap: float | None


def packable_layers(subject: Subject) -> tuple[int, ...]:
    """The layers whose cache holds every token and can be packed: not sliding-window and recurrent ones.

    Raises ValueError where the model computes attention in a way of its own.
    """
    refuse_own_attention(subject)
    layers = DynamicCache(config=_trunk(subject).config).layers
    if not layers:  # an empty cache grows a plain layer for each of the model's
        return tuple(range(subject.n_layers))
    return tuple(index for index, layer in enumerate(layers) if type(layer) is DynamicLayer)


@contextmanager
def attention_seen(subject: Subject, see: Callable[[Read], None]) -> Iterator[None]:
    """Forwards in this block show `see` what the attention of each layer reads; it computes what it always did.

    Raises ValueError under key/value toggles, whose layers read something else than new keys and values. One at a time.
    """
    if subject.stages:
        raise ValueError(f"attention_seen: {subject.stages} acts on the cache. Look at its layers instead.")
    refuse_own_attention(subject)
    config: Any = _trunk(subject).config
    before = config._attn_implementation_internal
    if before == NAME:
        raise ValueError("attention_seen: another block is looking already. Leave it first.")
    blocks = blocks_of_slots(subject.model, subject.anatomy)
    plain, mask = ALL_ATTENTION_FUNCTIONS.get(before), ALL_MASK_ATTENTION_FUNCTIONS[before]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        see(Read(_layer_of(module, blocks), query, key, value, options.get("scaling"), options.get("softcap")))
        compute = plain or eager_attention(module)
        return compute(module, query, key, value, attention_mask, **options)

    # Registered for all, not set on the one instance: masks are only made for names that all know.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        ALL_ATTENTION_FUNCTIONS.register(NAME, _over)  # what `see` holds must not live on in a registry


def _over(*args: Any, **options: Any) -> Any:
    raise AssertionError("attention_seen: its block is over.")


def _trunk(subject: Subject) -> Any:
    return subject.model.get_submodule(subject.anatomy.trunk)


def _layer_of(module: nn.Module, blocks: dict[int, int]) -> int:
    layer = vars(module).get("layer_idx")  # what the module itself tells its cache
    if not isinstance(layer, int):
        raise ValueError(f"attention_seen: {type(module).__name__} does not say which layer it is.")
    return blocks.get(layer, layer)
