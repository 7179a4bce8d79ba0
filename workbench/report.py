"""Runs as one HTML page that opens offline: prose, findings, figures and tables; the code is folded away.

The page fetches nothing: the plotting library is inlined once, styles are inline, images are data.
Whatever a notebook printed is escaped; its prose and its tables pass through `safe_html`. Every figure is signed: below
it, and in the picture that a reader saves of it, stand its run's key and the command that remakes it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mistune

from workbench import storage
from workbench.folder import Run
from workbench.look import DESK_STYLE
from workbench.plots import html_div, plotly_js
from workbench.safe_html import safe_html
from workbench.signature import signature_of, signed
from workbench.storage import Place

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
LONGEST_TEXT = 20_000  # characters of one printed output


def write_report(runs: Sequence[Run], out: str | Place, title: str = "What the runs found") -> Place:
    """Write the page of these runs to `out`, a path or an fsspec URL, and return its path."""
    if not runs:
        raise ValueError("report: got no runs, expected at least one.")
    out = storage.place(out)
    if out.is_dir():
        raise ValueError(f"report: {out} is a folder, expected the name of an HTML file.")
    write_page(out, page(runs, title))
    return out


def page(runs: Sequence[Run], title: str) -> str:
    """The page of these runs as text."""
    sections = [section(run, number) for number, run in enumerate(runs, 1)]
    contents = "\n".join(
        f'<li><a href="#run-{n}">{text_of(title_of(run))}</a>{_bullets(run.findings)}</li>'
        for n, run in enumerate(runs, 1)
    )
    script = plotly_js() if any(draws(part) for part in sections) else ""
    body = f'<h1>{text_of(title)}</h1>\n<nav aria-label="Contents"><ol>\n{contents}\n</ol></nav>'
    return document(title, body + "\n<main>\n" + "\n".join(sections) + "\n</main>", head=script)


def section(run: Run, number: int) -> str:
    """One run as an HTML fragment: what it is, what it found, its notebook."""
    manifest = run.manifest
    facts = [("run", run.key), ("status", run.status), ("started", manifest.get("started", "")), *run.params.items()]
    rows = "".join(f"<tr><th scope=row>{text_of(name)}</th><td>{text_of(value)}</td></tr>" for name, value in facts)
    cells = "\n".join(_cells(run, number)) or _kept_figures(run, number)
    return (
        f'<section id="run-{number}" aria-label="{text_of(title_of(run))}">\n'
        f"<aside><p>Made by <code>{text_of(run.command)}</code></p>{_bullets(run.findings)}"
        f'<details><summary>parameters</summary><div class="table"><table>{rows}</table></div></details>'
        f"{_error(manifest)}</aside>\n"
        f"{cells}\n</section>"
    )


def document(title: str, body: str, *, head: str = "", style: str = "") -> str:
    """A page with the project's style; `head` holds scripts, `style` adds to the style."""
    return _PAGE.format(title=text_of(title), style=_STYLE + DESK_STYLE + style, head=head, body=body)


def write_page(path: Place, text: str) -> None:
    """Write a page whole or not at all, and the folders above it."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, text.encode())


def draws(fragment: str) -> bool:
    """Whether a fragment has a figure, which needs the plotting library in its page."""
    return "Plotly.newPlot" in fragment


def _cells(run: Run, number: int) -> Iterator[str]:
    """The cells of the executed notebook as HTML fragments."""
    for place, cell in enumerate(_notebook(run)):
        source = "".join(cell.get("source", ""))
        tags = cell.get("metadata", {}).get("tags", [])
        if cell["cell_type"] == "markdown" and "papermill-error-cell-tag" not in tags:
            yield _markdown(source, demote=True)
        elif cell["cell_type"] == "code" and source.strip():
            yield f"<details><summary>code</summary><pre><code>{text_of(source)}</code></pre></details>"
            for n, output in enumerate(cell.get("outputs", [])):
                yield _output(output, f"{number}-{place}-{n}", run)


def _output(output: dict[str, Any], name: str, run: Run) -> str:
    """One output of a cell, in the richest form that is safe and needs no network."""
    if output["output_type"] == "stream":
        return _pre(output["text"]) if output.get("name") == "stdout" else ""  # progress bars and warnings stay out
    if output["output_type"] == "error":
        text = "\n".join(output.get("traceback", [])) or output.get("evalue", "")
        return f'<div class="error">{_pre(text)}</div>'
    data = output.get("data", {})
    if PLOTLY in data:
        return _figure(data[PLOTLY], name, run)
    if WIDGET in data:
        return "<p><em>A control to play with stands here in JupyterLab.</em></p>"
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            return f'<img alt="" src="data:{kind};base64,{text_of("".join(data[kind]).strip())}">'
    source = "".join(data.get("text/html", ""))
    if "<table" in source or "workbench-" in source:  # a table, or what a desk shows; other values say it in text too
        return f'<div class="table">{safe_html(source)}</div>'
    if "text/markdown" in data:
        return _markdown("".join(data["text/markdown"]))
    return _pre(data.get("text/plain", ""))


def _figure(figure: dict[str, Any], name: str, run: Run) -> str:
    """A figure as a fragment. Equal figures get equal ids from html_div, and a page needs different ones."""
    plain = {part: figure[part] for part in ("data", "layout") if part in figure}
    own = signed(plain, run.key, run.command)
    drawn = re.sub(r"figure-[0-9a-f]{16}", f"figure-{name}", html_div(own))
    said = signature_of(own) or {}
    caption = f"run {text_of(said.get('key', ''))} · <code>{text_of(said.get('command', ''))}</code>"
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _kept_figures(run: Run, number: int) -> str:
    """For a run without a notebook, such as an interactive one, the figures that it kept."""
    return "\n".join(_figure(figure, f"{number}-{n}", run) for n, figure in enumerate(run.figures().values()))


def _error(manifest: dict[str, Any]) -> str:
    error = manifest.get("error")
    if not error:
        return ""
    lines = "\n".join(error["lines"])
    where = "" if error.get("cell") is None else f" in cell {error['cell']}"
    return f'<div class="error"><p>{text_of(error["kind"])}{where}</p>{_pre(lines)}</div>'


def _notebook(run: Run) -> list[dict[str, Any]]:
    path = run.folder / "notebook.ipynb"
    return storage.read_json(path)["cells"] if path.exists() else []


def title_of(run: Run) -> str:
    """The notebook's first heading, else its name."""
    for cell in _notebook(run):
        found = re.search(r"^#\s+(.+)$", "".join(cell["source"]), flags=re.MULTILINE)
        if found and cell["cell_type"] == "markdown":  # in code it is a comment
            return found[1].strip()
    return run.notebook


def _markdown(source: str, demote: bool = False) -> str:
    """Markdown as safe HTML; on demand with headings one level below those of the page."""
    if demote:
        source = re.sub(r"^(#{1,5}) ", r"#\1 ", source, flags=re.MULTILINE)
    return safe_html(str(mistune.create_markdown(escape=False, plugins=["table", "strikethrough"])(source)))


def _pre(text: str | list[str]) -> str:
    joined = re.sub(r"\x1b\[[0-9;]*m", "", "".join(text))
    cut = f"\n… {len(joined) - LONGEST_TEXT} characters more" if len(joined) > LONGEST_TEXT else ""
    return f"<pre>{text_of(joined[:LONGEST_TEXT] + cut)}</pre>" if joined.strip() else ""


def _bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{text_of(line)}</li>' for line in lines)}</ul>" if lines else ""


def text_of(value: Any) -> str:
    """A value as text in a page."""
    return html.escape(str(value))


_STYLE = """
:root { color-scheme: light; font: 17px/1.55 Charter, Georgia, 'Times New Roman', serif; }
body { max-width: 50rem; margin: 2rem auto 6rem; padding: 0 1rem; color: #1c1c1c; background: #fff; }
h1, h2, h3, h4 { line-height: 1.2; font-family: system-ui, sans-serif; margin: 2em 0 .6em; }
h1 { font-size: 1.7rem; margin-top: 0; }
nav ul, aside ul { margin: .3rem 0; } nav > ol > li { margin: .6rem 0; }
section { border-top: 3px solid #0072b2; margin-top: 4rem; padding-top: 1rem; }
aside { background: #f4f7fa; padding: .6rem 1rem; font-size: .9rem; }
code, pre { font: .85em/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f6f6f6; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .4rem 0; color: #444; } summary { cursor: pointer; font-size: .8rem; color: #55606a; }
a { color: #0060a0; }
a:focus-visible, summary:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
figure { margin: 1rem 0; overflow-x: auto; } figure > div { min-width: 44rem; }
figcaption { font-size: .75rem; color: #55606a; overflow-wrap: anywhere; }
img { max-width: 100%; } .table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
.error pre { background: #fff1ec; border-left: 4px solid #d55e00; }
@media print {
  details:not([open]), nav { display: none; }
  section { break-before: page; } figure { break-inside: avoid; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
{head}
</head>
<body>
{body}
</body>
</html>
"""
