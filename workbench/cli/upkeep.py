"""`workbench runs gc` and `workbench rerun KEY`: what can go, and what comes out when a run is made again."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from workbench.cli.choosing import one_run, root_of
from workbench.cli.saying import bytes_said, count, seconds


def add_to(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command `rerun` to the parser of `workbench`."""
    again = commands.add_parser("rerun", parents=[common], help="make a run again from what it stored, and compare")
    again.add_argument("key", metavar="KEY", help="a key, the start of one, or a notebook")
    again.add_argument("--timeout", type=seconds, metavar="S", help="seconds until the run is stopped as failed")
    again.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: as many as then)")
    again.set_defaults(action=rerun)


def add_gc(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to `workbench runs`."""
    clean = verbs.add_parser("gc", parents=[common], help="remove what failed, is half made or was only tried")
    clean.add_argument("keys", nargs="*", metavar="KEY", help="these runs only, done ones too; whole keys")
    clean.add_argument("--yes", action="store_true", help="remove; without it, only say what would go")
    clean.add_argument("--dry-run", dest="yes", action="store_false", help="only say what would go (the default)")
    clean.add_argument("--days", type=float, default=30.0, metavar="N", help="interactive runs go at this age (30)")
    clean.add_argument("--other-code", action="store_true", help="also done runs that today's code can't give")
    clean.set_defaults(action=gc)


def gc(arguments: argparse.Namespace) -> int:
    """Print what can go, and with --yes remove it."""
    from workbench.runs.removal import removable, remove

    items = removable(
        root_of(arguments), arguments.keys, interactive_days=arguments.days, other_code=arguments.other_code
    )
    kept, freed = 0, 0
    for item in items:
        gone = not arguments.yes or remove(item)
        kept, freed = kept + (not gone), freed + item.size_bytes * gone
        mark = "" if gone else "kept, it is at work or was made again: "
        print(f"{mark}{item.path}  {item.why}, {bytes_said(item.size_bytes)}")
    n_gone = len(items) - kept
    done = "removed" if arguments.yes else "can go (--yes removes)"
    print(f"{n_gone} item{'s' * (n_gone != 1)}, {bytes_said(freed)} {done}")
    return 0


def rerun(arguments: argparse.Namespace) -> int:
    """Make a run again beside the old one and print what differs; exit code 0 where the same came out."""
    from workbench.runs.rerun import rerun as made_again

    run = one_run(arguments, arguments.key)
    progress = sys.stderr.isatty()
    compared = made_again(run, timeout=arguments.timeout, threads=arguments.threads, progress=progress)
    print(compared)
    print(f"the new one is kept in {compared.second.folder}")
    return 0 if compared.same_outcome else 1
