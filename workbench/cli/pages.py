"""`workbench runs report` and `workbench runs gallery`: runs as pages to read and to hand on."""

from __future__ import annotations

import argparse
from typing import Any

from workbench.cli.choosing import KEYS, chosen, root_of
from workbench.cli.saying import print_findings


def add_pages(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to `workbench runs`."""
    for name, text, out, action in (
        ("report", "one HTML page that opens offline", "the page (default: report.html among the runs)", report),
        ("gallery", "a folder of pages to hand on", "the folder (default: gallery/ among the runs)", gallery),
    ):
        page = verbs.add_parser(name, parents=[common], help=text)
        page.add_argument("keys", nargs="*", metavar="KEY", help=f"{KEYS} (default: each notebook's latest)")
        page.add_argument("--all", action="store_true", help="every run")
        page.add_argument("--out", metavar="PATH", help=out)
        page.set_defaults(action=action)


def report(arguments: argparse.Namespace) -> int:
    """Write the HTML page of the chosen runs and print its path and their findings."""
    from workbench.report import write_report

    runs = chosen(arguments)
    path = write_report(runs, arguments.out or root_of(arguments) / "report.html")
    print(f"report of {len(runs)} run{'s' * (len(runs) > 1)}, opens offline: {path}")
    print_findings(runs)
    return 0


def gallery(arguments: argparse.Namespace) -> int:
    """Write a folder of pages, one per chosen run, and print the path of the first."""
    from workbench.gallery import write_gallery

    runs = chosen(arguments)
    path = write_gallery(runs, arguments.out or root_of(arguments) / "gallery")
    print(f"gallery of {len(runs)} run{'s' * (len(runs) > 1)}, opens offline: {path}")
    return 0
