"""Runs as a folder of pages to hand to colleagues: an index with search, a page per run, the tables they kept.

The folder is complete: opened from a disk or a server, it fetches nothing from elsewhere. The plotting library lies in
it once. Without JavaScript the index is a plain table of every run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from workbench import storage
from workbench.folder import Run
from workbench.plots import plotly_js
from workbench.report import document, draws, section, text_of, title_of, write_page
from workbench.runs.records import Record, read, varying
from workbench.storage import Place

MARK = '<meta name="generator" content="workbench gallery">'
LIBRARY = "plotly.js"
FACTS = ("status", "started")  # columns of the index before the parameters
SHOWN_ROWS = 30  # of a kept table, on its run's page
MOST_ROWS = 100_000  # that are written as CSV; a longer table stays where it was kept


def write_gallery(runs: Sequence[Run], out: str | Place, title: str = "What the runs found") -> Place:
    """Write the pages of these runs into the folder `out` and return the path of its index.

    A gallery that is there is replaced. Raises ValueError for a folder that holds anything else.
    """
    if not runs:
        raise ValueError("gallery: got no runs, expected at least one.")
    out = storage.place(out)
    index = out / "index.html"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_gallery(index)):
        raise ValueError(f"gallery: {out} holds something else, expected a new folder, an empty one or a gallery.")
    found = read(runs)
    names = _plain(f"{record.notebook}-{record.key}" for record in found)
    written = {"index.html", LIBRARY}
    for place, (record, name) in enumerate(zip(found, names, strict=True)):
        tables = _tables(record, out, name)
        around = [names[place - 1] if place else None, names[place + 1] if place + 1 < len(names) else None]
        write_page(out / "runs" / f"{name}.html", run_page(record, tables, around))
        written |= {f"runs/{name}.html", *(f"tables/{file}" for _, file, _ in tables if file)}
    source = plotly_js().removeprefix('<script type="text/javascript">').removesuffix("</script>")
    write_page(out / LIBRARY, source)
    write_page(index, index_page(found, names, title))
    for path in storage.files(out):  # pages of runs that the gallery before this one had
        name = path.relative_to(out).as_posix() if isinstance(path, Path) else str(path.relative_to(out))
        if name not in written and re.fullmatch(r"(runs|tables)/[^/]+\.(html|csv)", name):
            path.unlink()
    return index


def index_page(found: Sequence[Record], names: Sequence[str], title: str) -> str:
    """The first page: every run in a row that leads to its own page."""
    params = varying(found)
    rows = "\n".join(_row(record, name, params) for record, name in zip(found, names, strict=True))
    heads = "".join(f"<th scope=col>{text_of(head)}</th>" for head in ("run", *FACTS, *params, "finding"))
    notebooks = _options("notebook", sorted({record.notebook for record in found}))
    statuses = _options("status", sorted({record.status for record in found}))
    body = f"""<h1>{text_of(title)}</h1>
<form role="search" hidden>
<label>search <input type="search" name="words" placeholder="a word, a key, seed=3 …" autocomplete="off"></label>
{notebooks}{statuses}<output aria-live="polite"></output>
</form>
<div class="table"><table class="runs"><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></div>"""
    return document(title, body + _SCRIPT, head=MARK, style=_STYLE)


def run_page(record: Record, tables: Sequence[tuple[str, str, str]], around: Sequence[str | None]) -> str:
    """The page of one run: its notebook as it was executed, then the tables that it kept."""
    inner = section(record.run, 1)
    steps = [
        f'<a href="{name}.html">{word}</a>' for word, name in zip(("previous", "next"), around, strict=True) if name
    ]
    links = " · ".join(['<a href="../index.html">all runs</a>', *steps])
    kept = "\n".join(fragment for _, _, fragment in tables)
    heading = f"<h1>{text_of(record.notebook)} <code>{text_of(record.key)}</code></h1>"
    script = f'<script src="../{LIBRARY}"></script>' if draws(inner) else ""
    body = f"<nav>{links}</nav>\n{heading}\n<main>\n{inner}\n{kept}\n</main>"
    return document(f"{title_of(record.run)} ({record.key})", body, head=script, style=_STYLE)


def _tables(record: Record, out: Place, page: str) -> list[tuple[str, str, str]]:
    """(name, CSV file, HTML fragment) of each table that a run kept; the files are written."""
    made, kept = [], record.tables()
    for (name, path), plain in zip(kept.items(), _plain(f"{page}-{name}" for name in kept), strict=True):
        heading, file = f"<h2>Kept: {text_of(name)}</h2>", f"{plain}.csv"
        try:
            table, n_rows = _read_table(path)
        except (OSError, pa.ArrowInvalid):  # one broken file must not cost the other runs their pages
            made.append((name, "", f"{heading}\n<p>Its table is missing or broken.</p>"))
            continue
        if len(table) == n_rows:
            write_page(out / "tables" / file, table.to_csv(index=False))
        link = f'all as <a href="../tables/{file}">CSV</a>' if len(table) == n_rows else "all are in the run's folder"
        rest = f"the first {SHOWN_ROWS} of {n_rows} rows; {link}" if n_rows > SHOWN_ROWS else link
        shown = table.head(SHOWN_ROWS).to_html(index=False, border=0, escape=True)
        fragment = f'{heading}\n<p>{rest}</p>\n<div class="table">{shown}</div>'
        made.append((name, file if len(table) == n_rows else "", fragment))
    return made


def _read_table(path: Place) -> tuple[pd.DataFrame, int]:
    """A kept table, or the start of a very long one, and the number of all its rows."""
    with storage.on_disk(path.parent) as folder:
        stored = parquet.ParquetFile(folder / path.name)
        n_rows = stored.metadata.num_rows
        parts = stored.iter_batches(SHOWN_ROWS) if n_rows > MOST_ROWS else [stored.read()]
        return next(iter(parts)).to_pandas(), n_rows


def _row(record: Record, name: str, params: Sequence[str]) -> str:
    """One run in the index. What the search looks through stands in the row itself."""
    every = " ".join(f"{param}={value}" for param, value in record.params.items())
    started = record.started[:16].replace("T", " ")
    link = f'<a href="runs/{name}.html">{text_of(record.notebook)}<br> <code>{text_of(record.key)}</code></a>'
    values = [record.status, started, *(record.params.get(param, "") for param in params)]
    cells = "".join(
        f'<td data-name="{text_of(name)}">{text_of(value)}</td>'
        for name, value in zip((*FACTS, *params), values, strict=True)
    )
    about = f'data-notebook="{text_of(record.notebook)}" data-status="{text_of(record.status)}"'
    lines = "<br>".join(text_of(line) for line in record.findings or _failure(record))
    return f'<tr {about} data-params="{text_of(every)}"><td>{link}</td>{cells}<td class="finding">{lines}</td></tr>'


def _failure(record: Record) -> list[str]:
    """Why a run failed, in a line."""
    error = record.manifest.get("error") or {}
    return [f"{error['kind']}: {(error['lines'] or [''])[-1]}"] if error else []


def _options(name: str, values: Sequence[str]) -> str:
    options = "".join(f"<option>{text_of(value)}</option>" for value in values)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>\n'


def _is_gallery(index: Place) -> bool:
    return index.is_file() and MARK.encode() in storage.read(index)


def _plain(names: Iterable[str]) -> list[str]:
    """Each name as one that needs no escaping in a link; those that come out the same are told apart by a number."""
    made: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        numbered = (plain if number == 1 else f"{plain}-{number}" for number in count(1))
        made.append(next(each for each in numbered if each not in made))
    return made


_STYLE = """
body:has(table.runs) { max-width: 80rem; }
form { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: baseline; font: .9rem system-ui, sans-serif; }
form[hidden] { display: none; }
input, select { font: inherit; padding: .25rem .4rem; } input { width: min(22rem, 80vw); }
input:focus-visible, select:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
table.runs th, table.runs td { text-align: left; vertical-align: top; }
table.runs td { max-width: 14rem; overflow-wrap: anywhere; } table.runs code { white-space: nowrap; }
table.runs td[data-name="started"] { white-space: nowrap; } table.runs td.finding { max-width: none; min-width: 16rem; }
table.runs tbody tr[hidden] { display: none; }
tr[data-status="failed"] td:nth-child(2), tr[data-status="lost"] td:nth-child(2) { color: #b03a00; font-weight: 600; }
@media (max-width: 45rem) {  /* a run is a card: its facts in a row that wraps, its findings below */
  table.runs thead { display: none; } table.runs tr:not([hidden]) { display: block; padding: .5rem 0; }
  table.runs tr { border-bottom: 1px solid #ddd; }
  table.runs td { display: inline-block; border: 0; padding: 0 .8rem 0 0; max-width: none; }
  table.runs td:first-child br { display: none; } table.runs td:first-child, table.runs td.finding { display: block; }
  table.runs td[data-name]:not(:empty)::before { content: attr(data-name) " "; color: #55606a; }
}
"""

# Every word must stand somewhere in a row or its parameters; the choices are kept in the address, to be sent along.
_SCRIPT = """
<script>
(() => {
  const form = document.querySelector("form"), rows = [...document.querySelectorAll("table.runs tbody tr")];
  const texts = rows.map(row => (row.textContent + " " + row.dataset.params).toLowerCase());
  const show = () => {
    const words = form.words.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let n = 0;
    rows.forEach((row, place) => {
      const fits = ["notebook", "status"].every(name => !form[name].value || row.dataset[name] === form[name].value)
        && words.every(word => texts[place].includes(word));
      row.hidden = !fits;
      n += fits;
    });
    form.querySelector("output").textContent = n === rows.length ? `${n} runs` : `${n} of ${rows.length} runs`;
    const chosen = [...new FormData(form)].filter(pair => pair[1]);
    history.replaceState(null, "", chosen.length ? "#" + new URLSearchParams(chosen) : location.pathname);
  };
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (form[name]) form[name].value = value;
  form.addEventListener("input", show);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  show();
})();
</script>"""
