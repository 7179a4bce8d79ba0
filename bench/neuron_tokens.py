"""Labelling neurons: streaming top tokens against the loop over neurons, for one layer of GPT-2 small's width.

Simulated rows and vectors; both signs, as the probe asks. The loop runs on a sample of neurons and is scaled, which is
said. Run: python bench/neuron_tokens.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, timed, version_of
from bench._timing import machine, medians, record
from workbench.memory import AllocationMeter
from workbench.unembedding import top_tokens

VOCAB, D_MODEL, N_NEURONS, K, SAMPLE = 50_257, 768, 3072, 10, 32
TOLERANCE = 1e-5  # float32 sums of 768 products of order 1/768; measured 2e-7


def loop(vectors: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The obvious way: for each neuron its product with every row, then the k largest and the k smallest."""
    found = [[(sign * products).topk(k) for sign in (1, -1)] for products in (rows @ vector for vector in vectors)]
    scores, ids = (torch.stack([torch.stack([one[part] for one in signs]) for signs in found], 1) for part in (0, 1))
    return scores, ids  # (sign, n, k)


def drawn(n_neurons: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a vocabulary and vectors of neurons, of norm 1."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(VOCAB, D_MODEL, generator=generator), dim=1)
    return rows, torch.nn.functional.normalize(torch.randn(n_neurons, D_MODEL, generator=generator), dim=1)


def rivals(rows: torch.Tensor, vectors: torch.Tensor) -> dict[str, Callable[[], object]]:
    return {
        "streaming": lambda: top_tokens(vectors, rows, K, negated=True),
        "streaming, one sign": lambda: top_tokens(vectors, rows, K),
        "loop over neurons": lambda: loop(vectors[:SAMPLE], rows, K),
    }


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    rows, vectors = drawn(N_NEURONS // 8 if quick else N_NEURONS)
    ways = rivals(rows, vectors)

    def check() -> str:
        found = float(
            (top_tokens(vectors[:SAMPLE], rows, K, negated=True)[0] - loop(vectors[:SAMPLE], rows, K)[0]).abs().max()
        )
        assert found <= TOLERANCE, f"the streamed scores differ from the loop's by {found:.1e}"
        return f"equal scores to {found:.0e}"

    what = f"neuron read-out: {len(vectors):,} neurons x {VOCAB:,} tokens of {D_MODEL}, {K} largest and smallest"
    peer, theirs = (
        f"loop over neurons ({SAMPLE} of them, scaled)",
        timed(ways["loop over neurons"], len(vectors) / SAMPLE),
    )
    yield Match(what, "top_tokens", peer, timed(ways["streaming"]), theirs, version_of("torch"), check, rounds=3)


def main() -> None:
    rows, vectors = drawn(N_NEURONS)
    few = vectors[:SAMPLE]
    with AllocationMeter() as meter:
        scores, ids = top_tokens(vectors, rows, K, negated=True)
    peak, dense = meter.peak_bytes / 2**20, VOCAB * N_NEURONS * 4 / 2**20
    slow_scores, slow_ids = loop(few, rows, K)
    same = float((ids[:, :SAMPLE] == slow_ids).double().mean())
    gap = float((scores[:, :SAMPLE] - slow_scores).abs().max())
    seconds = medians(rivals(rows, vectors), repeats=3)
    seconds["loop over neurons"] *= N_NEURONS / SAMPLE
    print(f"{N_NEURONS} neurons x {VOCAB} tokens, d_model {D_MODEL}, k {K}; {machine()}")
    print(f"the loop ran on {SAMPLE} neurons and is scaled by {N_NEURONS / SAMPLE:.0f}\n")
    table = []
    for name, value in seconds.items():
        ratio = seconds["loop over neurons"] / value
        table.append({"what": name, "seconds": value, "ratio_to_loop": ratio, "neurons": N_NEURONS, "vocab": VOCAB})
        print(f"{name:24s} {value:9.2f} s   {ratio:6.1f} x the loop   {1e6 * value / N_NEURONS:9.0f} us per neuron")
    print(f"\nsame tokens as the loop: {same:.4%}; largest gap of a score {gap:.1e}")
    print(f"memory beyond the input: {peak:.0f} MB; the full matrix would take {dense:.0f} MB")
    table.append({"what": "memory beyond the input (MB)", "seconds": float("nan"), "peak_mb": peak})
    print(f"written to {record('neuron_tokens', table)}")
    if gap > TOLERANCE:
        raise SystemExit("the streamed scores are not the loop's")


if __name__ == "__main__":
    main()
