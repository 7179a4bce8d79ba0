"""Values computed once per key, and few of them: what was not asked for longest is forgotten first.

memo(key, compute) is compute() at the first asking and the same object after that. The key must hold everything that
decides the value. Source: own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """At most `limit` values by key.

    computed   how often a value was computed, by the first item of keys that are tuples, else by the key
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"Memo: got limit={limit}, expected room for at least one value.")
        self.limit = limit
        self.computed: Counter[Hashable] = Counter()
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def __call__(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key not in self._values:
            self._values[key] = compute()
            self.computed[key[0] if isinstance(key, tuple) else key] += 1
        self._values.move_to_end(key)
        value = self._values[key]
        while len(self._values) > self.limit:
            self._values.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._values)
