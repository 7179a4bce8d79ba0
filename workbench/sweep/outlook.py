"""What a sweep would do, before it does it: which runs are cached, which go on elsewhere, which are left, how long."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.grid import Axes, combinations
from workbench.leases import Holder, held
from workbench.run import Draft, Plan, all_runs

CACHED, ELSEWHERE, LEFT = "cached", "elsewhere", "left"


@dataclass(frozen=True)
class Survey:
    """Every run that a grid asks for, and what is known of it.

    plans     in the grid's order, each key once      given    what each was given, in the declared types
    states    cached, elsewhere or left, by key       before   how the last attempt at a run that is left ended, by key
    seconds   of past runs of the same notebook       n_folded runs that the grid names more than once
    """

    notebook: Path
    plans: tuple[Plan, ...]
    given: tuple[dict[str, Any], ...]
    states: dict[str, str]
    before: dict[str, str]
    holders: dict[str, Holder]
    seconds: tuple[float, ...]
    n_folded: int

    def count(self, state: str) -> int:
        return Counter(self.states.values())[state]

    @property
    def to_make(self) -> list[int]:
        """The places of the runs to make among the plans; those at work elsewhere come last, as they may end there."""
        places = [n for n, planned in enumerate(self.plans) if self.states[planned.run.key] != CACHED]
        return sorted(places, key=lambda n: self.states[self.plans[n].run.key] == ELSEWHERE)

    @property
    def median_s(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def lines(self, at_once: int | None) -> list[str]:
        """The survey in words; `at_once` is None where that is not known yet."""
        folded = f" ({self.n_folded} named more than once)" if self.n_folded else ""
        lines = [f"{self.notebook}: {counted(len(self.plans), 'run')}{folded}"]
        lines += [f"  {name:<10}  {text}" for name, text in self._axes().items()]
        lines.append(f"cached      {self.count(CACHED)}")
        if self.holders:
            first = next(iter(self.holders.values()))
            others = f" and {len(self.holders) - 1} more" if len(self.holders) > 1 else ""
            lines.append(f"elsewhere   {self.count(ELSEWHERE)} at work now: {first}{others}")
        endings = ", ".join(f"{number} {how} before" for how, number in Counter(self.before.values()).items())
        lines.append(f"left        {self.count(LEFT)}{f' ({endings})' if endings else ''}")
        lines.append(f"time        {self._time(at_once)}")
        return lines

    def _axes(self) -> dict[str, str]:
        """The values of every parameter that is given, in short."""
        names = dict.fromkeys(name for given in self.given for name in given)
        return {name: short(list(dict.fromkeys(repr(g[name]) for g in self.given if name in g))) for name in names}

    def _time(self, at_once: int | None) -> str:
        n_left = len(self.to_make)
        if not n_left:
            return "none: everything is there"
        if self.median_s is None:
            return "not known: no run of this notebook has finished yet"
        basis = f"a run takes {duration(self.median_s)}, the median of {counted(len(self.seconds), 'past run')}"
        if at_once is None:
            return basis
        return f"about {duration(self.median_s * math.ceil(n_left / at_once))} with {at_once} at a time; {basis}"


def survey(notebook: str | Path, grid: Sequence[Axes], runs: Any = None) -> Survey:
    """Check the whole grid, plan all its runs and look at what is there. Writes nothing.

    Raises what `plan` raises, and ValueError with every wrong parameter of the grid at once.
    """
    draft = Draft.read(notebook)
    asked = combinations(grid, draft.parameters)
    name = draft.plan(runs=runs).run.notebook
    found: dict[str, tuple[Plan, dict[str, Any]]] = {}
    for given in asked.given:
        planned = draft.plan(given, runs=runs)
        found.setdefault(planned.run.key, (planned, given))
    plans = tuple(planned for planned, _ in found.values())
    known = {run.key: run for run in all_runs(runs) if run.notebook == name}
    manifests = {key: run.manifest for key, run in known.items()}
    holders = _holders(plans, manifests)
    return Survey(
        notebook=draft.notebook,
        plans=plans,
        given=tuple(given for _, given in found.values()),
        states={key: _state(key, manifests, holders) for key in found},
        before=_before(found, manifests, holders),
        holders=holders,
        seconds=tuple(m["seconds"] for m in manifests.values() if m.get("status") == "done" and "seconds" in m),
        n_folded=asked.n_folded + len(asked.given) - len(found),
    )


def _holders(plans: Sequence[Plan], manifests: Mapping[str, Any]) -> dict[str, Holder]:
    """Who works now on which of the runs that have begun and are not done."""
    begun = [planned.run for planned in plans if manifests.get(planned.run.key, {}).get("status", "done") != "done"]
    return {run.key: holder for run in begun if (holder := held(run.folder)) is not None}


def _state(key: str, manifests: Mapping[str, Any], holders: Mapping[str, Holder]) -> str:
    if key in holders:
        return ELSEWHERE
    return CACHED if manifests.get(key, {}).get("status") == "done" else LEFT


def _before(keys: Any, manifests: Mapping[str, Any], holders: Mapping[str, Holder]) -> dict[str, str]:
    """How earlier attempts at the runs that are left ended; one whose runner was killed is lost."""
    left = [key for key in keys if key in manifests and _state(key, manifests, holders) == LEFT]
    return {key: manifests[key]["status"].replace("running", "lost") for key in left}


def short(values: Sequence[str], most: int = 6) -> str:
    """A list of values in one line."""
    if len(values) <= most:
        return ", ".join(values)
    return f"{', '.join(values[: most - 2])}, ... {values[-1]} ({len(values)} values)"


def counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """A length of time in words, to two digits or so."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
