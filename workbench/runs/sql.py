"""SQL over all runs: DuckDB straight over the Parquet files in which results were kept.

The view `runs` has one row per run. The name of each kept result is a view of its tables, one below the other, with the
run's notebook, key and parameters in front. A query reads: it can't write, reach the network, or open any other file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from workbench.runs.records import Record
from workbench.storage import Place

RUNS = "runs"
NO_EXTENSIONS: dict[str, Any] = {  # nothing is fetched, whatever a query asks for
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
}


class Database:
    """A DuckDB in memory over a fixed set of runs.

    status   the runs whose tables are in the views; `runs` itself has all of them. A table that a failed run kept is
             half of a story, so it is left out unless asked for.
    """

    def __init__(self, found: Iterable[Record], status: Sequence[str] = ("done",)) -> None:
        self.records = list(found)
        self.tables: dict[str, dict[str, int]] = {}  # view -> file -> which record
        self.connection = duckdb.connect(config=NO_EXTENSIONS)
        for place, record in enumerate(self.records):
            for name, path in record.tables().items() if record.status in status else ():
                self.tables.setdefault(self._view(name), {})[self._address(path)] = place
        self.runs = runs_table(self.records)
        self.connection.register(RUNS, self.runs)
        self.connection.execute(
            f"SET allowed_paths = {_list(path for files in self.tables.values() for path in files)}"
        )
        self.connection.execute("SET parquet_metadata_cache = true")  # a query reads the end of each file three times
        self.connection.execute("SET python_enable_replacements = false")  # a name is a view, never a variable
        self.connection.execute("SET enable_external_access = false")
        self.connection.execute("SET lock_configuration = true")

    def query(self, sql: str) -> pd.DataFrame:
        """The rows that one SELECT gives. Raises ValueError in words, with the views and columns that there are."""
        try:
            kinds = [statement.type for statement in duckdb.extract_statements(sql)]
            if kinds != [duckdb.StatementType.SELECT]:  # EXPLAIN ANALYZE would carry out a COPY, which writes
                raise ValueError(f"sql: got {_said(kinds)}, expected one SELECT: runs are read here, never changed.")
            asked = [name for name in self.tables if name.lower() in sql.lower()]
            # A view opens all of its files: only those that are asked for; all where, as in SHOW TABLES, none is named.
            for name in asked if asked or RUNS in sql.lower() else self.tables:
                self.connection.execute(f"CREATE OR REPLACE TEMP VIEW {_quoted(name)} AS {self._select(name)}")
            return self.connection.execute(sql).df()
        except duckdb.Error as error:
            raise ValueError(f"sql: {_reason(error)} {self.offer()}") from None

    def rows(self, name: str, columns: Sequence[str] = (), where: str = "") -> pd.DataFrame:
        """The rows of the view `name`, run after run, each table in its own order; only what is asked for is read.

        columns   those to give; none: all        where   a condition in SQL, such as "layer = 3 AND keep < 0.5"
        """
        if name not in self.tables:
            raise ValueError(f"results: {name!r} was kept by none of these runs. {self.offer()}")
        chosen = ", ".join(map(_quoted, columns)) or "* EXCLUDE (_place, file_row_number)"
        condition = f"WHERE {where}" if where else ""
        order = "ORDER BY _place, file_row_number"
        sql = f"SELECT {chosen} FROM ({self._select(name, hidden=True)}) {condition} {order}"
        try:
            if len(duckdb.extract_statements(sql)) != 1:
                raise ValueError(f"results: got where={where!r}, expected one condition.")
            return self.connection.execute(sql).df()
        except duckdb.Error as error:
            raise ValueError(f"results: {_reason(error)} {self.offer()}") from None

    def offer(self) -> str:
        """The views and their columns, in one line; a view's columns are those of its latest table."""
        views = {RUNS: self.runs.column_names}
        for name, files in self.tables.items():
            try:
                own = self._columns(list(files)[-1:])
            except duckdb.Error:
                own = ["…"]  # a broken file
            views[name] = ["notebook", "key", *parameter_columns(self._of(name), own), *_apart(own).values()]
        listed = "; ".join(f"{_quoted(name)} ({', '.join(columns)})" for name, columns in views.items())
        return f"There is: {listed}."

    def _view(self, name: str) -> str:
        """The view of a result: its name, which `runs` and names that differ in their case only must not hide."""
        others = {RUNS, *(view.lower() for view in self.tables if view != name)}
        return name if name.lower() not in others else self._view(f"result_{name}")

    def _address(self, path: Place) -> str:
        """The name by which DuckDB knows a file; object storage is read through fsspec."""
        if isinstance(path, Path):
            return str(path.absolute())
        if path.protocol not in self.connection.list_filesystems():
            self.connection.register_filesystem(path.fs)
        return path.fs.unstrip_protocol(path.path)

    def _of(self, name: str) -> list[Record]:
        return [self.records[place] for place in self.tables[name].values()]

    def _columns(self, files: Iterable[str]) -> list[str]:
        """The columns of tables one below the other, each at its first place."""
        described = self.connection.execute(f"DESCRIBE SELECT * FROM {_source(files)}").fetchall()
        return [row[0] for row in described if row[0] not in ("_file", "file_row_number")]

    def _select(self, name: str, hidden: bool = False) -> str:
        """The SELECT of a view; `hidden` gives the columns for its order as well."""
        files = self.tables[name]
        own, source = self._columns(files), _source(files)
        found, places = self._of(name), list(files.values())
        front = {"_file": pa.array(list(files)), "_place": pa.array(places, pa.int64())}
        front |= {"notebook": pa.array([r.notebook for r in found]), "key": pa.array([r.key for r in found])}
        params = parameter_columns(found, own)
        front |= {column: _values([r.params.get(param) for r in found]) for column, param in params.items()}
        about = f"_about_{list(self.tables).index(name)}"
        self.connection.register(about, pa.table(front))
        before = ", ".join(f"a.{_quoted(column)}" for column in ("notebook", "key", *params))
        after = "".join(f", t.{_quoted(column)} AS {_quoted(shown)}" for column, shown in _apart(own).items())
        order = ", a._place, t.file_row_number" if hidden else ""
        return f"SELECT {before}{after}{order} FROM {source} t JOIN {about} a USING (_file)"


def runs_table(found: Sequence[Record]) -> pa.Table:
    """One row per run: what it is, how it ended, its parameters, what it found. `started` is in UTC."""
    facts: dict[str, pa.Array] = {
        "notebook": pa.array([r.notebook for r in found], pa.string()),
        "key": pa.array([r.key for r in found], pa.string()),
        "status": pa.array([r.status for r in found], pa.string()),
        "started": pa.array([_utc(r.started) for r in found], pa.timestamp("us")),
        "seconds": pa.array([r.seconds for r in found], pa.float64()),
    }
    last: dict[str, pa.Array] = {
        "error": pa.array([(r.manifest.get("error") or {}).get("kind") for r in found], pa.string()),
        "findings": pa.array([r.findings for r in found], pa.list_(pa.string())),
        "folder": pa.array([str(r.run.folder) for r in found], pa.string()),
        "command": pa.array([r.manifest.get("command") for r in found], pa.string()),
    }
    columns = parameter_columns(found, [*facts, *last])
    params = {column: _values([r.params.get(name) for r in found]) for column, name in columns.items()}
    return pa.table(facts | params | last)


def parameter_columns(found: Iterable[Record], taken: Iterable[str]) -> dict[str, str]:
    """Column -> parameter: its own name, or `param_<name>` where a column has that name already."""
    used = {name.lower() for name in (*taken, "notebook", "key")}  # SQL doesn't tell upper from lower case
    columns = {}
    for name in dict.fromkeys(name for record in found for name in record.params):
        column = name
        while column.lower() in used:
            column = f"param_{column}"
        used.add(column.lower())
        columns[column] = name
    return columns


def _source(files: Iterable[str]) -> str:
    return f"read_parquet({_list(files)}, union_by_name = true, filename = '_file', file_row_number = true)"


def _apart(own: Sequence[str]) -> dict[str, str]:
    """A table's columns -> their names in its view, where `notebook` and `key` say which run it is."""
    return {name: f"result_{name}" if name.lower() in ("notebook", "key") else name for name in own}


def _values(values: Sequence[Any]) -> pa.Array:
    """A column of parameters: numbers where all are numbers, else text. A run without the parameter has NULL."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pa.array(values, pa.int64())
    if kinds == {float} or kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _utc(started: str) -> datetime | None:
    return datetime.fromisoformat(started).astimezone(UTC).replace(tzinfo=None) if started else None


def _reason(error: duckdb.Error) -> str:
    """What DuckDB says, in one line, without the query that it repeats."""
    text = " ".join(str(error).split("\n\nLINE")[0].split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _said(kinds: Sequence[Any]) -> str:
    return ", then ".join(kind.name for kind in kinds) or "no statement"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _list(texts: Iterable[str]) -> str:
    return "[" + ", ".join("'" + text.replace("'", "''") + "'" for text in texts) + "]"
