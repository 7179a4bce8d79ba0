"""The kept results of two runs: the same bytes, else which tables, arrays and settings differ, and by how much.

A result may declare fields that hold measured times (`clocks`): no two runs share those, so they are set equal first.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import load_file

from workbench import storage
from workbench.runs.tables import array_differences, table_differences

MOST_ARRAYS = 3  # that are described one by one; a table says the same more readably


def result_differences(first: Path, second: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(name of a result, what differs) for two folders of results, and the clocks of those equal but for them."""
    names = [{path.parent.name for path in folder.glob("*/result.json")} for folder in (first, second)]
    found: list[tuple[str, str]] = []
    clocks: dict[str, str] = {}
    for name in sorted(names[0] | names[1]):
        if not all(name in known for known in names):
            found.append((name, f"only the {'first' if name in names[0] else 'second'} run kept it"))
        elif said := list(_said(first / name, second / name)):
            timed = _equal_but_for_clocks(first / name, second / name)
            if timed:
                clocks[name] = timed
            else:
                found += [(name, how) for how in said]
    return found, clocks


def _said(first: Path, second: Path) -> Iterator[str]:
    """What differs between two saved results of one name."""
    one, other = (storage.read_json(folder / "result.json") for folder in (first, second))
    if one["class"] != other["class"]:
        yield f"a {one['class']} in the first, a {other['class']} in the second"
    for name in sorted({*one["files"], *other["files"]}, key=lambda name: (name != "table", name)):  # the table first
        if name not in one["files"] or name not in other["files"]:
            yield f"only the {'first' if name in one['files'] else 'second'} has {name}"
            continue
        paths = first / one["files"][name], second / other["files"][name]
        if paths[0].read_bytes() != paths[1].read_bytes():
            yield from (f"{name}: {how}" for how in _values(name, *paths))
    fields = one["fields"], other["fields"]
    for name in dict.fromkeys((*fields[0], *fields[1])):
        if json.dumps(fields[0].get(name)) != json.dumps(fields[1].get(name)):
            yield f"field {name} differs"


def _values(name: str, first: Path, second: Path) -> list[str]:
    """What differs in two files whose bytes do."""
    if name == "arrays":
        said = array_differences(load_file(first), load_file(second))
        if len(said) > MOST_ARRAYS:
            said = [f"{len(said)} of them differ: {', '.join(re.split('[: ]', line)[0] for line in said)}"]
    else:
        said = table_differences(pd.read_parquet(first), pd.read_parquet(second))
    return said or ["the bytes differ, every value is equal"]


def _equal_but_for_clocks(first: Path, second: Path) -> str:
    """The names of the fields that hold measured times, if two results are equal once these are; else nothing."""
    from workbench.result import Result  # here: it imports torch, which equal results do without

    try:
        one, other = Result.load(first), Result.load(second)
    except (ValueError, TypeError, ImportError):  # a class of a notebook, or one that this version no longer has
        return ""
    if type(one) is not type(other) or not one.clocks or _parts(one) == _parts(other):
        return ""
    other = dataclasses.replace(other, **{name: getattr(one, name) for name in one.clocks})
    return ", ".join(one.clocks) if _parts(one) == _parts(other) else ""


def _parts(result: Any) -> list[Any]:
    """Everything that a result would save but its provenance, in a form that compares."""
    arrays, tables, settings = result._sorted_fields()
    every = {"table": result.table()} | tables
    saved = {name: table.to_parquet(index=False) for name, table in every.items()}
    return [{name: array.tobytes() for name, array in arrays.items()}, saved, json.dumps(settings, sort_keys=True)]
