"""How time and memory grow with width, layers, context, prompts, neurons and runs: curves, with the exponent of each.

    python bench/scaling.py              written to bench/results/scaling.parquet, drawn in .bench/scaling.html
    python bench/scaling.py --quick      three small sizes each, written beside the peers: that everything runs

seconds ~ size^b: b is the slope of log seconds over log sizes by least squares, with its 95 % interval from the
residuals (Student's t). Small sizes are bent by what a call costs at least, which the interval then shows. Sizes take
turns within a curve; medians count. Memory: the peak of tensors and of what Python and numpy allocate, in a run of its
own, as that slows the run down.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from scipy.stats import linregress, t
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import average_precision, hftp, sweep
from bench._match import short
from bench._timing import ROOT, machine, medians, record
from bench.peers import FOLDER
from workbench import Site, Subject, plots
from workbench.memory import AllocationMeter

ROUNDS = 3


@dataclass(frozen=True)
class Curve:
    """One thing that grows: `make(size)` prepares the work of that size and returns what is run."""

    what: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], object]]


def main(quick: bool) -> None:
    print(machine(), "\n")
    rows: list[dict[str, object]] = []
    for curve in CURVES:
        grown = measured(curve, curve.sizes[:3] if quick else curve.sizes, 1 if quick else ROUNDS)
        rows += grown
        print(told(pd.DataFrame(grown)), flush=True)
    table = pd.DataFrame(rows)
    FOLDER.mkdir(exist_ok=True)
    drawn = FOLDER / "scaling.html"
    figures = "\n".join(plots.html_div(figure_of(table, measure)) for measure in ("seconds", "peak_mb"))
    drawn.write_text(f"<!doctype html><meta charset='utf-8'><title>Scaling</title>{plots.plotly_js()}{figures}")
    if quick:
        table.to_parquet(FOLDER / "quick_scaling.parquet", index=False)
    else:
        record("scaling", rows)
    print(f"\ndrawn in {drawn.relative_to(ROOT)}")


def measured(curve: Curve, sizes: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """A row per size: seconds and peak memory, and the exponents of the whole curve with their intervals."""
    runs = {str(size): curve.make(size) for size in sizes}
    seconds = list(medians(runs, rounds).values())
    peaks = [peak_mb_of(run) for run in runs.values()]
    facts: dict[str, object] = {"what": curve.what, "axis": curve.axis}
    for name, values in (("seconds", seconds), ("peak_mb", peaks)):
        slope, low, high = exponent(sizes, values)
        facts |= {f"{name}_exponent": slope, f"{name}_low": low, f"{name}_high": high}
    both = zip(sizes, seconds, peaks, strict=True)
    return [facts | {"size": size, "seconds": spent, "peak_mb": peak} for size, spent, peak in both]


def exponent(sizes: tuple[int, ...], values: list[float]) -> tuple[float, float, float]:
    """(b, low, high) of values ~ sizes^b. Raises ValueError for fewer than 3 sizes, or what has no logarithm."""
    if len(sizes) < 3 or min(*sizes, *values) <= 0:
        raise ValueError(f"exponent: got sizes {sizes} and values {values}; at least 3 of each are needed, all above 0")
    fit: Any = linregress(np.log(np.array(sizes, dtype=np.float64)), np.log(np.array(values, dtype=np.float64)))
    reach = float(t.ppf(0.975, len(sizes) - 2)) * fit.stderr
    return float(fit.slope), float(fit.slope - reach), float(fit.slope + reach)


def peak_mb_of(run: Callable[[], object]) -> float:
    """The peak of live tensors plus that of Python's and numpy's memory: at most what both held at one moment."""
    tracemalloc.start()
    with AllocationMeter() as meter:
        run()
    peak = tracemalloc.get_traced_memory()[1] + meter.peak_bytes
    tracemalloc.stop()
    return peak / 1e6


def told(grown: pd.DataFrame) -> str:
    """One curve in a line."""
    first, last = grown.iloc[0], grown.iloc[-1]
    powers = [
        f"{name} n^{first[f'{key}_exponent']:.2f} ({first[f'{key}_low']:.2f} to {first[f'{key}_high']:.2f})"
        for name, key in (("time", "seconds"), ("memory", "peak_mb"))
    ]
    span = f"{first['size']:,} to {last['size']:,} {first['axis']}"
    ends = f"{short(first['seconds'])} to {short(last['seconds'])} s"
    return f"{first['what']:<42} {span:<26} {ends:<20} {powers[0]:<30} {powers[1]}"


def figure_of(table: pd.DataFrame, measure: str) -> go.Figure:
    """All curves as multiples of their smallest size, on logarithmic axes: an exponent is a slope."""
    rows = []
    for what, grown in table.groupby("what", sort=False):
        first = grown.iloc[0]
        slope, low, high = (f"{first[f'{measure}_{part}']:.2f}" for part in ("exponent", "low", "high"))
        scaled = {"size": grown["size"] / first["size"], "cost": grown[measure] / first[measure]}
        rows.append(pd.DataFrame({"curve": f"{what}: {slope} ({low} to {high})"} | scaled))
    powers = table.groupby("what", sort=False)[f"{measure}_exponent"].first()
    word = {"seconds": "Time", "peak_mb": "Memory"}[measure]
    most, least = powers.idxmax(), powers.idxmin()
    return plots.lines(
        pd.concat(rows),
        "size",
        "cost",
        "curve",
        title=f"{word} grows most with {most}, to the power {powers.max():.2f}, least with {least}, {powers.min():.2f}",
        x_title="size, in multiples of the smallest",
        y_title=f"{word.lower()}, in multiples of the first",
        log_x=True,
        log_y=True,
    )


def random_llama(d_model: int = 128, n_layers: int = 4, context: int = 1024) -> Subject:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=d_model,
        intermediate_size=d_model * 11 // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        max_position_embeddings=context,
    )
    torch.manual_seed(0)
    return Subject(LlamaForCausalLM(config).eval(), Subject.tiny().tokenizer, name="random llama", verify=False)


def captured(subject: Subject, n_texts: int, tokens: int) -> Callable[[], object]:
    ids = torch.randint(5, 1000, (n_texts, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    sites = [Site(layer, "neurons") for layer in range(subject.n_layers)]
    return lambda: subject.capture(ids, sites, progress=False)


def precision(n_neurons: int, n_prompts: int) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(n_neurons, n_prompts)).astype(np.float32)
    relation = np.arange(n_prompts) % 5
    return lambda: average_precision.average_precision(scores, relation)


CURVES = (
    Curve("width (capture)", "d_model", (64, 128, 256, 512, 1024), lambda n: captured(random_llama(n), 8, 64)),
    Curve("layers (capture)", "layers", (2, 4, 8, 16, 32), lambda n: captured(random_llama(n_layers=n), 8, 64)),
    Curve("context (capture)", "tokens", (64, 128, 256, 512, 1024), lambda n: captured(random_llama(), 4, n)),
    Curve("texts (capture)", "texts", (16, 32, 64, 128, 256), lambda n: captured(random_llama(), n, 64)),
    Curve("prompts (average precision)", "prompts", (250, 500, 1000, 2000, 4000), lambda n: precision(2000, n)),
    Curve("neurons (average precision)", "neurons", (500, 1000, 2000, 4000, 8000), lambda n: precision(n, 1000)),
    Curve(
        "neurons (HFTP's null)",
        "neurons",
        (512, 1024, 2048, 4096, 8192),
        lambda n: hftp.rivals(n)["permutation null"],
    ),
    Curve("runs (planning a sweep)", "runs", (100, 300, 1000, 3000, 10_000), lambda n: lambda: sweep.planned(n)),
)

if __name__ == "__main__":
    main("--quick" in sys.argv)
