"""How long one waits before anything happens: imports, loading, and entering a toggle.

    python bench/startup.py

Each import runs in a fresh interpreter; PyTorch and transformers alone stand beside the package that needs them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings

import torch
from _timing import medians, record

from workbench import Site, Steer, Subject
from workbench.organism import FOLDER

IMPORTS = {
    "import workbench": "import workbench",
    "from workbench import Subject": "from workbench import Subject",
    "torch and transformers alone": "import torch; from transformers import AutoTokenizer, PreTrainedModel",
}


def import_seconds(statement: str, repeats: int = 5) -> float:
    """Median seconds of an interpreter that runs one statement, less one that runs nothing."""
    spent = []
    for _ in range(repeats):
        times = []
        for code in (statement, "pass"):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - started)
        spent.append(times[0] - times[1])
    return statistics.median(spent)


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
