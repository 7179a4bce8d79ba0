"""The notebook that a run executed: its source as it was before, and where another one differs.

What the runner added goes: the cell with the parameters put in, outputs, counts, times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from workbench import storage
from workbench.parameters import TAG

INJECTED = "injected-parameters"  # papermill's tag
ERRORS = ("papermill-error-cell-tag",)  # of cells that papermill puts in where a run fails


def source_of(executed: dict[str, Any]) -> dict[str, Any]:
    """The notebook, as nbformat's JSON, from which an executed one was made."""
    cells = []
    for cell in executed["cells"]:
        if {INJECTED, *ERRORS} & set(cell.get("metadata", {}).get("tags", [])):
            continue
        plain = {part: cell[part] for part in ("cell_type", "id", "source") if part in cell}
        tags = cell.get("metadata", {}).get("tags")
        plain["metadata"] = {"tags": tags} if tags else {}
        if cell["cell_type"] == "code":
            plain |= {"outputs": [], "execution_count": None}
        cells.append(plain)
    known = {name: value for name, value in executed.get("metadata", {}).items() if name != "papermill"}
    return {"nbformat": executed["nbformat"], "nbformat_minor": executed["nbformat_minor"]} | {
        "metadata": known,
        "cells": cells,
    }


def code_of(path: Path) -> dict[int, str] | None:
    """Place in the notebook -> source of each code cell but the parameters; None without a notebook."""
    if not path.exists():
        return None
    cells = source_of(storage.read_json(path))["cells"]
    return {
        place: "".join(cell["source"]).strip()
        for place, cell in enumerate(cells)
        if cell["cell_type"] == "code" and TAG not in cell["metadata"].get("tags", [])
    }


def code_differences(first: dict[int, str] | None, second: dict[int, str] | None) -> Iterator[tuple[str, str]]:
    """(which cell, how it differs) between the code of two notebooks, cell by cell in their order."""
    if first is None or second is None:
        if first is not second:
            yield "notebook", f"only the {'first' if second is None else 'second'} run stored one"
        return
    one, other = list(first.items()), list(second.values())
    if len(one) != len(other):
        yield "cells", f"{len(one)} code cells in the first, {len(other)} in the second"
    for (place, source), changed in zip(one, other, strict=False):
        if source != changed:
            yield f"cell {place}", _first_line(source, changed)


def _first_line(one: str, other: str) -> str:
    lines = _padded(one.splitlines(), other.splitlines())
    a, b = next((a, b) for a, b in lines if a != b)
    return f"{a.strip() or 'nothing'} became {b.strip() or 'nothing'}"


def _padded(one: Sequence[str], other: Sequence[str]) -> list[tuple[str, str]]:
    length = max(len(one), len(other))
    return list(zip([*one, *[""] * (length - len(one))], [*other, *[""] * (length - len(other))], strict=True))
