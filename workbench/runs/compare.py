"""Two runs side by side: what made them (parameters, code, package, inputs, model, environment), then what came out.

Results are compared byte for byte; only where bytes differ are values looked at. Times are no difference: when a run
began, how long it took, and what a result declares as its `clocks`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from workbench import storage
from workbench.folder import RUN_VARIABLE, Run
from workbench.runs.figures import figure_differences
from workbench.runs.kept import result_differences
from workbench.runs.notebooks import code_differences, code_of

CAUSES = ("parameters", "code", "package", "inputs", "model", "environment")
OUTCOMES = ("status", "findings", "results", "figures")
ONE = [["code"], ["package"], ["model"], ["environment"], ["status"]]  # words in the singular
LONGEST = 60  # characters of a value in a sentence


class Difference(NamedTuple):
    """One thing that two runs don't share: the part it is of (`CAUSES`, then `OUTCOMES`), its name, how it differs."""

    part: str
    name: str
    how: str


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs.

    notes   what differs and must: measured times
    """

    first: Run
    second: Run
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def same_outcome(self) -> bool:
        """Whether the same came out, whatever made it."""
        return not [item for item in self.differences if item.part in OUTCOMES]

    @property
    def verdict(self) -> str:
        """The comparison in one sentence."""
        names = list(dict.fromkeys(item.part for item in self.differences))
        parts = f"{', '.join(names)} differ{'s' if names in ONE else ''}"
        if self.equal:
            return "equal: the same parameters, code and environment, and the same outcome, byte for byte"
        return f"the same outcome, byte for byte; {parts}" if self.same_outcome else parts

    def table(self) -> pd.DataFrame:
        """One row per difference: part, name, how."""
        return pd.DataFrame(self.differences, columns=pd.Index(Difference._fields))

    def __str__(self) -> str:
        lines = [f"first   {_named(self.first)}", f"second  {_named(self.second)}", self.verdict]
        for part in dict.fromkeys(item.part for item in self.differences):
            lines += [f"{part}:", *(f"  {item.name}: {item.how}" for item in self.differences if item.part == part)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def compare(first: Run, second: Run) -> Comparison:
    """What differs between two runs, causes before outcomes."""
    with storage.on_disk(first.folder) as a, storage.on_disk(second.folder) as b:
        made = [*_causes(first, second, a, b)]
        results, clocks = result_differences(a / "results", b / "results")
        outcome = [*_status(first.manifest, second.manifest), *_findings(first.findings, second.findings)]
        outcome += [Difference("results", name, how) for name, how in results]
        figures = figure_differences(first.figures(), second.figures(), timed=set(clocks))
        outcome += [Difference("figures", name, how) for name, how in figures]
    notes = tuple(
        f"{name} holds measured times ({fields}): but for them it is equal" for name, fields in clocks.items()
    )
    return Comparison(first, second, (*made, *outcome), notes)


def _causes(first: Run, second: Run, a: Path, b: Path) -> Iterator[Difference]:
    yield from _mappings("parameters", first.params, second.params)
    codes = [code_of(folder / "notebook.ipynb") for folder in (a, b)]
    for name, how in code_differences(*codes):
        yield Difference("code", name, how)
    surroundings = [_json(folder / "environment.json") for folder in (a, b)]
    parts = [around.pop("key_parts", None) or {} for around in surroundings]
    packages = [part.get("package") for part in parts]
    if packages[0] != packages[1]:
        yield Difference("package", "source of workbench", _pair(*packages))
    yield from _mappings("inputs", *({n: v for n, v in (part.get("inputs") or {}).items() if v} for part in parts))
    yield from _mappings("model", *(_models(folder) for folder in (a, b)))
    for around in surroundings:
        around.get("variables", {}).pop(RUN_VARIABLE, None)  # where the run lives decides nothing
    yield from _mappings("environment", *(dict(_flat(around)) for around in surroundings))


def _status(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    """How the runs ended, and why where they failed."""
    ends = [{"status": facts.get("status")} for facts in (first, second)]
    for end, facts in zip(ends, (first, second), strict=True):
        error = facts.get("error") or {}
        end |= {"error": error.get("kind"), "cell": error.get("cell"), "last line": (error.get("lines") or [None])[-1]}
    yield from _mappings("status", *ends)


def _findings(first: list[str], second: list[str]) -> Iterator[Difference]:
    for name, one, other in (("first", first, second), ("second", second, first)):
        for line in one:
            if line not in other:
                yield Difference("findings", f"only the {name}", line)


def _models(folder: Path) -> dict[str, Any]:
    """Which model each result was measured on, and where: name, weights, dtype, device."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("results/*/result.json")):
        subject = (_json(path).get("provenance") or {}).get("subject") or {}
        found |= {f"{path.parent.name}: {name}": value for name, value in subject.items()}
    return found


def _mappings(part: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*first, *second)):
        one, other = first.get(name), second.get(name)
        if repr(one) != repr(other):  # 1, 1.0 and True are three values
            yield Difference(part, name, _pair(one, other))


def _flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _pair(one: Any, other: Any) -> str:
    return " and ".join("none" if value is None else _short(value) for value in (one, other))


def _short(value: Any) -> str:
    text = str(value)
    if re.fullmatch(r"[0-9a-f]{40,64}", text):  # a digest: its start tells it apart
        return text[:12]
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _named(run: Run) -> str:
    facts = run.manifest
    started = facts.get("started", "")[:19].replace("T", " ")
    seconds = f", {facts['seconds']:.1f} s" if "seconds" in facts else ""
    return f"{run.notebook} {run.key}  {run.status}, {started}{seconds}"


def _json(path: Path) -> dict[str, Any]:
    return storage.read_json(path) if path.exists() else {}
