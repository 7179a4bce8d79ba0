"""Bytes that a key/value cache holds, counted by storage: a view must not pass for memory given back.

bytes = sum over distinct storages of their size, scales and indices of packed layers included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

SHARED = {"stages"}  # what every layer refers to and none holds: weights of a selector or a projection are no cache


def cache_bytes(cache: Any) -> int:
    """Bytes of all distinct tensor storages that the layers of a transformers Cache hold."""
    return held_bytes(*cache.layers)


def held_bytes(*parts: Any) -> int:
    """Bytes of all distinct tensor storages in the attributes of these objects."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(parts)}
    return sum(storages.values())


def accounts(cache: Any) -> list[dict[str, Any]]:
    """Where the bytes of a cache lie: rows of layer, part, bytes and numbers; their bytes sum to `cache_bytes`.

    part      codes_k, codes_v, scale, zero of packed tokens; keys, values of whole ones; sinks that a store left whole;
              index (positions and counts), scores, idle (room for tokens to come), state (what else a layer remembers)
    numbers   keys and values that the part stands for, 0 where it stands for none. So 8 x bytes / numbers over the
              parts that stand for some are the nominal bits that papers count, and over all parts the real ones.
    """
    rows = []
    for number, layer in enumerate(cache.layers):
        found = layer.accounts() if isinstance(layer, Accounted) else _plain(layer)
        sums: dict[str, list[int]] = {}
        for part, size, numbers in found:
            entry = sums.setdefault(part, [0, 0])
            entry[0], entry[1] = entry[0] + size, entry[1] + numbers
        sums["state"] = [held_bytes(layer) - sum(size for size, _ in sums.values()), 0]
        rows += [
            {"layer": number, "part": part, "bytes": size, "numbers": numbers}
            for part, (size, numbers) in sums.items()
            if size
        ]
    return rows


@runtime_checkable
class Accounted(Protocol):
    """A layer or a part of one that can say where its bytes lie."""

    def accounts(self) -> Iterator[tuple[str, int, int]]:
        """Part, bytes, and the keys and values that it stands for."""
        ...


def _plain(layer: Any) -> Iterator[tuple[str, int, int]]:
    """A layer that transformers made."""
    for part in ("keys", "values"):
        tensor = vars(layer).get(part)
        if isinstance(tensor, Tensor):
            yield part, tensor.nbytes, tensor.numel()
            yield "idle", tensor.untyped_storage().nbytes() - tensor.nbytes, 0


def _tensors(parts: Sequence[Any]) -> Iterator[Tensor]:
    waiting: list[Any] = [_own(part) for part in parts]
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
            waiting.append(_own(item))


def _own(item: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(item).items() if name not in SHARED}
