"""One table of this project against its peers, measured in one run: what, here, there, and the ratio with its spread.

python -m bench                       all of it, written to bench/results/table.parquet
python -m bench --quick               small sizes and few rounds: that everything runs, no figures to keep
python -m bench --only capture snmf   these alone; in a full run their rows replace those in the Parquet
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Timer

import numpy as np
import pandas as pd

from bench._match import Row, short
from bench._timing import RESULTS, ROOT, machine
from bench.peers import FOLDER, variables
from workbench.files import write_atomically

FAMILIES = (
    *("capture", "hftp", "average_precision", "snmf", "neuron_tokens", "logit_lens", "steering", "kv_cache"),
    *("bit_search", "pruning", "bitmap", "sweep", "overhead", "startup"),
)
ROUNDS, QUICK_ROUNDS = 7, 2
LIMIT_S = 1200  # of one family, with the making of its peers' environments
TABLE, QUICK_TABLE = RESULTS / "table.parquet", FOLDER / "quick.parquet"


def main(words: Sequence[str] | None = None) -> int:
    """Run, print and write the table; 1 where this project's own side or a check failed, 0 where at most peers did."""
    parser = ArgumentParser("python -m bench", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds; written beside the peers only")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, metavar="NAME", help=" ".join(FAMILIES))
    asked = parser.parse_args(words)
    facts = machine()
    print(" ".join(f"{name} {value}" for name, value in facts.items()))
    print("\n                                         here       there    there / here (quartiles over rounds)")
    path, last, wrong = QUICK_TABLE if asked.quick else TABLE, "", False
    for name in asked.only or FAMILIES:
        rows = []
        for row in family(name, asked.quick):
            now = {key: value for key, value in machine().items() if key in ("load", "date")}
            rows.append({"family": name, "quick": asked.quick} | row | facts | now)  # the commit as it was at the start
            if row["what"] != last:
                print(f"\n{row['what']}")
            last = str(row["what"])
            print(f"  {told(row)}", flush=True)
            wrong |= row["failed"] in ("ours", "the check")
        written(rows, path)  # what is measured stays, should a later family be interrupted
    print(f"\nabove 1 this project takes less. Written to {path.relative_to(ROOT)}")
    return int(wrong)


def family(name: str, quick: bool) -> Iterator[Row]:
    """The rows of one family as they come; one more in words where its process ended early."""
    command = [sys.executable, "-m", "bench._family", name, str(QUICK_ROUNDS if quick else ROUNDS)]
    with tempfile.TemporaryFile("w+") as said:
        pipes = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
        process = subprocess.Popen([*command, *(["--quick"] if quick else [])], cwd=ROOT, env=variables(), **pipes)
        late = Event()

        def stop() -> None:
            late.set()
            process.kill()

        with process:
            timer = Timer(LIMIT_S, stop)
            timer.start()
            try:
                assert process.stdout is not None
                yield from map(json.loads, process.stdout)
            finally:
                timer.cancel()
        if process.returncode:
            said.seek(0)
            lines = said.read().strip().splitlines() or ["no word"]
            end = f"was ended after {LIMIT_S:g} s" if late.is_set() else f"ended with status {process.returncode}"
            note = f"the process {end}: {lines[-1]}"
            yield {"what": name, "name": "", "peer": "", "failed": "ours", "note": note[:200]}


def told(row: Row) -> str:
    """One printed line of the table."""
    if row["failed"]:
        return f"{row['name']:<34} against {row['peer']}: {row['failed']} failed: {row['note']}"
    here, there, ratio, low, high = (
        short(float(str(row[key]))) for key in ("here", "there", "ratio", "ratio_low", "ratio_high")
    )
    return (
        f"{row['name']:<34} {here:>9} {there:>11} {ratio:>9}  ({low} to {high})".ljust(86)
        + f"{row['measure']}; against {row['peer']}, {row['version']}"
    )


def written(rows: list[Row], path: Path) -> Path:
    """Write the rows; those of families that were not run again stay, each with its own machine and commit."""
    table = pd.DataFrame(rows)
    if path.exists():
        before = pd.read_parquet(path)
        kept = pd.concat([before[~before["family"].isin(table["family"])], table])
        order = np.argsort([FAMILIES.index(name) for name in kept["family"]], kind="stable")
        table = kept.iloc[order].reset_index(drop=True)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, table.to_parquet(index=False))
    return path
