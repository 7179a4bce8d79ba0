"""Which runs the words of a command line mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.run import Run
    from workbench.storage import Place

KEYS = "keys, starts of keys, or notebooks, meaning their latest run"


def root_of(arguments: argparse.Namespace) -> Place:
    """Where the runs live that the command is about."""
    from workbench import storage
    from workbench.run import default_runs

    return storage.place(arguments.runs) if arguments.runs else default_runs()


def check_root(arguments: argparse.Namespace) -> None:
    """Refuse a --runs that is a file, or that is not there for a command that makes no runs."""
    from workbench import storage

    if not getattr(arguments, "runs", None) or "://" in arguments.runs:
        return
    root = storage.place(arguments.runs)
    if root.exists() and not root.is_dir():
        raise ValueError(f"--runs: {root} is a file, expected a folder of runs.")
    if not root.exists() and not getattr(arguments, "makes_runs", False):
        raise FileNotFoundError(f"--runs: there is no folder {root}. Check the path.")


def one_run(arguments: argparse.Namespace, word: str) -> Run:
    """The run that a word names."""
    from workbench.run import all_runs
    from workbench.runs.records import chosen_runs

    return chosen_runs(all_runs(arguments.runs), [word])[0]


def chosen(arguments: argparse.Namespace) -> list[Run]:
    """The runs that KEY ... and --all name."""
    from workbench.run import all_runs
    from workbench.runs.records import chosen_runs

    return chosen_runs(all_runs(arguments.runs), arguments.keys, arguments.all)
