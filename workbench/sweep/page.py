"""A sweep as one HTML page that opens offline: counts, failures in groups of one cause, a row per run.

Two failures are the same where their kind, their cell and the last line of their error agree, numbers aside.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from workbench.sweep.outlook import counted, duration

FIRST_LINES = 12  # of an error
MOST_COMMANDS = 200  # of one group


def failure_groups(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The failed rows in groups of one cause, the largest first."""
    failed = sorted((row for row in rows if row["error"]), key=_cause)
    groups = [list(group) for _, group in groupby(failed, key=_cause)]
    return sorted(groups, key=len, reverse=True)


def page(facts: dict[str, Any]) -> str:
    """The page of a sweep, from what its JSON file holds."""
    rows = facts["runs"]
    title = f"Sweep of {facts['notebook']}: {summary_line(rows)}"
    groups = [_group(group) for group in failure_groups(rows)]
    failures = f"<h2>What failed</h2>\n{''.join(groups)}" if groups else ""
    return _PAGE.format(
        title=_text(title),
        style=_STYLE,
        command=_text(facts["command"]),
        when=_text(_when(facts)),
        failures=failures,
        table=_table(rows),
    )


def summary_line(rows: Sequence[dict[str, Any]]) -> str:
    """How many of the runs are done, failed and not made."""
    done, failed = (sum(row["status"] == status for row in rows) for status in ("done", "failed"))
    parts = [f"{done} of {counted(len(rows), 'run')} done"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{len(rows) - done - failed} not made"] if done + failed < len(rows) else []
    return ", ".join(parts)


def _cause(row: dict[str, Any]) -> tuple[str, str, str]:
    error = row["error"]
    last = next((line for line in reversed(error["lines"]) if line.strip()), "")
    return error["kind"], str(error.get("cell")), re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e[+-]?\d+)?", "#", last)


def _group(group: list[dict[str, Any]]) -> str:
    first = group[0]["error"]
    where = "" if first.get("cell") is None else f" in cell {first['cell']}"
    lines = "\n".join(line for line in [*first.get("source", "").splitlines()[:FIRST_LINES], ""] if line)
    error = "\n".join(first["lines"][:FIRST_LINES] if len(first["lines"]) <= FIRST_LINES else _ends(first["lines"]))
    commands = "\n".join(row["command"] for row in group[:MOST_COMMANDS])
    more = f"\n# and {len(group) - MOST_COMMANDS} more" if len(group) > MOST_COMMANDS else ""
    source = f"<pre><code>{_text(lines)}</code></pre>" if lines else ""
    return (
        f'<section class="error"><h3>{counted(len(group), "run")}: {_text(first["kind"] + where)}</h3>{source}'
        f"<pre>{_text(error)}</pre><details><summary>the command that makes each again</summary>"
        f"<pre>{_text(commands + more)}</pre></details></section>\n"
    )


def _ends(lines: list[str]) -> list[str]:
    """The first lines of an error, and its last, which says what it is."""
    return [*lines[: FIRST_LINES - 2], "...", lines[-1]]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["params"]))
    head = "".join(f"<th scope=col>{_text(name)}</th>" for name in [*names, "status", "time", "run", "finding"])
    body = "\n".join(_row(row, names) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _row(row: dict[str, Any], names: Sequence[str]) -> str:
    values = [_text(row["params"].get(name, "")) for name in names]
    seconds = "" if row["seconds"] is None else duration(row["seconds"])
    status = f"{row['status']}{', cached' if row['cached'] else ''}"
    cells = [*values, _text(status), seconds, f"<code>{_text(row['key'])}</code>"]
    finding = f"<td class=finding>{_text((row['findings'] or [''])[0])}</td>"
    return f'<tr class="{_text(row["status"])}">{"".join(f"<td>{cell}</td>" for cell in cells)}{finding}</tr>'


def _when(facts: dict[str, Any]) -> str:
    ended = f", ended {facts['ended']}" if facts.get("ended") else ""
    return f"started {facts['started']}{ended}, {facts['status']}"


def _text(value: Any) -> str:
    return html.escape(str(value))


_STYLE = """
:root { color-scheme: light; font: 17px/1.55 Charter, Georgia, 'Times New Roman', serif; }
body { max-width: 70rem; margin: 2rem auto 6rem; padding: 0 1rem; color: #1c1c1c; background: #fff; }
h1, h2, h3 { line-height: 1.2; font-family: system-ui, sans-serif; margin: 1.6em 0 .6em; }
h1 { font-size: 1.6rem; margin-top: 0; }
code, pre { font: .85em/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f6f6f6; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: .85rem; color: #55606a; }
summary:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
.error pre { background: #fff1ec; border-left: 4px solid #d55e00; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td.finding, th:last-child { text-align: left; }
tr.failed td { background: #fff1ec; }
@media print { section { break-inside: avoid; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>Made by <code>{command}</code></p>
<p>{when}</p>
<main>
{failures}
<h2>All runs</h2>
<div class="table">{table}</div>
</main>
</body>
</html>
"""
