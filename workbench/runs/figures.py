"""The kept figures of two runs: titles, traces and the data in them; the signature of a run is no difference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from typing import Any

from workbench.folder import figure_title
from workbench.signature import unsigned


def figure_differences(
    first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]], timed: Set[str] = frozenset()
) -> Iterator[tuple[str, str]]:
    """(name of a figure, what differs); those named in `timed` show measured times and are left out."""
    for name in dict.fromkeys((*first, *second)):
        if name not in first or name not in second:
            yield name, f"only the {'first' if name in first else 'second'} run kept it"
        elif name not in timed:
            yield from ((name, how) for how in _said(unsigned(first[name]), unsigned(second[name])))


def _said(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    if _text(one) == _text(other):
        return
    titles = figure_title(one), figure_title(other)
    if titles[0] != titles[1]:
        yield f"titled {titles[0]!r} in the first, {titles[1]!r} in the second"
    traces = one.get("data", []), other.get("data", [])
    if len(traces[0]) != len(traces[1]):
        yield f"{len(traces[0])} traces in the first, {len(traces[1])} in the second"
        return
    for place, (a, b) in enumerate(zip(*traces, strict=True)):
        if differing := [part for part in dict.fromkeys((*a, *b)) if _text(a.get(part)) != _text(b.get(part))]:
            yield f"trace {a.get('name') or place!r} differs in {', '.join(differing)}"
    layouts = [{k: v for k, v in figure.get("layout", {}).items() if k != "title"} for figure in (one, other)]
    if _text(layouts[0]) != _text(layouts[1]):
        differing = [
            part
            for part in dict.fromkeys((*layouts[0], *layouts[1]))
            if _text(layouts[0].get(part)) != _text(layouts[1].get(part))
        ]
        yield f"the layout differs in {', '.join(differing)}"


def _text(data: Any) -> str:
    return json.dumps(data, sort_keys=True)
