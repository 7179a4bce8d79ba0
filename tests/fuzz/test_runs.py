"""Names, places and questions of runs: nothing leaves the folder of runs, nothing is written by a question."""

from __future__ import annotations

import json
import string
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workbench import Run, Runs, storage
from workbench.folder import checked_name
from workbench.leases import held, lease
from workbench.runs.records import moment, records, spells
from workbench.runs.sql import Database

ANY = st.text(st.characters(exclude_categories=()), max_size=40)
WORDS = """SELECT * FROM runs shares ; ' " -- /* COPY TO 'out.csv' ( ) DROP TABLE WHERE 1=1 ATTACH '/etc/passwd' PRAGMA
SET INSTALL httpfs UNION seed , INSERT INTO CREATE AS EXPLAIN ANALYZE CALL WITH 0 read_csv('/etc/passwd')"""
SQL = st.lists(st.sampled_from(WORDS.split()), max_size=9).map(" ".join)


def a_run(root: Path, notebook: str = "a", key: str = "000000000001", **params: object) -> Run:
    folder = root / notebook / key
    (folder / "results" / "shares").mkdir(parents=True)
    table = pd.DataFrame({"layer": [0, 1], "share": [0.25, 0.5]})
    (folder / "results" / "shares" / "table-0.parquet").write_bytes(table.to_parquet(index=False))
    artefacts = {"results/shares/table-0.parquet": {"sha256": "", "bytes": 1}}
    facts = {"status": "done", "started": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "artefacts": artefacts}
    (folder / "manifest.json").write_text(json.dumps(facts))
    (folder / "params.json").write_text(json.dumps(params))
    return Run(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    a_run(root, seed=3)
    return root


@settings(max_examples=30)
@given(SQL | ANY)
@example("SELECT * FROM shares; COPY runs TO 'out.csv'")
@example("SELECT * FROM read_csv('/etc/passwd')")
@example("SELECT * FROM '/etc/passwd'")
@example("FROM glob('/*')")
@example("SELECT getenv('HOME')")
def test_a_question_answers_or_is_refused_in_words_and_writes_nothing(root: Path, query: str) -> None:
    before = sorted(root.rglob("*"))
    try:
        rows = Database(records(str(root))).query(query)
    except ValueError as error:
        assert str(error).startswith("sql: ")
    else:
        assert "root:" not in rows.to_csv(), "no other file was read"
    assert sorted(root.rglob("*")) == before and not Path("out.csv").exists()


@settings(max_examples=30)
@given(SQL | ANY)
@example("1=1); DROP TABLE runs; --")
@example("layer = 1")
@example("share > (SELECT count(*) FROM read_csv('/etc/passwd'))")
def test_a_condition_chooses_rows_or_is_refused_in_words(root: Path, where: str) -> None:
    try:
        rows = Runs(root=str(root)).results("shares", where=where)
    except ValueError as error:
        assert str(error).startswith("results: ")
    else:
        assert len(rows) <= 2


@given(ANY)
def test_a_name_makes_one_folder_or_is_refused(tmp_path: Path, name: str) -> None:
    try:
        assert (tmp_path / checked_name(name)).parent == tmp_path and checked_name(name) not in (".", "..")
    except ValueError as error:
        assert "expected up to 100" in str(error)


NAMES = st.text(string.ascii_letters + "_", min_size=1, max_size=8).filter(str.isidentifier)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=25)
@given(st.dictionaries(NAMES, st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=8), max_size=4))
def test_any_parameters_become_columns(tmp_path: Path, params: dict[str, object]) -> None:
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    a_run(root, **params)
    database = Database(records(str(root)))
    for view in ("runs", "shares"):
        found = database.query(f"SELECT * FROM {view}")
        assert len({name.lower() for name in found.columns}) == len(found.columns)
        assert len(found.columns) >= len(params)


@given(st.binary(max_size=40))
def test_a_damaged_file_is_read_or_named(tmp_path: Path, data: bytes) -> None:
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    a_run(root, seed=1)
    broken = a_run(root, key="000000000002", seed=2)
    (broken.folder / "params.json").write_bytes(data)
    (broken.folder / "manifest.json").write_bytes(data)
    try:
        assert "000000000001" in {record.key for record in records(str(root))}
    except ValueError as error:
        assert str(broken.folder) in str(error) and "Bring the file back" in str(error)


@given(ANY.filter(lambda text: "\x00" not in text))
def test_a_text_is_a_place_or_refused_in_words(text: str) -> None:
    try:
        assert storage.place(text) is not None
    except ValueError as error:
        assert "Expected a path or an fsspec URL" in str(error)


@given(ANY | st.from_regex(r"\d{1,30}(\.\d{1,9})?[mhdw]", fullmatch=True) | st.datetimes().map(str))
def test_a_text_is_a_time_or_refused_in_words(text: str) -> None:
    try:
        assert moment(text) <= datetime.max.replace(tzinfo=UTC)
    except ValueError as error:
        assert "time: got" in str(error) and "expected" in str(error)


@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | ANY)
def test_a_parameter_is_spelt_by_its_own_text(value: object) -> None:
    assert spells(str(value), value)


@given(st.lists(st.tuples(st.integers(0, 999_999), st.binary(max_size=30)), max_size=4, unique_by=lambda item: item[0]))
def test_a_lease_follows_the_highest_number_whatever_the_files_say(
    tmp_path: Path, files: list[tuple[int, bytes]]
) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "a"
    leases = folder.with_name(".a.lease")
    leases.mkdir(parents=True)
    done = json.dumps({"number": 7, "owner": "x", "host": "", "pid": 0, "heartbeat": 0, "ttl_s": 1, "released": True})
    for number, data in files:
        (leases / f"{number:06d}").write_bytes(data)
    top = max((number for number, _ in files), default=-1)
    if files:  # a released one on top is free to be followed
        (leases / f"{top:06d}").write_text(done)
    with lease(folder) as mine:
        assert mine.holder.number == top + 1
        now = held(folder)
        assert now is not None and now.owner == mine.holder.owner
    assert held(folder) is None
