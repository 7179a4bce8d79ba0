"""Bitmap files against dense safetensors: bytes, time to load into a model in memory, speed of unpacking; in one run.

Loads alternate, medians count. "warm": the file lies in the page cache. "cold": the page cache was told to forget it
before each load (posix_fadvise), what a disk keeps itself is not known. "at 0.5 GB/s": computed, not measured, as
bytes / bandwidth + the warm load, with no overlap of the two. Matrices keep their shape: nothing else gets faster.
Run: python bench/bitmap.py [MEGABYTES ...]    (32 and 128 of dense weights by default)
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, Side, version_of
from bench._timing import machine, medians, record, seconds_of
from workbench.memory import AllocationMeter
from workbench.pruned.bitmap import Bitmap, load_into, save_bitmap

SIZES_MB, WIDTH, SHARES, REPEATS = (32, 128), 1024, (0.5, 0.7, 0.9), 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BANDWIDTHS = (0.5, 3.0)  # GB/s: a network disk, a good SSD


def main() -> None:
    torch.set_num_threads(1)  # on a busy machine every copy would wait for the other thread, longer than it takes
    sizes = [int(word) for word in sys.argv[1:]] or list(SIZES_MB)
    print(f"square matrices of {WIDTH}, {torch.get_num_threads()} threads; {machine()}\n")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in sizes:
            for name, dtype in DTYPES.items():
                for share in SHARES:
                    rows += compared(Path(folder), megabytes, name, dtype, share)
    rows += list(unpacking())
    print(f"written to {record('bitmap', rows)}")


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    torch.set_num_threads(1)  # see main
    megabytes = SIZES_MB[0] if quick else SIZES_MB[-1]
    for share in (0.5, 0.9):
        with tempfile.TemporaryDirectory() as folder:
            _, paths, model = stored(Path(folder), megabytes, torch.bfloat16, share)
            what = f"sparse weights as a file: {megabytes} MB of bfloat16, {share:.0%} zeros, loaded into a model"
            sides = loading("bitmap", model, paths), loading("dense", model, paths)
            yield Match(what, "bitmap", "safetensors", *sides, f"{version_of('safetensors')}, 1 thread")


def stored(
    folder: Path, megabytes: int, dtype: torch.dtype, share: float
) -> tuple[dict[str, Tensor], dict[str, Path], nn.Sequential]:
    """Sparse matrices, a file of each kind with them, and a model that takes them."""
    tensors = {f"{i}.weight": sparse(share, dtype, i) for i in range(megabytes * 2**20 // (WIDTH**2 * dtype.itemsize))}
    paths = {"dense": folder / "dense", "bitmap": folder / "bitmap"}
    save_file(tensors, paths["dense"])
    save_bitmap(tensors, paths["bitmap"])
    return tensors, paths, nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in tensors))


def loading(name: str, model: nn.Module, paths: dict[str, Path]) -> Side:
    """A side that is measured in seconds of one load, the file in the page cache, and in the file's size."""
    size = paths[name].stat().st_size / 1e6
    return lambda: {"seconds": seconds_of(lambda: LOADS[name](model, paths[name])), "MB on disk": size}


def compared(folder: Path, megabytes: int, name: str, dtype: torch.dtype, share: float) -> list[dict[str, object]]:
    """One row per kind of file: bytes, and milliseconds to load them into a model that is there."""
    tensors, paths, model = stored(folder, megabytes, dtype, share)
    seconds = {state: alternated(model, paths, LOADS, cold=state == "cold") for state in ("warm", "cold")}
    load_into(model, paths["bitmap"])
    exact = all(torch.equal(layer.weight, tensors[f"{i}.weight"]) for i, layer in enumerate(model))  # type: ignore[arg-type]
    if not exact:
        raise SystemExit("the bitmap file gave other weights back")
    rows: list[dict[str, object]] = []
    for kind, path in paths.items():
        size, warm, cold = path.stat().st_size, seconds["warm"][kind], seconds["cold"][kind]
        computed = {f"at_{rate:g}_gb_s_ms": 1e3 * (size / (rate * 1e9) + warm) for rate in BANDWIDTHS}
        facts: dict[str, object] = {
            "what": kind,
            "dense_mb": megabytes,
            "dtype": name,
            "share_of_zeros": share,
            "bytes": size,
        }
        rows.append(facts | {"warm_ms": 1e3 * warm, "cold_ms": 1e3 * cold} | computed)
    told = {key: rows[1][key] / rows[0][key] for key in rows[0] if key.endswith(("_ms", "bytes"))}  # type: ignore[operator]
    peak = peak_tensors(model, paths["bitmap"], next(iter(tensors.values())).nbytes)
    rows[1]["peak_tensors"] = peak
    print(
        f"{megabytes:5d} MB {name:8s} {share:.0%} zeros   bitmap / dense: "
        + ", ".join(f"{key.removesuffix('_ms')} {value:.3f}" for key, value in told.items())
        + f"   (warm {rows[0]['warm_ms']:.0f} and {rows[1]['warm_ms']:.0f} ms; above the model {peak:.1f} tensors)"
    )
    return rows


def alternated(
    model: nn.Module, paths: dict[str, Path], loads: dict[str, Callable[[nn.Module, Path], None]], *, cold: bool
) -> dict[str, float]:
    """Median seconds of each kind of load, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in loads}
    for turn in range(REPEATS + 1):
        for name, load in loads.items():
            if cold:
                forget(paths[name])
            started = time.perf_counter()
            load(model, paths[name])
            if turn:
                found[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in found.items()}


@torch.no_grad()
def load_dense(model: nn.Module, path: Path) -> None:
    """What `load_into` does, from a dense file."""
    places = model.state_dict(keep_vars=True)
    with safe_open(path, framework="pt") as file:
        for name in places:
            places[name].copy_(file.get_tensor(name))


LOADS: dict[str, Callable[[nn.Module, Path], None]] = {"dense": load_dense, "bitmap": load_into}


def forget(path: Path) -> None:
    """Ask the system to drop a file from its page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_tensors(model: nn.Module, path: Path, one: int) -> float:
    """The most memory that a load takes above the model, in tensors of the model."""
    with AllocationMeter():
        load_into(model, path)  # its first use imports much
    tracemalloc.start()
    with AllocationMeter() as meter:
        load_into(model, path)
    peak = tracemalloc.get_traced_memory()[1] + meter.peak_bytes
    tracemalloc.stop()
    return peak / one


def unpacking() -> Iterator[dict[str, object]]:
    """Gigabytes of dense weights that are unpacked and packed per second, beside a plain copy."""
    for name, dtype in DTYPES.items():
        for share in SHARES:
            tensor = torch.cat([sparse(share, dtype, i) for i in range(8)])
            made = Bitmap.pack(tensor)
            seconds = medians({
                "unpack": made.unpack, "pack": lambda tensor=tensor: Bitmap.pack(tensor), "copy": tensor.clone,
            })  # fmt: skip
            speeds = {key: tensor.nbytes / value / 1e9 for key, value in seconds.items()}
            print(
                f"{name:8s} {share:.0%} zeros   "
                + ", ".join(f"{key} {value:.2f} GB/s" for key, value in speeds.items())
            )
            for key, value in speeds.items():
                yield {"what": key, "dtype": name, "share_of_zeros": share, "gb_per_s": value}


def sparse(share: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(WIDTH, WIDTH, generator=generator) < share
    return torch.randn(WIDTH, WIDTH, generator=generator).masked_fill(gone, 0.0).to(dtype)  # times 0 would leave -0.0


if __name__ == "__main__":
    main()
