"""`workbench run NOTEBOOK`: one notebook through papermill, unless that is done already."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from workbench.cli.saying import count, pairs, print_failure, print_findings, seconds


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser of `workbench`."""
    one = commands.add_parser("run", parents=[common], help="run a notebook, unless that is done already")
    one.add_argument("notebook", metavar="NOTEBOOK")
    one.add_argument("-p", dest="parameters", metavar="NAME=VALUE", action="append", default=[], help="a parameter")
    one.add_argument("--force", action="store_true", help="compute again what is done")
    one.add_argument("--timeout", type=seconds, metavar="S", help="seconds until the run is stopped as failed")
    one.add_argument("--threads", type=count, metavar="N", help="CPU threads for arithmetic")
    one.set_defaults(action=run, makes_runs=True)


def run(arguments: argparse.Namespace) -> int:
    """Run a notebook and print what it found, or where it failed."""
    from workbench.run import plan

    planned = plan(arguments.notebook, pairs(arguments.parameters), runs=arguments.runs)
    if planned.run.status == "done" and not arguments.force:
        print(f"done before, nothing to compute (--force computes it again): {planned.run.folder}")
        print_findings([planned.run])
        return 0
    made = planned.execute(
        force=arguments.force,
        timeout=arguments.timeout,
        threads=arguments.threads,
        progress=sys.stderr.isatty(),
    )
    if made.status != "done":
        print_failure(made)
        return 1
    print(f"done in {made.manifest['seconds']:.1f} s: {made.folder}")
    print_findings([made])
    return 0
