"""How long one waits before anything happens: imports, loading, and entering a toggle.

    python bench/startup.py

Each import runs in a fresh interpreter; PyTorch and transformers alone stand beside the package that needs them.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, Side, version_of
from bench._timing import medians, record, seconds_of
from workbench import Site, Steer, Subject
from workbench.organism import FOLDER

IMPORTS = {
    "import workbench": "import workbench",
    "from workbench import Subject": "from workbench import Subject",
    "torch and transformers alone": "import torch; from transformers import AutoTokenizer, PreTrainedModel",
}


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table: a fresh interpreter up to the end of one import."""
    menu, needs = IMPORTS["from workbench import Subject"], IMPORTS["torch and transformers alone"]
    libraries = f"{version_of('torch')}, {version_of('transformers')}"
    what, often = "import in a fresh interpreter", (1, False) if quick else (5, True)
    rivals = (
        (menu, "torch and transformers alone", needs, libraries),
        (menu, "import nnsight", "import nnsight", version_of("nnsight")),
        (IMPORTS["import workbench"], "an empty interpreter", "pass", f"Python {platform.python_version()}"),
    )
    for ours, peer, theirs, version in rivals:
        yield Match(what, ours, peer, fresh(ours), fresh(theirs), version, None, *often)


def fresh(statement: str) -> Side:
    """A side that is measured in seconds of an interpreter that runs one statement."""
    return lambda: {"seconds": statement_seconds(statement)}


def statement_seconds(statement: str) -> float:
    return seconds_of(lambda: subprocess.run([sys.executable, "-c", statement], check=True))


def import_seconds(statement: str, repeats: int = 5) -> float:
    """Median seconds of an interpreter that runs one statement, less one that runs nothing."""
    return statistics.median(statement_seconds(statement) - statement_seconds("pass") for _ in range(repeats))


def main() -> None:
    warnings.simplefilter("ignore", UserWarning)  # a toggle that is only entered rightly says that it never fired
    rows: list[dict[str, object]] = []
    for name, statement in IMPORTS.items():
        rows.append({"what": name, "seconds": import_seconds(statement)})
    subject = Subject.organism()
    push = Steer(torch.ones(subject.anatomy.d_model), Site(3, "resid_out"))

    def enter() -> None:
        with subject.under(push):
            pass

    loads = {
        "Subject.organism(), proved": Subject.organism,
        "Subject.load(organism), not proved": lambda: Subject.load(FOLDER, verify=False),
        "Subject.tiny(), proved": Subject.tiny,
        "enter and leave a toggle": enter,
    }
    rows += [{"what": name, "seconds": seconds} for name, seconds in medians(loads, repeats=9).items()]
    for row in rows:
        print(f"{row['what']:<40} {1e3 * float(str(row['seconds'])):9.2f} ms")
    record("startup", rows)


if __name__ == "__main__":
    main()
