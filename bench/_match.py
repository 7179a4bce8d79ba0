"""One line of the table: this project's way and a peer's way of the same work, measured in turns.

A side is a function that does the work once and tells what it measured: {"seconds": 0.12}, or several measures of one
run. In every round both sides run once; the ratio of a round is peer / ours, so that what slows the machine for a while
is in both. Told are medians and quartiles over rounds. What fails becomes a row in words, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from bench._timing import seconds_of

Side = Callable[[], Mapping[str, float]]
Row = dict[str, object]


class Unavailable(RuntimeError):
    """A peer that is not here, with the reason."""


@dataclass(frozen=True)
class Match:
    """Two sides of the same work.

    what      the work with its sizes       name    what does it here       peer    what does it there
    version   of the peer: text, or a function that is asked after the peer has run
    check     proves that both do the same work, and says how exactly; raises where they differ
    rounds    None: as many as the table gives      warm    whether a round that doesn't count comes first
    """

    what: str
    name: str
    peer: str
    ours: Side
    theirs: Side
    version: str | Callable[[], str] = ""
    check: Callable[[], str] | None = None
    rounds: int | None = None
    warm: bool = True


def timed(run: Callable[[], object], scale: float = 1.0) -> Side:
    """A side that is measured in seconds; `scale`, where only a part of the work is done as all of it takes long."""
    return lambda: {"seconds": scale * seconds_of(run)}


def version_of(library: str) -> str:
    """A library of this environment with its version."""
    return f"{library} {metadata.version(library)}"


def rows_of(match: Match, rounds: int) -> list[Row]:
    """The rows of one match: one for each thing measured, or one in words where a side failed."""
    start: Row = {"what": match.what, "name": match.name, "peer": match.peer, "failed": ""}
    side = "the check"
    try:
        agreement = match.check() if match.check else ""
        pairs: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
        for turn in range((match.rounds or rounds) + match.warm):
            side = "ours"
            ours = match.ours()
            side = "the peer"
            theirs = match.theirs()
            if turn or not match.warm:
                pairs.append((ours, theirs))
        version = match.version if isinstance(match.version, str) else match.version()
        start |= {"version": version, "agreement": agreement, "rounds": len(pairs)}
        side = "ours"
        return [start | numbers(measure, [(a[measure], b[measure]) for a, b in pairs]) for measure in pairs[0][0]]
    # Everything, on purpose: a peer is other people's code and may raise anything, and the other rows are still wanted.
    # Nothing is hidden: the row says whose error it was and which, and one of ours ends the bench with status 1.
    except Exception as error:
        side = "the peer" if isinstance(error, Unavailable) else side
        return [start | {"failed": side, "note": in_words(error)}]


def numbers(measure: str, pairs: list[tuple[float, float]]) -> Row:
    """Medians and quartiles of both sides and of the ratio peer / ours, which is taken round by round."""
    ours, theirs = np.array(pairs, dtype=np.float64).T
    if not (ours > 0).all():
        raise ValueError(f"bench: {measure} of ours is {ours.min():g} in a round; a ratio needs more than 0")
    row: Row = {"measure": measure, "here_rounds": ours.tolist(), "there_rounds": theirs.tolist()}
    for name, values in (("here", ours), ("there", theirs), ("ratio", theirs / ours)):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        row |= {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}
    return row


def in_words(error: BaseException) -> str:
    """One line of at most 200 characters for an error."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if isinstance(error, Unavailable) else f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 200 else text[:199] + "…"


def short(value: float) -> str:
    """Three digits that count, or all before the point: 0.0123, 1.23, 1,234; two and a power of ten below 0.01."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits <= 4 else f"{value:.1e}"
