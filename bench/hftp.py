"""HFTP's null distributions: 4096 neurons x 1000 permutations against the published loop, and the closed form.

The loop takes a spectrum per neuron and permutation; it runs on a sample of neurons and is scaled, which is said.
Run: python bench/hftp.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, timed, version_of
from bench._timing import machine, medians, peak_mb, record
from workbench.methods.hftp import tagging

N_NEURONS, N_PERMUTATIONS, SAMPLE, S, U = 4096, 1000, 24, 50, 4
BINS = [S, 2 * S]  # sentence and phrase rate in a text of S * U units
LOOP = "reference loop"


def rivals(n_neurons: int) -> dict[str, Callable[[], object]]:
    """The ways to a null of the same random responses; the loop takes a sample of the neurons."""
    rng = np.random.default_rng(0)
    responses = rng.normal(size=(S, U, n_neurons)).astype(np.float32)
    series = responses.reshape(S * U, n_neurons)
    moves = tagging.time_permutations(S * U, N_PERMUTATIONS, rng)
    return {
        "permutation null": lambda: tagging.permutation_null(series, BINS, moves),
        LOOP: lambda: tagging.permutation_null_reference(series[:, :SAMPLE], BINS, moves),
        "closed form of the paper's threshold": lambda: tagging.time_threshold(series, BINS),
        "closed form of the slot null": lambda: tagging.slot_null(responses, [1, 2]),
    }


def gap(fast: Any, slow: Any) -> float:
    """The largest difference of magnitudes, thresholds and p from the loop's sample, relative to the largest value."""
    return max(float(np.abs(a[:SAMPLE] - b).max() / np.abs(b).max()) for a, b in zip(fast, slow, strict=True))


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    n_neurons = N_NEURONS // 8 if quick else N_NEURONS
    ways = rivals(n_neurons)
    loop = timed(ways[LOOP], n_neurons / SAMPLE)

    def check() -> str:
        found = gap(ways["permutation null"](), ways[LOOP]())
        assert found < 1e-9, f"the fast null differs from the loop's by {found:.1e}"
        return f"equal to {found:.0e} of the largest value"

    what = f"HFTP: null of {n_neurons:,} neurons, {N_PERMUTATIONS:,} permutations of {S * U} units, 2 rates"
    peer = f"loop over neurons ({SAMPLE} of them, scaled)"
    version = version_of("numpy")
    yield Match(what, "permutation_null", peer, timed(ways["permutation null"]), loop, version, check)
    closed = timed(ways["closed form of the paper's threshold"])
    yield Match(what, "time_threshold, closed form", peer, closed, loop, version)


def main() -> None:
    ways = rivals(N_NEURONS)
    before = peak_mb()
    fast: Any = ways["permutation null"]()
    grown = peak_mb() - before
    found = gap(fast, ways[LOOP]())
    seconds = medians(ways)
    seconds[LOOP] *= N_NEURONS / SAMPLE
    print(f"{N_NEURONS} neurons x {N_PERMUTATIONS} permutations of {S * U} units, 2 rates; {machine()}")
    print(f"the reference loop ran on {SAMPLE} neurons and is scaled by {N_NEURONS / SAMPLE:.0f}\n")
    rows = []
    for name, value in seconds.items():
        ratio = seconds[LOOP] / value
        rows.append(
            {
                "what": name,
                "seconds": value,
                "ratio_to_loop": ratio,
                "neurons": N_NEURONS,
                "permutations": N_PERMUTATIONS,
            }
        )
        print(f"{name:38s} {value:9.3f} s   {ratio:9.0f} x the loop")
    equal = found < 1e-9
    print(f"\nequal to the loop: {equal} (largest relative gap of magnitude, threshold, p: {found:.1e})")
    print(f"false-positive rate at .05: {(fast[2] <= 0.05).mean():.3f}    memory beyond the input: {grown:.0f} MB")
    rows.append({"what": "memory beyond the input (MB)", "seconds": float("nan"), "peak_mb": grown})
    print(f"written to {record('hftp', rows)}")
    if not equal:
        raise SystemExit("the fast null is not the loop's null")


if __name__ == "__main__":
    main()
