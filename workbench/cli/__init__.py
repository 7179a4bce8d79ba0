"""The command `workbench`: run a notebook, look at runs, check a model and this machine, open JupyterLab.

Exit code 0: done; 1: a run failed, or two runs differ; 2: the user's mistake, told in one line; 130: interrupted.
Each family of commands is a file with `add_to(commands, common)`. Heavy libraries are imported by the command that
needs them, so that `workbench --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from workbench.cli import demo, machine, run, runs, sweep, upkeep
from workbench.cli.choosing import check_root

TRACEBACK_VARIABLE = "WORKBENCH_TRACEBACK"  # set it to see where an error comes from
FAMILIES = (run, sweep, machine, demo, runs, upkeep)  # in the order of `workbench --help`


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words`, by default this process's own, and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" instead of an error
    arguments = _parser().parse_args(words)
    try:
        check_root(arguments)
        code = arguments.action(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python must not flush into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"workbench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | FileNotFoundError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workbench", description="A workbench for the insides of language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--runs", metavar="DIR", help="where runs live (default: runs/ in the project)")
    for family in FAMILIES:
        family.add_to(commands, common)
    return parser
