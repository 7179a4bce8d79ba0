"""Bytes that a key/value cache holds, counted by storage: a view must not pass for memory given back.

bytes = sum over distinct storages of their size, scales and indices of packed layers included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def cache_bytes(cache: Any) -> int:
    """Bytes of all distinct tensor storages that the layers of a transformers Cache hold."""
    return held_bytes(*cache.layers)


def held_bytes(*parts: Any) -> int:
    """Bytes of all distinct tensor storages in the attributes of these objects."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(parts)}
    return sum(storages.values())


def _tensors(parts: Sequence[Any]) -> Iterator[Tensor]:
    waiting = [vars(part) for part in parts]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
        elif type(item).__module__.startswith("workbench") and id(item) not in seen:  # a part of one of our layers
            seen.add(id(item))
            waiting.append(vars(item))
