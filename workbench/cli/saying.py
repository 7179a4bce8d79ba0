"""What several commands read from their words, and how they print: findings, failures, tables, sizes."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from workbench.run import Run

FINDING_LINES = 5
N = TypeVar("N", int, float)


def print_findings(runs: Sequence[Run]) -> None:
    """Print up to five findings, the first of every run before the second of any."""
    ranked = sorted((rank, n, line) for n, run in enumerate(runs) for rank, line in enumerate(run.findings))
    for _, _, line in sorted(ranked[:FINDING_LINES], key=lambda item: (item[1], item[0])):
        print(f"  {line}")


def print_failure(run: Run, file: TextIO | None = None) -> None:
    """Print where and why a run failed, and where it is kept, by default to stderr."""
    file = file or sys.stderr
    error = run.manifest["error"]
    where = "" if error.get("cell") is None else f" in cell {error['cell']}"
    print(f"failed{where}: {error['kind']}; everything is kept in {run.folder}", file=file)
    for line in [*error.get("source", "").splitlines(), "", *error["lines"]]:
        print(f"  {line}".rstrip(), file=file)


def pairs(words: Sequence[str]) -> dict[str, str]:
    """Name and text of each `-p name=value`."""
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"-p: got {word!r}, expected NAME=VALUE.")
        if name in given:
            raise ValueError(f"-p: {name} is given twice, expected once.")
        given[name] = value
    return given


def seconds(text: str) -> float:
    """A length of time on the command line, above 0."""
    return _above_0(text, float, "seconds above 0")


def count(text: str) -> int:
    """A number of things on the command line, at least 1."""
    return _above_0(text, int, "a whole number of at least 1")


def _above_0(text: str, kind: Callable[[str], N], expected: str) -> N:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return value


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Collection[str] = ()) -> None:
    """Print rows below their columns, aligned; columns named in `right` to the right. A terminal's width is kept."""
    texts = [list(columns), *([_one_line(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    last = len(columns) - 1
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in texts:
        cells = [
            text.rjust(width) if name in right else text if place == last else text.ljust(width)
            for place, (name, text, width) in enumerate(zip(columns, row, widths, strict=True))
        ]
        line = "  ".join(cells).rstrip()
        print(line if room is None or len(line) <= room else line[: room - 1] + "…")


def bytes_said(size_bytes: float) -> str:
    """A number of bytes in the unit that suits it."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def _one_line(value: object) -> str:
    """A value as text in which no character moves the cursor of a terminal."""
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    return "".join(char if char.isprintable() else " " for char in text)
