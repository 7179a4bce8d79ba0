"""Time every operation on a GPU, correctness first: python -m workbench_kernels.bench [OP ...] [--out FILE.parquet]

Each row has its milliseconds, the GB/s of the bytes that must move, and their share of what a plain copy reaches on the
same device in the same run. A time without a GPU would mean nothing, so there is none.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import workbench_kernels
from workbench_kernels import dispatch

TIMED = ("op", "impl", "ms", "bytes", "gb_per_s", "share_of_copy")  # columns of every row; the others are its case
ERRORS = ("max_abs_err", "relative_error", "relative_rms")  # the first that a row has is shown


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every operation was right and timed, 1 where one failed, 2 where nothing could be run."""
    wanted = _parser().parse_args(arguments)
    if problem := _problem(wanted.op, wanted.out):
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    where, rows, failed = machine(), [], []
    print("  ".join(f"{name} {value}" for name, value in where.items()), end="\n\n", flush=True)
    for op in wanted.op or operations():
        try:
            rows += importlib.import_module(f"workbench_kernels.{op}.bench").rows(torch.device("cuda"))
        except Exception:  # the others are still worth their time; this one is told and decides the exit code
            traceback.print_exc()
            failed.append(op)
    print(table(rows))
    if wanted.out and rows:
        import pandas as pd

        pd.DataFrame([row | where for row in rows]).to_parquet(wanted.out, index=False)
        print(f"\nwritten to {wanted.out}")
    if failed:
        print(f"\nbench: failed, so not timed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def operations() -> list[str]:
    """Every folder of this package that has a bench."""
    found = [module.name for module in pkgutil.iter_modules(workbench_kernels.__path__) if module.ispkg]
    return [name for name in found if find_spec(f"workbench_kernels.{name}.bench")]


def machine() -> dict[str, str]:
    """Where and when: what a number of milliseconds means nothing without."""
    return {
        "device": torch.cuda.get_device_name(),
        "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "cuda": torch.version.cuda or "unknown",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _told("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """All rows as text; a blank line where the case changes."""
    lines, last = [], None
    heads = ("op", "impl", "ms", "GB/s", "of copy", "error", "case")
    cells = [heads, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for op, impl, *numbers, case in cells:
        if last not in (None, (op, case)):
            lines.append("")
        last = (op, case)
        aligned = (number.rjust(width) for number, width in zip(numbers, widths[2:-1], strict=True))
        lines.append("  ".join((op.ljust(widths[0]), impl.ljust(widths[1]), *aligned, case)))
    return "\n".join(lines)


def _cells(row: dict[str, object]) -> tuple[str, ...]:
    case = " ".join(f"{name}={value}" for name, value in row.items() if name not in TIMED + ERRORS)
    error = next((f"{row[name]:.1e}" for name in ERRORS if name in row), "equal")
    times = f"{row['ms']:.4f}", f"{row['gb_per_s']:.0f}", f"{row['share_of_copy']:.0%}"
    return str(row["op"]), str(row["impl"]), *times, error, case


def _problem(ops: Sequence[str], out: Path | None) -> str | None:
    """Why nothing can be run, in words, or None: told before an hour is spent."""
    if unknown := sorted(set(ops) - set(operations())):
        return f"got {', '.join(unknown)}, expected some of {', '.join(operations())}."
    if not torch.cuda.is_available():
        return "no CUDA device here. Kernels are timed on a GPU only: run this on one. Their tests run anywhere."
    if not dispatch.has_triton():
        return "triton is not installed. Install it: the kernels are written in it."
    if dispatch.interpreting():
        return "TRITON_INTERPRET is set, so kernels would run on the CPU. Unset it."
    if out and not (out.suffix == ".parquet" and out.parent.is_dir()):
        return f"--out: got {out}, expected a .parquet file in a folder that exists."
    if out and not find_spec("pandas"):
        return "--out needs pandas and pyarrow. Install them, or leave --out away."
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workbench_kernels.bench", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"all of {', '.join(operations())} where none is named")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.parquet", help="write the rows, with the machine in every one"
    )
    return parser


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _told(*command: str) -> str:
    if not shutil.which(command[0]):
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
