"""One family of rows in a process of its own: what one family leaves in memory or breaks touches no other.

python -m bench._family NAME ROUNDS [--quick]      started by bench/table.py; rows come out as JSON lines
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings

from bench._match import rows_of


def main(name: str, rounds: int, quick: bool) -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for a row
    logging.getLogger("papermill").addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")  # of toggles that are only entered, of solvers stopped early: both on purpose
    for match in importlib.import_module(f"bench.{name}").matches(quick):
        for row in rows_of(match, rounds):
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "--quick" in sys.argv)
