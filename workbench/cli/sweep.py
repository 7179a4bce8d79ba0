"""`workbench sweep NOTEBOOK -p seed=0..9 -p model=a,b`: many runs of one notebook, none of them twice."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from workbench.cli.saying import count, seconds

EXAMPLES = """values of -p: commas part them, 0..9 holds both ends, 0..10..5 goes in steps, quotes keep commas:
  -p seed=0..9 -p model=organism,tiny:gpt2 -p keep=0.25,0.5,1.0 -p 'prompt="a, b",c'
--grid FILE: YAML, a mapping of names to values (all combined), or a list of such mappings (put together);
  -p crosses it, and wins where both name a parameter.
Given again after any interruption, the same command makes what is missing."""


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of `workbench`."""
    many = commands.add_parser(
        "sweep",
        parents=[common],
        help="run a notebook over a grid of parameters, in parallel",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many.add_argument("notebook", metavar="NOTEBOOK")
    many.add_argument("-p", dest="axes", metavar="NAME=VALUES", action="append", default=[], help="values to combine")
    many.add_argument("--grid", metavar="FILE", help="more of them, in YAML")
    many.add_argument("--workers", type=int, metavar="N", help="runs at once (default: one per two CPUs)")
    many.add_argument("--gpus", type=int, default=0, metavar="N", help="runs at once, each with one GPU")
    many.add_argument("--scheduler", metavar="ADDRESS", help="an existing Dask scheduler, such as tcp://host:8786")
    many.add_argument("--slurm", metavar="QUEUE", help="Slurm jobs in this queue")
    many.add_argument("--timeout", type=seconds, metavar="S", help="seconds until a run is stopped as failed")
    many.add_argument("--threads", type=count, metavar="N", help="CPU threads per run (default: the CPUs, shared out)")
    retries = "how often a run is tried again after its worker or kernel died (default: 2); a failed cell never is"
    many.add_argument("--retries", type=int, default=2, metavar="N", help=retries)
    many.add_argument("--dry-run", action="store_true", help="show the runs and what is known of them; run nothing")
    many.set_defaults(action=sweep, makes_runs=True)


def sweep(arguments: argparse.Namespace) -> int:
    """Plan the runs of a grid, say what is known of them, and make those that are missing."""
    from workbench.grid import axes_of, crossed, read_grid
    from workbench.sweep import Where, make, survey
    from workbench.sweep.progress import label

    where = Where(arguments.workers, arguments.gpus, arguments.scheduler, arguments.slurm)
    axes = axes_of(arguments.axes)
    grid = crossed(read_grid(arguments.grid), axes) if arguments.grid else [axes]
    known = survey(arguments.notebook, grid, arguments.runs)
    at_once = None if where.scheduler else where.at_once(len(known.to_make))
    print(*known.lines(at_once), sep="\n", flush=True)
    if arguments.dry_run:
        for planned, given in zip(known.plans, known.given, strict=True):
            print(f"  {planned.run.key}  {known.states[planned.run.key]:<9}  {label(given)}")
        return 0
    made = make(
        known,
        where,
        command=_command(arguments),
        timeout=arguments.timeout,
        retries=arguments.retries,
        threads=arguments.threads,
    )
    return _tell(made)


def _tell(made: Any) -> int:
    """Print what came of a sweep: the failures in groups, the counts, the page."""
    from workbench.sweep.page import failure_groups, summary_line

    for group in failure_groups(made.facts["runs"]):
        error = group[0]["error"]
        where = "" if error.get("cell") is None else f" in cell {error['cell']}"
        print(f"failed {len(group)} x{where}: {error['kind']}", file=sys.stderr)
        print(*[f"  {line}".rstrip() for line in error["lines"][-3:]], sep="\n", file=sys.stderr)
        print(f"  such as: {group[0]['command']}", file=sys.stderr)
    print(f"{summary_line(made.facts['runs'])}; one page, opens offline: {made.page}")
    if made.status == "interrupted":
        print("interrupted; the same command resumes", file=sys.stderr)
    return {"done": 0, "failed": 1, "interrupted": 130}[made.status]


def _command(arguments: argparse.Namespace) -> str:
    """The command that makes this sweep again."""
    words = ["workbench", "sweep", arguments.notebook]
    words += [word for axis in arguments.axes for word in ("-p", axis)]
    named = ("grid", "workers", "scheduler", "slurm", "timeout", "threads", "runs")
    words += [f"--{name}={getattr(arguments, name)}" for name in named if getattr(arguments, name) is not None]
    words += [f"--gpus={arguments.gpus}"] if arguments.gpus else []
    words += [f"--retries={arguments.retries}"] if arguments.retries != 2 else []
    return shlex.join(words)
