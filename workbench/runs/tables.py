"""Two tables, or two arrays, that should be the same: what differs, in words, with the largest relative difference.

relative difference of a and b = |a - b| / max(|a|, |b|); NaN equals NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd


def table_differences(a: pd.DataFrame, b: pd.DataFrame) -> list[str]:
    """What differs between two tables, a sentence each: columns, types, the number of rows, then values by column."""
    said = []
    for name, one, other in (("first", a, b), ("second", b, a)):
        only = [str(column) for column in one.columns if column not in other.columns]
        said += [f"only the {name} has column {', '.join(only)}"] if only else []
    common = [column for column in a.columns if column in b.columns]
    if not said and list(a.columns) != list(b.columns):
        said.append("the columns come in another order")
    for column in common:
        if a[column].dtype != b[column].dtype:
            said.append(f"{column} holds {a[column].dtype} in the first, {b[column].dtype} in the second")
    if len(a) != len(b):
        return [*said, f"{len(a)} rows in the first, {len(b)} in the second"]
    for column in common:
        said += value_differences(str(column), a[column].to_numpy(), b[column].to_numpy(), "rows")
    return said


def array_differences(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[str]:
    """What differs between two sets of named arrays, a sentence each."""
    said = []
    for name in dict.fromkeys((*a, *b)):
        if name not in a or name not in b:
            said.append(f"only the {'first' if name in a else 'second'} has array {name}")
        elif a[name].shape != b[name].shape:
            said.append(f"{name} has shape {a[name].shape} in the first, {b[name].shape} in the second")
        else:
            said += value_differences(name, a[name].ravel(), b[name].ravel(), "values")
    return said


def value_differences(name: str, a: np.ndarray, b: np.ndarray, what: str) -> list[str]:
    """At most one sentence: how many of two equally long columns' entries differ, and by how much or where first."""
    if a.dtype.kind in "iufb" and b.dtype.kind in "iufb":
        wide = [np.asarray(values, dtype=np.float64) for values in (a, b)]
        same = (a == b) | (np.isnan(wide[0]) & np.isnan(wide[1]))
        if same.all():
            return []
        return [f"{name}: {int((~same).sum())} of {len(a)} {what} differ, {_how_far(wide[0][~same], wide[1][~same])}"]
    places = [place for place, (x, y) in enumerate(zip(a, b, strict=True)) if not _equal(x, y)]
    if not places:
        return []
    first = f"first in {places[0]}: {_short(a[places[0]])} and {_short(b[places[0]])}"
    return [f"{name}: {len(places)} of {len(a)} {what} differ, {first}"]


def relative_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each pair, in float64; NaN where only one is finite, or one is NaN."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size = np.maximum(np.abs(a), np.abs(b))
    finite = np.isfinite(size)
    apart = np.abs(np.where(finite, a, 0.0) - np.where(finite, b, 0.0))
    return np.where(finite, apart / np.where(size > 0, size, 1.0), np.nan)


def _how_far(a: np.ndarray, b: np.ndarray) -> str:
    far = relative_difference(a, b)
    if np.isnan(far).all():
        return "none of them finite in both"
    place, n_other = int(np.nanargmax(far)), int(np.isnan(far).sum())
    other = f"; {n_other} of them not finite in both" if n_other else ""
    return f"at most by {far[place]:.2g} relative, {a[place]:.9g} and {b[place]:.9g}{other}"


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, np.ndarray | list | tuple | dict) or isinstance(y, np.ndarray | list | tuple | dict):
        return repr(x) == repr(y)
    if pd.isna(x) or pd.isna(y):
        return bool(pd.isna(x) and pd.isna(y))
    return bool(x == y)


def _short(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else f"{text[:59]}…"
