"""`Runs("10_hftp")`: all runs of a notebook as one value to look at, to join and to draw, in a notebook or a script.

Runs("10_hftp").table() has a row per run; .results("hftp") has every row of that result with its run's parameters;
.plot("hftp", "share", x="layer") draws means over seeds with their intervals.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.folder import Run
from workbench.runs.records import Record, latest, records, varying
from workbench.runs.seeds import over_seeds, seeds_figure
from workbench.runs.sql import Database, runs_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHOWN = 20  # rows in a notebook's cell


@dataclass(frozen=True)
class Runs:
    """The runs of one notebook, or of all. Nothing is read before something is asked.

    notebook   its name, as in `runs/<name>/`; None: every notebook
    root       where runs live, a path or an fsspec URL; None: as `workbench run` has it
    status     the runs whose results are taken; add "interactive" for those of an open notebook
    latest     of runs with equal parameters only the last: older ones were made by other code
    """

    notebook: str | None = None
    root: Any = None
    status: tuple[str, ...] = ("done",)
    latest: bool = False

    def __iter__(self) -> Iterator[Run]:
        return (record.run for record in self._records())

    def __len__(self) -> int:
        return len(self._records())

    def table(self) -> pd.DataFrame:
        """One row per run of any status, oldest first: notebook, key, status, started (UTC), seconds, every parameter,
        error, findings, folder, command."""
        found = self._records()
        return runs_table(found).to_pandas().assign(findings=[list(record.findings) for record in found])

    def names(self) -> list[str]:
        """The names of the results that these runs kept."""
        return list(Database(self._records(), self.status).tables)

    def results(self, name: str, columns: Sequence[str] = (), where: str = "") -> pd.DataFrame:
        """Every row of the result `name`, run after run, with notebook, key and parameters in front.

        columns   those to read; none: all        where   a condition in SQL, such as "layer = 3 AND keep < 0.5"
        A parameter that is called like one of the result's columns comes as `param_<name>`.
        """
        return Database(self._records(), self.status).rows(name, columns, where)

    def sql(self, query: str) -> pd.DataFrame:
        """What one SELECT over the view `runs` and a view per result gives."""
        return Database(self._records(), self.status).query(query)

    def plot(
        self, name: str, y: str, x: str, color: str | None = None, *, where: str = "", seed: str = "seed"
    ) -> Figure:
        """Means of a result's column `y` over seeds against `x`, with 95 % intervals, a line per value of `color`.

        `x` and `color` are parameters or columns of the result. Raises ValueError where runs of one seed differ in
        something that is neither: choose with `where`, or show it.
        """
        rows = self.results(name, where=where)
        if rows.empty:
            raise ValueError(f"plot: no row of {name} is left under where={where!r}. Choose other ones.")
        means = over_seeds(rows, y, [x] if color is None else [x, color], seed)
        return seeds_figure(means, x, y, color, name=f"{name}: ")

    def run(self, key: str) -> Run:
        """The run of this key, or of the one key that begins so."""
        found = [record.run for record in self._records() if record.key.startswith(key)]
        if len(found) != 1:
            raise ValueError(f"runs: {key!r} names {len(found)} runs, expected one. See .table()['key'].")
        return found[0]

    def __repr__(self) -> str:
        return f"Runs of {self.notebook or 'all notebooks'}: {_counted(self._records())}"

    def _repr_html_(self) -> str:
        found = self._records()
        shown = found[-SHOWN:]
        params = varying(found)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("key", "status", "seconds", *params, "finding"))
        body = "".join(f"<tr>{_cells(record, params)}</tr>" for record in shown)
        title = f"<p><b>{html.escape(self.notebook or 'all notebooks')}</b>: {_counted(found)}"
        cut = f", the latest {SHOWN} below" if len(found) > SHOWN else ""
        return f"{title}{cut}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _records(self) -> list[Record]:
        found = records(self.root, self.notebook)
        return latest([record for record in found if record.status in self.status]) if self.latest else found


def _counted(found: Sequence[Record]) -> str:
    counts = Counter(record.status for record in found)
    return ", ".join(f"{count} {status}" for status, count in counts.most_common()) or "none"


def _cells(record: Record, params: Sequence[str]) -> str:
    """One run as a row of a table in HTML."""
    seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
    values = [record.key, record.status, seconds, *(record.params.get(name, "") for name in params)]
    return "".join(f"<td>{html.escape(str(value))}</td>" for value in (*values, next(iter(record.findings), "")))
