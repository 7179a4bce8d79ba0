"""HFTP's null distributions: 4096 neurons x 1000 permutations against the published loop, and the closed form.

The loop takes a spectrum per neuron and permutation; it runs on a sample of neurons and is scaled, which is said.
Run: python bench/hftp.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._timing import machine, medians, peak_mb, record
from workbench.methods.hftp import tagging

N_NEURONS, N_PERMUTATIONS, SAMPLE, S, U = 4096, 1000, 24, 50, 4
BINS = [S, 2 * S]  # sentence and phrase rate in a text of S * U units


def main() -> None:
    rng = np.random.default_rng(0)
    responses = rng.normal(size=(S, U, N_NEURONS)).astype(np.float32)
    series = responses.reshape(S * U, N_NEURONS)
    moves = tagging.time_permutations(S * U, N_PERMUTATIONS, rng)
    before = peak_mb()
    fast = tagging.permutation_null(series, BINS, moves)
    grown = peak_mb() - before
    slow = tagging.permutation_null_reference(series[:, :SAMPLE], BINS, moves)
    gaps = [float(np.abs(a[:SAMPLE] - b).max() / np.abs(b).max()) for a, b in zip(fast, slow, strict=True)]
    seconds = medians(
        {
            "permutation null": lambda: tagging.permutation_null(series, BINS, moves),
            "reference loop": lambda: tagging.permutation_null_reference(series[:, :SAMPLE], BINS, moves),
            "closed form of the paper's threshold": lambda: tagging.time_threshold(series, BINS),
            "closed form of the slot null": lambda: tagging.slot_null(responses, [1, 2]),
        }
    )
    seconds["reference loop"] *= N_NEURONS / SAMPLE
    print(f"{N_NEURONS} neurons x {N_PERMUTATIONS} permutations of {S * U} units, 2 rates; {machine()}")
    print(f"the reference loop ran on {SAMPLE} neurons and is scaled by {N_NEURONS / SAMPLE:.0f}\n")
    rows = []
    for name, value in seconds.items():
        ratio = seconds["reference loop"] / value
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
    equal = max(gaps) < 1e-9
    print(f"\nequal to the loop: {equal} (largest relative gap of magnitude, threshold, p: {max(gaps):.1e})")
    print(f"false-positive rate at .05: {(fast[2] <= 0.05).mean():.3f}    memory beyond the input: {grown:.0f} MB")
    rows.append({"what": "memory beyond the input (MB)", "seconds": float("nan"), "peak_mb": grown})
    print(f"written to {record('hftp', rows)}")
    if not equal:
        raise SystemExit("the fast null is not the loop's null")


if __name__ == "__main__":
    main()
