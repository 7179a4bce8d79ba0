"""Settings are of the kinds that their class declares: a wrong one is told in words, by name, before anything runs.

    class EvictKV(Settings): keep: float | int = 0.5        EvictKV(keep="half") -> got keep='half', expected a number

Only the kind is looked at here. Which numbers make sense is told by the class's own `__post_init__`, which comes first,
as its words know more and as it may take other kinds and turn them; then, or where it trips, all fields are looked at.
"""

from __future__ import annotations

import builtins
import collections
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import numpy as np

KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", lambda value: isinstance(value, Integral) and type(value) is not bool),
    float: ("a finite number", lambda value: isinstance(value, Real) and type(value) is not bool and _is_finite(value)),
    bool: ("True or False", lambda value: isinstance(value, bool | np.bool_)),
    str: ("a text", lambda value: isinstance(value, str)),
    NoneType: ("None", lambda value: value is None),
}


Bounds = Mapping[str, float | tuple[float, float]]


class Settings:
    """The base of frozen dataclasses of settings. Raises ValueError for a value of another kind than declared.

    bounds   per field, the least that a number may be, or the least and the most: {"n_random": 0, "fdr": (0, 1)}; of a
             tuple each of its numbers, of which there must be one
    """

    bounds: ClassVar[Bounds] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__.get("__post_init__")
        if own is None:
            return

        @functools.wraps(own)
        def checked(self: Any) -> None:
            given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
            try:
                own(self)
            except (TypeError, AttributeError, LookupError, RuntimeError):  # it tripped over a kind it didn't expect
                check_kinds(type(self), given)
                raise
            check_kinds(type(self), vars(self))
            check_bounds(self)

        cls.__post_init__ = checked

    def __post_init__(self) -> None:
        check_kinds(type(self), vars(self))
        check_bounds(self)


def check_kinds(cls: type, given: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the field, if a value for the dataclass `cls` is of another kind than it declares."""
    for name, hint in _declared(cls):
        if not fits(given[name], hint):
            raise ValueError(f"{cls.__name__}: got {name}={_shown(given[name])}, expected {said(hint)}.")


def check_bounds(settings: Settings) -> None:
    """Raise ValueError, naming the field, if a number lies outside the bounds that its class declares."""
    for name, bound in settings.bounds.items():
        least, most = bound if isinstance(bound, tuple) else (bound, math.inf)
        value = getattr(settings, name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not len(numbers):
            raise ValueError(f"{type(settings).__name__}: got {name}={value!r}, expected at least one.")
        if any(isinstance(number, Real) and not least <= float(number) <= most for number in numbers):
            wanted = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            raise ValueError(f"{type(settings).__name__}: got {name}={_shown(value)}, expected {wanted}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the kind that a hint declares; hints of other libraries, of calls and of Any fit all."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return isinstance(value, str | int) and value in get_args(hint)
    if origin is tuple:
        each = get_args(hint)
        many = each[1:] == (...,) and isinstance(value, list | tuple)
        return isinstance(value, list | tuple | Mapping) and (not many or all(fits(item, each[0]) for item in value))
    if hint in KINDS:
        return KINDS[hint][1](value)
    ours = isinstance(hint, type) and hint.__module__.startswith("workbench") and not getattr(hint, "_is_protocol", 0)
    return not ours or isinstance(value, hint)


def said(hint: Any) -> str:
    """A kind in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _listed([word for part in parts if not (part is int and float in parts) for word in _words(part)])
    if origin is tuple:
        return f"a tuple, each {said(parts[0])}" if parts[1:] == (...,) else "a tuple"
    return _listed(_words(hint))


@functools.cache
def _declared(cls: type) -> tuple[tuple[str, Any], ...]:
    """Name and kind of each field; a name that type checkers alone know stands for anything."""
    found = []
    for field in dataclasses.fields(cls):
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        names = collections.defaultdict(lambda: Any, vars(builtins) | vars(sys.modules[owner.__module__]))
        hint = eval(field.type, {}, names) if isinstance(field.type, str) else field.type
        found.append((field.name, NoneType if hint is None else hint))
    return tuple(found)


def _words(hint: Any) -> list[str]:
    """A kind as words of which one must be true."""
    if get_origin(hint) is Literal:
        return list(map(repr, get_args(hint)))
    if get_origin(hint) is not None:
        return [said(hint)]
    return [KINDS[hint][0] if hint in KINDS else f"a {getattr(hint, '__name__', hint)}"]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: Any, longest: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[:longest]}…"


def _is_finite(value: Any) -> bool:
    return math.isfinite(value)
