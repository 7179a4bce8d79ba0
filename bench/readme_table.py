"""The README's table of speeds, generated from the Parquet that `python -m bench` writes: no figure is typed by hand.

python bench/readme_table.py            writes it between <!-- bench --> and <!-- /bench --> in README.md
python bench/readme_table.py --show     only prints it
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import short
from bench._timing import ROOT
from bench.table import TABLE
from workbench.files import write_atomically

OPENS, CLOSES = "<!-- bench -->", "<!-- /bench -->"
README = ROOT / "README.md"


def main(show: bool) -> None:
    text = README.read_text()
    made = markdown(pd.read_parquet(TABLE))
    if show:
        print(made)
    else:
        write_atomically(README, replaced(text, made).encode())


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown: one line per pair, work named once, and below it what was measured where."""
    rows: list[dict[str, Any]] = table.to_dict("records")
    lines = ["| work | here | beside | there / here (quartiles) |", "|---|---|---|---|"]
    work = ""
    for _, pair in groupby(rows, lambda row: (row["what"], row["name"], row["peer"])):
        first, *others = pair
        lines.append(line(first["what"] if first["what"] != work else "", [first, *others]))
        work = first["what"]
    return "\n".join([*lines, "", measured_on(rows)])


def line(work: str, measures: list[dict[str, Any]]) -> str:
    """One pair: what it took here and the ratios, for each thing measured; in words where there is no number."""
    first = measures[0]
    here, beside = f"`{first['name']}`", first["peer"]
    if first["failed"]:
        ratios = f"{first['failed']} failed: {first['note']}"
    else:
        here += ": " + ", ".join(f"{short(row['here'])} {row['measure']}" for row in measures)
        beside += f" ({first['version']})"
        names = [f"{row['measure']} " if len(measures) > 1 else "" for row in measures]
        ratios = ", ".join(name + spread(row) for name, row in zip(names, measures, strict=True))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (work, here, beside, ratios)) + " |"


def spread(row: dict[str, Any]) -> str:
    """A ratio with its quartiles; alone where every round gave the same, as bytes do."""
    ratio, low, high = (short(row[key]) for key in ("ratio", "ratio_low", "ratio_high"))
    return ratio if low == high else f"{ratio} ({low} to {high})"


def measured_on(rows: list[dict[str, Any]]) -> str:
    """Below the table: what the ratio means, and on which machines, with which libraries, at which commits."""
    places = [
        "{processor}, {cores} cores, {threads} threads, {memory_gb:g} GB, torch {torch}, commit {commit}".format(**row)
        for row in rows
    ]
    days = sorted({row["date"][:10] for row in rows})
    loads = [row["load"] for row in rows]
    busy = " The machine was busy with other work." if max(loads) > max(row["cores"] for row in rows) + 1 else ""
    return (
        f"Medians of rounds in turns; above 1, this project takes less. {'; '.join(dict.fromkeys(places))}; "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}; load {short(min(loads))} to {short(max(loads))}.{busy}"
    )


def replaced(text: str, made: str) -> str:
    """The README with the table between its markers."""
    if text.count(OPENS) != 1 or text.count(CLOSES) != 1 or text.index(OPENS) > text.index(CLOSES):
        raise ValueError(
            f"README: expected {OPENS} and after it {CLOSES}, once each. Put them where the table belongs."
        )
    before, after = text.split(OPENS)[0], text.split(CLOSES)[1]
    return f"{before}{OPENS}\n{made}\n{CLOSES}{after}"


if __name__ == "__main__":
    main("--show" in sys.argv)
