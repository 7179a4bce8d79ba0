"""What a desk shows for one setting: a figure, texts side by side, coloured tokens, facts, and code that does the same.

A picture is made of plain values; a face draws it with widgets, `html` prints it without any. Source: own.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from workbench.look import DESK_STYLE
from workbench.result import Result
from workbench.widgets.strip import Strip

STYLE = f"<style>{DESK_STYLE}</style>"


@dataclass(frozen=True)
class Pane:
    """Lines under a title, beside other panes; each is (what was given, what came), the second in bold."""

    title: str
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Fact:
    """One number that a picture tells, with its unit and, where there is one, its interval."""

    measure: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        number = f"{self.value:.0%}" if self.unit == "share" else f"{self.value:,.4g}"
        unit = "" if self.unit in ("", "share") else f" {self.unit}"
        if self.low is None or self.high is None:
            return number + unit
        ends = [f"{end:.0%}" if self.unit == "share" else f"{end:,.3g}" for end in (self.low, self.high)]
        return f"{number}{unit} [{ends[0]}, {ends[1]}]"


@dataclass(frozen=True, eq=False)
class Picture:
    """What there is to see.

    figure  its title is the finding         panes   texts side by side
    strip   coloured tokens                  picks   the setting that a selected token sets to its index; "": none
    facts   numbers in words                 words   what should be known about this setting, such as why it is idle
    code    Python that does the same without the desk
    """

    figure: go.Figure
    panes: tuple[Pane, ...] = ()
    strip: Strip | None = None
    picks: str = ""
    facts: tuple[Fact, ...] = ()
    words: str = ""
    code: str = ""

    def value(self, measure: str) -> float:
        """The number of the fact of that name."""
        found = {fact.measure: fact.value for fact in self.facts}
        if measure not in found:
            raise ValueError(f"picture: got {measure!r}, expected one of {', '.join(found) or 'no facts at all'}.")
        return found[measure]

    def html(self) -> str:
        """All but the figure as HTML without scripts: what a face, a batch notebook and an exported page show."""
        return self.words_html() + self.panes_html() + (self.strip.html() if self.strip else "") + self.end_html()

    def words_html(self) -> str:
        return f"<p class='workbench-words'>{html.escape(self.words)}</p>" if self.words else ""

    def panes_html(self) -> str:
        """The texts, next to one another where there is room."""
        boxes = "".join(map(_pane, self.panes))
        return f"<div class='workbench-panes'>{boxes}</div>" if self.panes else ""

    def end_html(self) -> str:
        """Facts, and the code."""
        items = (f"<li>{html.escape(fact.measure)} <b>{html.escape(str(fact))}</b></li>" for fact in self.facts)
        facts = f"<ul class='workbench-facts'>{''.join(items)}</ul>" if self.facts else ""
        return facts + (f"<code class='workbench-code'>{html.escape(self.code)}</code>" if self.code else "")


@dataclass(frozen=True, eq=False, kw_only=True)
class DeskResult(Result):
    """What a desk showed for one setting, to be kept by a run: its facts as a table, its figure.

    settings   of the desk       facts   one row per number       drawn   the figure as plotly's JSON
    """

    settings: dict[str, Any]
    facts: pd.DataFrame = field(repr=False)
    drawn: str = field(repr=False)

    columns = ("measure", "value", "unit", "low", "high")

    def table(self) -> pd.DataFrame:
        return self.facts

    def plot(self) -> go.Figure:
        return go.Figure(json.loads(self.drawn))


def lines_of(prompts: Sequence[str], texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The lines of a pane: each prompt, and what came after it."""
    return tuple((f"{prompt} →", text.strip()) for prompt, text in zip(prompts, texts, strict=True))


def facts_table(facts: Sequence[Fact]) -> pd.DataFrame:
    """One row per fact: measure, value, unit, low, high."""
    rows = [(fact.measure, float(fact.value), fact.unit, fact.low, fact.high) for fact in facts]
    table = pd.DataFrame(rows, columns=list(DeskResult.columns))
    return table.astype({"value": float, "low": float, "high": float})


def _pane(pane: Pane) -> str:
    lines = (f"{html.escape(given)} <b>{html.escape(came)}</b>".strip() for given, came in pane.lines)
    text = "\n\n".join(lines)
    return f"<section class='workbench-pane'><h4>{html.escape(pane.title)}</h4><pre>{text}</pre></section>"
