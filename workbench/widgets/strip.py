"""Coloured tokens: a value as the ground of each, its number and a note on hover, on focus and for a screen reader.

t = (value - low) / (high - low), from white to vermillion; around 0 t = |value| / max(-low, high), blue where below.
Sources: WCAG 2.2, 1.4.3 (contrast of text); the listbox pattern of the ARIA Authoring Practices Guide (keyboard).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any
from unicodedata import category

import anywidget
import numpy as np
import traitlets

from workbench.folder import RUN_VARIABLE
from workbench.plots import BLACK, BLUE, GREY, VERMILLION

# White below and not plots' Cividis, whose low end is a loud yellow: on a page of text a low value must be quiet.
WHITE = "#FFFFFF"
LONGEST = 80  # characters of a token that are drawn
VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥"}
ALONE = "◌"  # before an accent that would land on the token before
SWATCHES = 9  # colours in the legend
# The static twin carries its looks in every token: it may stand in a page that has no style sheet of ours.
PAPER = f"background-color:{WHITE};color:{BLACK};padding:8px;line-height:1.6;print-color-adjust:exact"
TOKEN = "display:inline-block;max-width:100%;padding:0 2px;overflow-wrap:anywhere"
FRAME = {True: f"border:1px dashed {BLACK};text-decoration:line-through", False: "border:1px solid transparent"}


@dataclass(frozen=True)
class StripRow:
    """One line of tokens, of any length.

    tokens  the pieces of a text as they are, with their spaces
    values  what colours each token; None: no colour. Empty: no token is coloured
    notes   what is told of each token besides its value
    label   stands before the row
    kept    False: this token was left out, by a cache for example; it is struck through and framed
    """

    tokens: tuple[str, ...]
    values: tuple[float | None, ...] = ()
    notes: tuple[str, ...] = ()
    label: str = ""
    kept: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str):
            raise ValueError(f"StripRow: got one text, {self.tokens[:40]!r}, expected its tokens. Split it first.")
        values = tuple(None if value is None else float(value) for value in self.values)
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "kept", tuple(bool(kept) for kept in self.kept))
        for name in ("values", "notes", "kept"):
            if len(getattr(self, name)) not in (0, len(self.tokens)):
                got = f"{len(getattr(self, name))} {name} for {len(self.tokens)} tokens"
                raise ValueError(f"StripRow {self.label!r}: got {got}, expected one per token, or none at all.")
        wrong = [k for k, value in enumerate(values) if value is not None and not isfinite(value)]
        if wrong:
            got = f"{values[wrong[0]]} for token {wrong[0]}, {self.tokens[wrong[0]][:LONGEST]!r}"
            raise ValueError(f"StripRow {self.label!r}: got {got}, expected finite values. Give None for no value.")


@dataclass(frozen=True, repr=False)
class Strip:
    """Rows of tokens on one scale of colours; knows no widget, and shows itself in a notebook.

    rows       a StripRow for each line of tokens
    unit       what the values are: "nats", "share of attention"
    diverging  colours on both sides of 0; otherwise from low to high
    low, high  the ends of the scale, beyond which a colour stays the same; None: from the data, robust to extremes
    title      the finding
    """

    rows: tuple[StripRow, ...]
    unit: str = ""
    diverging: bool = False
    low: float | None = None
    high: float | None = None
    title: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", (self.rows,) if isinstance(self.rows, StripRow) else tuple(self.rows))
        ends = [end for end in (self.low, self.high) if end is not None]
        if not all(isfinite(end) for end in ends) or (len(ends) == 2 and ends[0] >= ends[1]):
            raise ValueError(f"Strip: got low={self.low}, high={self.high}, expected finite numbers, low below high.")
        if self.diverging and ((self.low is not None and self.low >= 0) or (self.high is not None and self.high <= 0)):
            raise ValueError(
                f"Strip: got low={self.low}, high={self.high}, expected 0 between them as it is diverging."
            )

    def span(self) -> tuple[float, float]:
        """The values at the ends of the scale: as given, else percentiles 2 and 98; the extremes of up to 50 values."""
        data = np.array([value for row in self.rows for value in row.values if value is not None] or [0.0])
        if self.diverging:  # as far to one side as to the other
            data = np.append(data, -data)
        low, high = float(np.percentile(data, 2, method="lower")), float(np.percentile(data, 98, method="higher"))
        if low == high:  # nearly all are equal: the few others must show
            low, high = float(data.min()), float(data.max())
        if self.diverging:
            low, high = -self.high if self.high else low, -self.low if self.low else high
        low, high = low if self.low is None else self.low, high if self.high is None else self.high
        return low, max(low, high)

    def drawn(self) -> dict[str, Any]:
        """All that a face has to know, as JSON: texts that are safe to print, and the colours of each token."""
        low, high = self.span()
        rows = [self._drawn_row(row, low, high) for row in self.rows]
        return {"title": _plain(self.title), "rows": rows, "legend": self._legend(low, high)}

    def html(self) -> str:
        """The same without JavaScript: HTML that needs nothing else, prints, and reads well when read aloud."""
        drawn = self.drawn()
        title, legend = escape(drawn["title"]), drawn["legend"]
        rows = "".join(_row_html(row) for row in drawn["rows"]) or "<div>no tokens</div>"
        swatches = "".join(f'<span style="background-color:{shade}">&emsp;</span>' for shade in legend["colors"])
        bar = f'<span style="border:1px solid {GREY}">{swatches}</span>'
        scale = f"<div>{escape(legend['low'])} {bar} {escape(legend['high'])}</div>" if swatches else ""
        return f'<div style="{PAPER}">{f"<div><b>{title}</b></div>" if title else ""}{rows}{scale}</div>'

    _repr_html_ = html

    def __repr__(self) -> str:
        n_tokens = sum(len(row.tokens) for row in self.rows)
        return f"Strip({self.title!r}, unit={self.unit!r}: {len(self.rows)} rows, {n_tokens} tokens)"

    def _drawn_row(self, row: StripRow, low: float, high: float) -> dict[str, Any]:
        values = row.values or (None,) * len(row.tokens)
        grounds = [None if value is None else self._ground(value, low, high) for value in values]
        return {
            "label": _plain(row.label),
            "shown": [visible(token) for token in row.tokens],
            "said": [self._said(row, k, value) for k, value in enumerate(values)],
            "ground": [ground or WHITE for ground in grounds],
            "ink": [ink(ground or WHITE) for ground in grounds],
            "dropped": [not kept for kept in row.kept] or [False] * len(row.tokens),
        }

    def _said(self, row: StripRow, k: int, value: float | None) -> str:
        """What is told of token k: "' cat', 0.31 nats, kept, and its note"."""
        token = row.tokens[k]
        parts = [repr(token[:LONGEST]) + ("…" if len(token) > LONGEST else "")]
        parts += [] if value is None else [f"{value:.3g} {_plain(self.unit)}".rstrip()]
        parts += ["kept" if row.kept[k] else "dropped"] if row.kept else []
        parts += [_plain(row.notes[k])] if row.notes and row.notes[k] else []
        return ", ".join(parts)

    def _ground(self, value: float, low: float, high: float) -> str:
        if self.diverging:
            share = abs(min(max(value, low), high)) / (max(-low, high) or 1.0)
            return _mixed(BLUE if value < 0 else VERMILLION, share)
        share = (min(max(value, low), high) - low) / (high - low) if high > low else float(value > low)
        return _mixed(VERMILLION, share)

    def _legend(self, low: float, high: float) -> dict[str, Any]:
        """Colours from low to high and the words at both ends; a sign where values lie beyond."""
        data = [value for row in self.rows for value in row.values if value is not None]
        if not data:
            return {"colors": [], "low": "", "high": ""}
        steps = np.linspace(low, high, SWATCHES if high > low else 1)
        below, above = "≤ " if min(data) < low else "", "≥ " if max(data) > high else ""
        ends = {"low": f"{below}{low:.3g}", "high": f"{above}{high:.3g} {_plain(self.unit)}".rstrip()}
        return {"colors": [self._ground(float(step), low, high) for step in steps], **ends}


class TokenStrip(anywidget.AnyWidget):
    """A Strip in JupyterLab; `show` draws another in its place. In a batch run it is the static twin.

    selected  [row, index] of the token that was clicked or chosen with Enter, [] for none; may be set from Python too
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    strip = traitlets.Dict(help="what Strip.drawn() gave").tag(sync=True)
    selected = traitlets.List(traitlets.Int(), help="[row, index] or []").tag(sync=True)

    def __init__(self, strip: Strip, **settings: Any) -> None:
        self.shown = strip
        super().__init__(strip=strip.drawn(), **settings)

    def show(self, strip: Strip) -> None:
        """Draw another strip; what is selected stays so if the tokens are the same."""
        same = [row.tokens for row in strip.rows] == [row.tokens for row in self.shown.rows]
        self.shown = strip
        with self.hold_sync():
            self.selected = self.selected if same else []
            self.strip = strip.drawn()

    @traitlets.validate("selected")
    def _of_a_token(self, proposal: Any) -> list[int]:
        place, rows = proposal["value"], self.shown.rows
        if place and not (len(place) == 2 and 0 <= place[0] < len(rows) and 0 <= place[1] < len(rows[place[0]].tokens)):
            raise ValueError(f"TokenStrip: got selected={place}, expected [row, index] of a token, or [].")
        return place

    def _repr_mimebundle_(self, **settings: Any) -> Any:
        if os.environ.get(RUN_VARIABLE):  # nobody is there to move in it, and a page without a kernel could not draw it
            return {"text/html": self.shown.html(), "text/plain": repr(self.shown)}
        return super()._repr_mimebundle_(**settings)


def visible(token: str) -> str:
    """A token as it is drawn: spaces, newlines and tabs as signs, whatever else can't be seen by its code."""
    shown = "".join(_signs(token[:LONGEST])) + ("…" if len(token) > LONGEST else "")
    return (ALONE if category(token[:1] or "x").startswith("M") else "") + (shown or "∅")


@cache  # there are no more than 511 grounds
def ink(ground: str) -> str:
    """Black or white, whichever is read better on `ground`; at least 4.58 to 1, as their product is always 21."""
    return BLACK if contrast(BLACK, ground) >= contrast(WHITE, ground) else WHITE


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours "#rrggbb", from 1 to 21 (WCAG 2.2)."""
    dark, light = sorted(_luminance(color) for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


def _row_html(row: dict[str, Any]) -> str:
    label = f"<b>{escape(row['label'])}</b> " if row["label"] else ""
    return f'<div style="margin-top:4px">{label}{"".join(_tokens_html(row)) or "(no tokens)"}</div>'


def _tokens_html(row: dict[str, Any]) -> Iterator[str]:
    for k, (shown, said) in enumerate(zip(row["shown"], row["said"], strict=True)):
        frame = FRAME[row["dropped"][k]]
        style = f"background-color:{row['ground'][k]};color:{row['ink'][k]};{TOKEN};{frame}"
        words = escape(said)
        yield f'<span role="img" aria-label="{words}" title="{words}" style="{style}">{escape(shown)}</span>'
        yield "<br>" if shown.endswith(VISIBLE["\n"]) else ""


def _signs(text: str) -> Iterator[str]:
    for sign in text:
        yield VISIBLE.get(sign) or (sign if sign.isprintable() else _code(sign))


def _plain(text: str) -> str:
    """Words without what can't be printed, such as half a surrogate pair, which would not travel as JSON either."""
    return "".join(sign if sign.isprintable() else _code(sign) for sign in text)


def _code(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def _mixed(color: str, share: float) -> str:
    """`share` of the colour, the rest white."""
    return "#" + "".join(f"{round(255 + share * (part - 255)):02X}" for part in bytes.fromhex(color[1:]))


def _luminance(color: str) -> float:
    parts = [part / 255 for part in bytes.fromhex(color[1:])]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
