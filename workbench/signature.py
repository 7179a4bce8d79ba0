"""A figure that tells where it comes from: the run's key and the command that remakes it, in its data and its picture.

In `layout.meta["workbench"]` for programs; in small grey letters above the title for readers, so that a PNG on a slide
still tells. It is for figures on their way out: what `result.plot()` shows is unsigned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME = "workbench"
GREY = "#767676"
LONGEST = 110  # characters in the picture: more would run over the right edge of a slide
DEFAULT_MARGIN_PX = 100  # of plotly, above a figure that sets none


def signed(figure: Mapping[str, Any], key: str, command: str) -> dict[str, Any]:
    """A figure's JSON data with the signature of its run; one that is signed already keeps the signature it has."""
    if signature_of(figure):
        return dict(figure)
    layout = dict(figure.get("layout") or {})
    meta = layout.get("meta") or {}
    own = dict(meta) if isinstance(meta, Mapping) else {"meta": meta}
    layout["meta"] = own | {NAME: {"key": key, "command": command}}
    margin_px = (layout.get("margin") or {}).get("t", DEFAULT_MARGIN_PX)
    layout["annotations"] = [*(layout.get("annotations") or []), _line(f"run {key} · {command}", margin_px)]
    return dict(figure) | {"layout": layout}


def signature_of(figure: Mapping[str, Any]) -> dict[str, str] | None:
    """The key and the command of the run that a figure was signed for; None if it was not."""
    meta = (figure.get("layout") or {}).get("meta")
    return meta.get(NAME) if isinstance(meta, Mapping) else None


def unsigned(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure's JSON data without its signature: what two runs may have in common."""
    if not signature_of(figure):
        return dict(figure)
    layout = dict(figure["layout"])
    meta = {name: value for name, value in layout.pop("meta").items() if name != NAME}
    others = [note for note in layout.pop("annotations", []) if note.get("name") != NAME]
    layout |= ({"meta": meta.get("meta", meta)} if meta else {}) | ({"annotations": others} if others else {})
    return dict(figure) | {"layout": layout}


def _line(text: str, margin_px: float) -> dict[str, Any]:
    """The upper edge of the picture is the one place that neither titles nor tick labels reach."""
    short = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    escaped = short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {
        "name": NAME,
        "text": escaped,
        "font": {"size": 9, "color": GREY},
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "top",
        "yshift": margin_px,
    }
