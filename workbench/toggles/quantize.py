"""Hold keys and values in 2, 4 or 8 bits: keys in groups along tokens, values in groups along channels.

x_hat = c s + min per group; the newest tokens and the first ones stay whole. The prompt attends exactly; only what is
read back later is rounded. Source: KIVI, Liu et al., 2024 (arXiv 2402.02750).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from workbench.cache.packed import WHOLE, Format, PackStore
from workbench.cache.packing import BITS
from workbench.cache.stages import use_stage
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class QuantizeKV(Toggle):
    """A cache in few bits.

    key_bits, value_bits   2, 4, 8 or 16 (left whole), or one number per layer
    group      numbers that share a step: tokens of a channel for keys, channels of a token for values
    residual   newest tokens that stay whole (between this many and one unit more)
    sinks      first tokens that stay whole: their large norms would ruin a group
    """

    key_bits: int | tuple[int, ...] = 4
    value_bits: int | tuple[int, ...] = 4
    group: int = 32
    residual: int = 128
    sinks: int = 4

    claims: ClassVar[frozenset[str]] = frozenset({"kv.store"})

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            given = getattr(self, name)
            bits = tuple(given) if isinstance(given, Iterable) else (given,)
            if not bits or any(bit not in (*BITS, WHOLE) for bit in bits):
                raise ValueError(f"QuantizeKV: got {name}={given}, expected 2, 4, 8 or 16, or one of them per layer.")
            if isinstance(given, Iterable):
                object.__setattr__(self, name, bits)
        for name, least in (("group", 1), ("residual", 0), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"QuantizeKV: got {name}={getattr(self, name)}, expected at least {least}.")

    def formats(self, n_layers: int) -> tuple[Format, ...]:
        """The format of each layer."""
        pairs = []
        for name in ("key_bits", "value_bits"):
            given = getattr(self, name)
            per_layer = given if isinstance(given, tuple) else (given,) * n_layers
            if len(per_layer) != n_layers:
                raise ValueError(f"QuantizeKV: got {len(per_layer)} {name}, expected one per layer, {n_layers}.")
            pairs.append(per_layer)
        return tuple(Format(keys, values, self.group) for keys, values in zip(*pairs, strict=True))

    def install(self, subject: Subject, undo: ExitStack) -> None:
        formats = self.formats(subject.n_layers)
        if all(min(form.key_bits, form.value_bits) == WHOLE for form in formats):
            return
        use_stage(subject, "store", PackStore(formats, self.residual, self.sinks), undo)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return (cls(4, 4, group=4, residual=1, sinks=1), cls(8, 2, group=3, residual=0, sinks=0))

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(WHOLE, WHOLE)

    def __str__(self) -> str:
        return f"QuantizeKV(keys {_said(self.key_bits)}, values {_said(self.value_bits)} bits)"


def _said(bits: int | tuple[int, ...]) -> str:
    return str(bits) if isinstance(bits, int) else "/".join(map(str, bits))
