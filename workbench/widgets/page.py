"""A desk as one HTML file: the pictures of a grid of settings worked out in advance, and controls that move among them.

It needs no server, no network and no Python: for a lecture, for an appendix, for a reader without a model. Source: own.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from workbench import plots
from workbench.files import write_atomically
from workbench.widgets.controls import Control
from workbench.widgets.picture import STYLE

if TYPE_CHECKING:
    from workbench.widgets.desk import Desk

MOST = 500  # pictures: about 10 kB each
SCRIPT = Path(__file__).with_name("page.js")
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
PAGE_STYLE = """<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 24px auto; padding: 0 16px; color: #111; }
h1 { font-size: 22px; } #controls { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 12px 0; }
label { display: flex; align-items: center; gap: 8px; } output { min-width: 3.5em; font-variant-numeric: tabular-nums; }
input, select { font: inherit; } input[type=range] { width: 220px; } footer { color: #555; font-size: 13px; }
#words { color: #b00020; min-height: 1.4em; margin: 0; }
</style>"""


def export(desk: Desk, path: Path, settings: Sequence[str], values: Mapping[str, Sequence[Any]]) -> Path:
    """Write the page of `desk` to `path` and return it; see `Desk.export_html`."""
    if path.is_dir():
        raise ValueError(f"export_html: {path} is a folder, expected the name of a file to write.")
    axes = _axes(desk, settings, values)
    count = math.prod(len(options) for options in axes.values())
    if count > MOST:
        sizes = " x ".join(f"{len(options)} {name}" for name, options in axes.items())
        raise ValueError(
            f"export_html: {sizes} are {count} pictures, expected at most {MOST}. Name fewer settings or values."
        )
    places = itertools.product(*axes.values())
    pictures = [_picture(desk, dict(zip(axes, place, strict=True))) for place in tqdm(places, total=count, delay=2)]
    labels = {control.name: control.label for control in desk.controls()}
    grid = {
        "settings": [
            {"label": labels[name], "values": [str(value) for value in options], "numbers": _are_numbers(options)}
            for name, options in axes.items()
        ],
        "start": [options.index(desk.settings[name]) for name, options in axes.items()],
        "template": json.loads(str(desk.picture().figure.to_json()))["layout"].get("template"),
        "pictures": pictures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _page(desk, grid).encode())
    return path


def _axes(desk: Desk, settings: Sequence[str], values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Setting -> the values that a reader can choose, the desk's own among them."""
    offered = {control.name: control for control in desk.controls() if control.shown}
    axes: dict[str, list[Any]] = {}
    for name in dict.fromkeys([*settings, *values]):
        if name not in offered:
            raise ValueError(
                f"export_html: got setting {name!r}, expected one that can be moved: {', '.join(offered)}."
            )
        axes[name] = _options(desk, offered[name], values.get(name))
    if not axes:
        raise ValueError(f"export_html: got no setting, expected some of {', '.join(offered)}.")
    return axes


def _options(desk: Desk, control: Control, named: Sequence[Any] | None) -> list[Any]:
    parameter, own = desk.parameters()[control.name], desk.settings[control.name]
    options = [parameter.check(value) for value in (control.some() if named is None else named)]
    if not options:
        raise ValueError(f"export_html: {control.name} can be anything. Name values: {control.name}=[…, …].")
    for value in options:
        control.check(value)
    options = list(dict.fromkeys([*options, own]))
    return sorted(options) if _are_numbers(options) else options


def _are_numbers(options: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in options)


def _picture(desk: Desk, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One place of the grid as JSON: a figure and HTML, or why there is none."""
    try:
        picture = desk.changed(**settings).picture()
    except ValueError as error:
        return {"refused": str(error)}
    figure = json.loads(str(picture.figure.to_json()))
    figure["layout"].pop("template", None)  # the same in all, and larger than the rest
    return {"figure": figure, "html": picture.html()}


def _page(desk: Desk, grid: Mapping[str, Any]) -> str:
    title, command = html.escape(desk.question), html.escape(desk.command())
    data = json.dumps(grid, sort_keys=True).replace("</", "<\\/")  # or a text could end the script element
    first = next(picture["html"] for picture in grid["pictures"] if "html" in picture)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>{PAGE_STYLE}{STYLE}{plots.plotly_js()}</head><body>
<h1>{title}</h1>
<div id="controls"></div><p id="words" role="alert"></p><div id="figure"></div><div id="rest">{first}</div>
<footer>{html.escape(desk.subject.name)} · worked out in advance; the same by <code>{command}</code></footer>
<script type="application/json" id="grid">{data}</script>
<script>{SCRIPT.read_text()}</script>
</body></html>
"""
