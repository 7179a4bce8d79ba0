"""The command `workbench`: run a notebook, look at runs, check a model and this machine, open JupyterLab.

Exit code 0: done; 1: the run failed; 2: the user's mistake, told in one line; 130: interrupted.
Heavy libraries are imported by the command that needs them, so that `workbench --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.run import Run

TRACEBACK_VARIABLE = "WORKBENCH_TRACEBACK"  # set it to see where an error comes from
FINDING_LINES = 5


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `words`, by default this process's own, and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" instead of an error
    arguments = _parser().parse_args(words)
    try:
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


def run(arguments: argparse.Namespace) -> int:
    """Run a notebook and print what it found, or where it failed."""
    from workbench.run import plan

    planned = plan(arguments.notebook, _parameters(arguments.parameters), runs=arguments.runs)
    if planned.run.status == "done" and not arguments.force:
        print(f"done before, nothing to compute (--force computes it again): {planned.run.folder}")
        return _print_findings([planned.run])
    made = planned.execute(
        force=arguments.force,
        timeout=arguments.timeout,
        threads=arguments.threads,
        progress=sys.stderr.isatty(),
    )
    if made.status == "done":
        print(f"done in {made.manifest['seconds']:.1f} s: {made.folder}")
        return _print_findings([made])
    return _print_failure(made)


def list_runs(arguments: argparse.Namespace) -> int:
    """Print one line per run, oldest first."""
    from workbench.run import all_runs

    row = "{:<20}  {:<24}  {:<11}  {:<19}  {}"
    print(row.format("notebook", "key", "status", "started", "finding"))
    for found in all_runs(arguments.runs):
        started = found.manifest.get("started", "")[:19].replace("T", " ")
        print(row.format(found.notebook, found.key, found.status, started, (found.findings or [""])[0]))
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write the HTML page of the chosen runs and print its path and their findings."""
    from workbench.report import write_report
    from workbench.run import all_runs, default_runs

    root = Path(arguments.runs) if arguments.runs else default_runs()
    chosen = chosen_runs(all_runs(root), arguments.keys, arguments.all)
    path = write_report(chosen, arguments.out or root / "report.html")
    print(f"report of {len(chosen)} run{'s' * (len(chosen) > 1)}, opens offline: {path}")
    return _print_findings(chosen)


def chosen_runs(runs: Sequence[Run], words: Sequence[str], every: bool = False) -> list[Run]:
    """The runs that words name: a key, the start of one, or a notebook, meaning its latest finished run.

    Without words the latest finished run of each notebook; `every` chooses them all.
    """
    if every:
        words, chosen = (), list(runs)
    else:
        latest = {found.notebook: found for found in runs if found.status in ("done", "failed")}
        chosen = [] if words else sorted(latest.values(), key=lambda found: found.notebook)
        for word in words:
            matches = [latest[word]] if word in latest else [found for found in runs if found.key.startswith(word)]
            if len(matches) != 1:
                hint = "`workbench runs list` shows them" if not matches else "give more of the key"
                raise ValueError(f"runs: {word!r} names {len(matches)} runs, expected one; {hint}.")
            chosen += matches
    if not chosen:
        raise ValueError("runs: there are none yet, expected at least one. Try `workbench run NOTEBOOK`.")
    return chosen


def doctor(arguments: argparse.Namespace) -> int:
    """Print versions, devices and the compatibility card of a model."""
    import torch

    from workbench.environment import n_cpus, versions
    from workbench.subject import Subject

    print("versions  " + "  ".join(f"{name} {version}" for name, version in versions().items()))
    memory = (
        f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB" if os.name == "posix" else ""
    )
    print(f"cpu       {n_cpus()} cores, {torch.get_num_threads()} threads{memory}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}    {device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("cuda      none")
    print(Subject.open(arguments.model).card)
    return 0


def lab(arguments: argparse.Namespace) -> int:
    """Replace this process by JupyterLab on the notebooks."""
    from workbench.run import RUNS_VARIABLE, default_runs

    folder = Path(arguments.notebooks)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Start in the project, or name the notebooks' folder.")
    os.environ.setdefault(RUNS_VARIABLE, str(default_runs().resolve()))
    os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    if not os.access(Path.home(), os.W_OK):  # a class's machines may have no home to write to
        home = tempfile.mkdtemp(prefix="workbench-home-")
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            os.environ.setdefault(name, str(Path(home, name.lower())))
    words = [sys.executable, "-m", "jupyterlab", str(folder), *arguments.options]
    os.execv(sys.executable, words)


def _print_findings(runs: Sequence[Run]) -> int:
    """Print up to five findings, the first of every run before the second of any."""
    ranked = sorted((rank, n, line) for n, run in enumerate(runs) for rank, line in enumerate(run.findings))
    for _, _, line in sorted(ranked[:FINDING_LINES], key=lambda item: (item[1], item[0])):
        print(f"  {line}")
    return 0


def _print_failure(run: Run) -> int:
    error = run.manifest["error"]
    where = "" if error.get("cell") is None else f" in cell {error['cell']}"
    print(f"failed{where}: {error['kind']}; everything is kept in {run.folder}", file=sys.stderr)
    for line in [*error.get("source", "").splitlines(), "", *error["lines"]]:
        print(f"  {line}".rstrip(), file=sys.stderr)
    return 1


def _parameters(words: Sequence[str]) -> dict[str, str]:
    """Name and text of each `-p name=value`."""
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"-p: got {word!r}, expected NAME=VALUE.")
        if name in given:
            raise ValueError(f"-p: {name} is given twice, expected once.")
        given[name] = value
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="workbench", description="A workbench for the insides of language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("--runs", metavar="DIR", help="where runs live (default: runs/ in the project)")

    one = commands.add_parser("run", parents=[runs], help="run a notebook, unless that is done already")
    one.add_argument("notebook", metavar="NOTEBOOK")
    one.add_argument("-p", dest="parameters", metavar="NAME=VALUE", action="append", default=[], help="a parameter")
    one.add_argument("--force", action="store_true", help="compute again what is done")
    one.add_argument("--timeout", type=_positive, metavar="S", help="seconds until the run is stopped as failed")
    one.add_argument("--threads", type=int, metavar="N", help="CPU threads for arithmetic")
    one.set_defaults(action=run)

    check = commands.add_parser("doctor", help="versions, devices, and how well a model fits")
    check.add_argument("model", nargs="?", default="organism", help="organism, tiny:FAMILY, a folder or a hub name")
    check.set_defaults(action=doctor)

    open_lab = commands.add_parser("lab", help="open JupyterLab on the notebooks")
    open_lab.add_argument("notebooks", nargs="?", default="notebooks", metavar="FOLDER")
    open_lab.add_argument("options", nargs="*", metavar="-- OPTION", help="options for JupyterLab, after --")
    open_lab.set_defaults(action=lab)

    group = commands.add_parser("runs", help="what ran: list, report")
    verbs = group.add_subparsers(metavar="VERB", required=True)
    verbs.add_parser("list", parents=[runs], help="one line per run").set_defaults(action=list_runs)
    page = verbs.add_parser("report", parents=[runs], help="one HTML page that opens offline")
    page.add_argument("keys", nargs="*", metavar="KEY", help="keys or notebooks (default: each notebook's latest)")
    page.add_argument("--all", action="store_true", help="every run")
    page.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html among the runs)")
    page.set_defaults(action=report)
    return parser


def _positive(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected seconds above 0")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
