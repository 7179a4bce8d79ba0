"""Desks on the organism: the first picture, each step of each control that can be moved, and what of it the face costs.

    python bench/desks.py            every desk        python bench/desks.py DiceDesk        those named

One process, one thread of torch. Seconds of processor beside seconds of the clock: on a machine with other work the
clock tells how busy it was, the processor what a desk costs. A step is a picture of a value never asked before, with
nothing in its memory but the first picture and the steps before; it is made anew ROUNDS times, far apart, and the least
counts, since what others do to the processor's caches and clock can only add. The desks share one subject, and come by
name: what one has read of it, such as prefix states, the next finds; the first widget of a process reads plotly.js as
well. Nothing is sent anywhere: there is no browser.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import workbench.widgets
from bench._timing import machine, record
from workbench import Subject
from workbench.widgets.controls import Choice, Control, Number, Slider, Sliders
from workbench.widgets.desk import Desk
from workbench.widgets.face import Face

MOST_MS = 150  # a step of a slider should take no longer
STEPS = 5  # values that a control is moved to
ROUNDS = 3  # times that each of these steps is made


@dataclass(frozen=True)
class Spent:
    """What one piece of work took."""

    cpu_ms: float
    clock_ms: float
    refused: bool = False


def spent(work: Callable[[], object]) -> Spent:
    """What `work` took, and whether it was refused in words."""
    cpu, clock, refused = time.process_time(), time.perf_counter(), False
    try:
        work()
    except ValueError:
        refused = True
    return Spent(1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - clock), refused)


def desks(named: list[str]) -> list[type[Desk]]:
    """The desks in workbench.widgets, by name."""
    for module in iter_modules(workbench.widgets.__path__):
        import_module(f"workbench.widgets.{module.name}")
    found = {cls.__name__: cls for cls in Desk.__subclasses__() if cls.__module__.startswith("workbench.widgets.")}
    unknown = [name for name in named if name not in found]
    if unknown:
        raise SystemExit(f"got {unknown[0]!r}, expected one of {', '.join(sorted(found))}")
    return [found[name] for name in sorted(found) if not named or name in named]


def values(control: Control, now: Any) -> list[Any]:
    """Up to STEPS other values over the control's range."""
    others = [value for value in control.some() if value != now]
    if isinstance(control, Slider):  # steps of a hand lie between those that a contract test takes
        n_steps = round((control.high - control.low) / control.step)
        places = sorted({round(n_steps * (2 * k + 1) / (2 * STEPS)) for k in range(STEPS)})
        others = [type(control.step)(round(control.low + place * control.step, 9)) for place in places]
    return [value for value in others if value != now][:STEPS]


def row(desk: Desk, what: str, kind: str, times: list[Spent]) -> dict[str, object]:
    cpu, clock = ([getattr(one, name) for one in times] for name in ("cpu_ms", "clock_ms"))
    numbers = {"median_ms": statistics.median(cpu), "worst_ms": max(cpu), "clock_median_ms": statistics.median(clock)}
    too_slow = kind in ("slider", "sliders") and numbers["median_ms"] > MOST_MS
    verdict = f"above {MOST_MS} ms" if too_slow else ""
    return {"desk": type(desk).__name__, "what": what, "kind": kind, "times": len(times), **numbers, "verdict": verdict}


def steps(desk: Desk) -> list[dict[str, object]]:
    """One row per control that can be moved now, over the values that can be shown."""
    kinds = Slider | Sliders | Choice | Number
    controls = [control for control in desk.controls() if control.shown and isinstance(control, kinds)]
    rounds = [[moved(desk, control) for control in controls] for _ in range(ROUNDS)]
    rows = []
    for control, times in zip(controls, zip(*rounds, strict=True), strict=True):
        best = [min(same, key=lambda one: one.cpu_ms) for same in zip(*times, strict=True)]
        shown = [took for took in best if not took.refused]
        if shown:
            rows.append(row(desk, control.name, type(control).__name__.lower(), shown))
    return rows


def moved(desk: Desk, control: Control) -> list[Spent]:
    """A step to each of a few values, from a desk that has shown its first picture only."""
    fresh = type(desk)(desk.subject, **desk.settings)
    fresh.picture()
    others = values(control, desk.settings[control.name])
    return [spent(lambda value=value: fresh.changed(**{control.name: value}).picture()) for value in others]


def face(desk: Desk) -> list[dict[str, object]]:
    """What the widget adds: until the mark that it is busy stands, and a change to what was shown before."""
    work: list[Callable[[], None]] = []
    shown = Face(desk, later=work.append)
    first = spent(work.pop())
    name, other = next(
        (control.name, values(control, desk.settings[control.name])[0])
        for control in desk.controls()
        if control.shown and isinstance(control, Slider) and values(control, desk.settings[control.name])
    )
    marked, drawn = [], []
    for turn in range(2 * STEPS + 2):
        value = desk.settings[name] if turn % 2 else other
        mark = spent(lambda value=value: shown.change(**{name: value}))
        draw = spent(work.pop())
        if turn > 1:  # both are known by now
            marked, drawn = [*marked, mark], [*drawn, draw]
    return [
        row(desk, "first picture in a widget, known", "face", [first]),
        row(desk, f"until marked busy ({name})", "face", marked),
        row(desk, f"widget shows what is known ({name})", "face", drawn),
    ]


def measured(cls: type[Desk], subject: Subject) -> list[dict[str, object]]:
    """All rows of one desk."""
    desk = cls(subject)
    first = spent(desk.picture)
    again = [spent(desk.picture) for _ in range(STEPS)]
    rows = [row(desk, "first picture", "first", [first]), row(desk, "the same picture again", "again", again)]
    return [*rows, *steps(desk), *face(desk)]


def main() -> None:
    torch.set_num_threads(1)
    subject = Subject.organism(device="cpu")
    print(f"milliseconds of processor; {machine()}\n")
    print(f"{'desk':16s} {'what':44s} {'median':>8s} {'worst':>8s} {'clock':>8s}")
    rows: list[dict[str, object]] = []
    for cls in desks(sys.argv[1:]):
        for one in measured(cls, subject):
            rows.append(one)
            numbers = " ".join(f"{one[name]:8.0f}" for name in ("median_ms", "worst_ms", "clock_median_ms"))
            print(f"{one['desk']!s:16s} {one['what']!s:44s} {numbers}  {one['verdict']}", flush=True)
    slow = [f"{one['desk']}.{one['what']}" for one in rows if one["verdict"]]
    print(f"\nsteps of sliders above {MOST_MS} ms: {', '.join(slow) or 'none'}")
    print(f"written to {record('desks', rows)}")


if __name__ == "__main__":
    main()
