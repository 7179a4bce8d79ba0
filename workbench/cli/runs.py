"""`workbench runs VERB`: what ran and what it found, one by one, side by side, by SQL."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workbench.cli.choosing import one_run
from workbench.cli.pages import add_pages
from workbench.cli.saying import bytes_said, pairs, print_failure, print_table
from workbench.cli.upkeep import add_gc

if TYPE_CHECKING:
    from workbench.runs.records import Record

STATUSES = ("done", "failed", "running", "lost", "interrupted", "interactive")


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `workbench`."""
    group = commands.add_parser("runs", help="what ran: list, show, diff, sql, report, gallery, gc")
    verbs = group.add_subparsers(metavar="VERB", required=True)
    _add_looking(verbs, common)
    add_pages(verbs, common)
    add_gc(verbs, common)


def _add_looking(verbs: Any, common: argparse.ArgumentParser) -> None:
    listed = verbs.add_parser("list", parents=[common], help="one line per run")
    listed.add_argument("notebook", nargs="?", metavar="NOTEBOOK", help="its name, without .ipynb")
    listed.add_argument("--status", choices=STATUSES)
    listed.add_argument("-p", dest="parameters", metavar="NAME=VALUE", action="append", default=[], help="a parameter")
    listed.add_argument("--since", metavar="TIME", help="an age such as 12h or 7d, or a date such as 2026-01-31")
    listed.add_argument("--json", action="store_true", help="everything, for programs")
    listed.set_defaults(action=list_runs)

    one = verbs.add_parser("show", parents=[common], help="all about a run")
    one.add_argument("key", metavar="KEY", help="a key, the start of one, or a notebook")
    one.set_defaults(action=show)

    two = verbs.add_parser("diff", parents=[common], help="what differs between two runs")
    two.add_argument("first", metavar="KEY")
    two.add_argument("second", metavar="KEY")
    two.set_defaults(action=diff)

    query = verbs.add_parser("sql", parents=[common], help="one SELECT over all runs and the tables they kept")
    query.add_argument("query", metavar="SELECT", help="views: runs, and the name of each kept result")
    form = query.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true")
    form.add_argument("--json", action="store_true")
    query.set_defaults(action=sql)


def list_runs(arguments: argparse.Namespace) -> int:
    """Print one line per run, oldest first, with the parameters that vary."""
    from workbench.runs.records import matching, moment, records, varying

    since = moment(arguments.since) if arguments.since else None
    found = records(arguments.runs, arguments.notebook)
    given = pairs(arguments.parameters)
    found = matching(found, status=arguments.status, params=given, since=since)
    if arguments.json:
        print(json.dumps([_facts(record) for record in found], indent=1, ensure_ascii=False))
        return 0
    names = varying(found)
    rows = [
        [record.notebook, record.key, record.status, _when(record.started), _took(record.seconds)]
        + [record.params.get(name) for name in names]
        + [next(iter(record.findings), "")]
        for record in found
    ]
    print_table(["notebook", "key", "status", "started", "seconds", *names, "finding"], rows, right={"seconds"})
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print all that is known about a run."""
    from workbench import storage
    from workbench.runs.records import read

    run = one_run(arguments, arguments.key)
    (record,) = read([run])
    facts = record.manifest
    print(f"{run.notebook} {run.key}  {record.status}")
    print(f"  made by     {facts.get('command', '')}")
    print(f"  folder      {run.folder}")
    print(f"  started     {_when(record.started)} UTC, {_took(record.seconds) or '?'} s, on {facts.get('host', '?')}")
    _section("parameters", record.params)
    environment = run.folder / "environment.json"
    _section("environment", _surroundings(storage.read_json(environment)) if environment.exists() else {})
    if run.findings:
        print("findings", *(f"  {line}" for line in run.findings), sep="\n")
    artefacts = facts.get("artefacts", {})
    _section("files", {name: bytes_said(fact["bytes"]) for name, fact in artefacts.items()})
    if record.status == "failed":
        print_failure(run, sys.stdout)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Print what differs between two runs; exit code 0 where nothing does, else 1."""
    from workbench.runs.compare import compare

    compared = compare(one_run(arguments, arguments.first), one_run(arguments, arguments.second))
    print(compared)
    return 0 if compared.equal else 1


def sql(arguments: argparse.Namespace) -> int:
    """Print the rows of one SELECT."""
    from workbench.runs.records import records
    from workbench.runs.sql import Database

    rows = Database(records(arguments.runs)).query(arguments.query)
    if arguments.csv:
        print(rows.to_csv(index=False), end="")
    elif arguments.json:
        print(rows.to_json(orient="records", date_format="iso", indent=1))
    else:
        numbers = {str(name) for name in rows.columns if rows[name].dtype.kind in "iuf"}
        plain = rows.astype(object).where(rows.notna(), None)
        print_table([str(name) for name in rows.columns], plain.to_numpy().tolist(), right=numbers)
    return 0


def _facts(record: Record) -> dict[str, Any]:
    named = {name: getattr(record, name) for name in ("notebook", "key", "status", "started", "seconds")}
    last = {"findings": list(record.findings), "error": record.manifest.get("error")}
    last |= {"folder": str(record.run.folder), "command": record.manifest.get("command", "")}
    return named | {"params": dict(record.params)} | last


def _section(title: str, facts: Mapping[str, Any]) -> None:
    if facts:
        width = max(map(len, facts))
        print(title, *(f"  {name.ljust(width)}  {value}" for name, value in facts.items()), sep="\n")


def _surroundings(data: dict[str, Any]) -> dict[str, str]:
    """The environment in a few lines; all of it is in environment.json."""
    git = data.get("git") or {}
    commit = f"{git['commit'][:12]}{', with changes' if git['dirty'] else ''}" if git else "none"
    devices = ", ".join(gpu["name"] for gpu in data.get("gpus") or []) or "no GPU"
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in data.get("versions", {}).items()),
        "device": f"{data.get('cpu') or data.get('machine')}, {data.get('cpus')} cores, {devices}",
        "platform": str(data.get("platform")),
        "threads": str(data.get("variables", {}).get("OMP_NUM_THREADS", "?")),
        "commit": commit,
        "lock": str(data.get("lock_sha256"))[:12],
    }


def _when(started: str) -> str:
    return started[:19].replace("T", " ")


def _took(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"
