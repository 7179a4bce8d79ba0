"""Average precision: 2,000 neurons x 1,500 prompts against scikit-learn's, and the 835,584 neurons of a 7B model.

scikit-learn's function takes one neuron and one relation; it runs on a sample of neurons and is scaled, which is said.
Run: python bench/average_precision.py [LAYERS]     LAYERS of the 7B model to stream, 32 by default
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, timed, version_of
from bench._timing import machine, medians, peak_mb, record
from workbench.methods.relations.average_precision import average_precision, two_sided_precision
from workbench.methods.relations.selectivity import Scorer

N_NEURONS, N_PROMPTS, N_RELATIONS, SAMPLE = 2000, 1500, 5, 60
LAYER = 11_008 + 11_008 + 4_096  # gate, up and down of one layer of Llama-2-7B; 32 of them are 835,584 units
RELATIONS_7B, PROMPTS_7B = 12, 125  # 12 x 125 = 1,500 prompts
KINDS = {"no or few ties": lambda scores: scores, "half of the values 0": lambda scores: np.maximum(scores, 0)}
PEER = "scikit-learn, 1 relation"


def drawn(n_neurons: int) -> tuple[np.ndarray, np.ndarray]:
    """Random scores (neuron, prompt), and the relation of every prompt."""
    relation = np.repeat(np.arange(N_RELATIONS), N_PROMPTS // N_RELATIONS)
    return np.random.default_rng(0).normal(size=(n_neurons, N_PROMPTS)).astype(np.float32), relation


def library(scores: np.ndarray, relation: np.ndarray, relations: range) -> np.ndarray:
    """scikit-learn's values (neuron of the sample, relation)."""
    return np.array([[average_precision_score(relation == r, row) for r in relations] for row in scores[:SAMPLE]])


def rivals(scores: np.ndarray, relation: np.ndarray) -> dict[str, Callable[[], object]]:
    binary = (relation > 0).astype(int)
    return {
        PEER: lambda: library(scores, relation, range(1)),
        "ours, 1 relation": lambda: average_precision(scores, binary),
        "ours, all relations": lambda: average_precision(scores, relation),
        "ours, all relations, both signs": lambda: two_sided_precision(scores, relation),
    }


def gap_to_library(scores: np.ndarray, relation: np.ndarray) -> float:
    """The largest difference from scikit-learn on its sample, over all relations."""
    both = average_precision(scores, relation)[:SAMPLE], library(scores, relation, range(N_RELATIONS))
    return float(np.abs(both[0] - both[1]).max())


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    normal, relation = drawn(N_NEURONS // 4 if quick else N_NEURONS)
    for kind, change in KINDS.items():
        scores = change(normal)
        ways, many = rivals(scores, relation), len(scores) / SAMPLE

        def check(scores: np.ndarray = scores) -> str:
            found = gap_to_library(scores, relation)
            assert found <= 1e-12, f"differs from scikit-learn's by {found:.1e}"
            return f"equal to {found:.0e}"

        what = f"average precision: {len(scores):,} neurons, {N_PROMPTS:,} prompts, {kind}"
        peer, version = f"average_precision_score ({SAMPLE} neurons, scaled)", version_of("scikit-learn")
        one, every = timed(ways[PEER], many), timed(ways[PEER], many * N_RELATIONS)
        yield Match(what, "average_precision, 1 relation", peer, timed(ways["ours, 1 relation"]), one, version, check)
        ours = timed(ways["ours, all relations"])
        yield Match(what, f"average_precision, {N_RELATIONS} relations", peer, ours, every, version)


def compared(name: str, scores: np.ndarray, relation: np.ndarray) -> list[dict[str, object]]:
    """Times and the largest difference on one kind of scores, for one relation and for all."""
    seconds = medians(rivals(scores, relation))
    gap = gap_to_library(scores, relation)
    one = seconds.pop(PEER) * len(scores) / SAMPLE
    print(f"\n{name}: largest difference from scikit-learn {gap:.1e}")
    rows: list[dict[str, object]] = [{"what": f"{name}: scikit-learn, 1 relation", "seconds": one, "ratio": 1.0}]
    for what, value in seconds.items():
        ratio = one * (1 if "1 relation" in what else N_RELATIONS) / value
        rows.append({"what": f"{name}: {what}", "seconds": value, "ratio": ratio, "gap": gap})
        print(f"{what:34s} {value:7.3f} s   {ratio:6.0f} x scikit-learn")
    if gap > 1e-12:
        raise SystemExit("this is not scikit-learn's average precision")
    return rows


def streamed(n_layers: int) -> list[dict[str, object]]:
    """All units of a 7B model, layer after layer, from simulated responses that are dropped at once."""
    relation, before = np.repeat(np.arange(RELATIONS_7B), PROMPTS_7B), peak_mb()
    rng = np.random.default_rng(0)
    layers = (rng.standard_normal((PROMPTS_7B * RELATIONS_7B, LAYER), dtype=np.float32).T for _ in range(n_layers))
    started = time.perf_counter()
    scorer = Scorer.of(relation, two_sided=True, negatives_per_positive=None, n_null=20_000, seed=0)
    scores = scorer.score_all(layers)
    seconds, peak = time.perf_counter() - started, peak_mb()
    n_units = n_layers * LAYER
    print(f"\n{n_units:,} units x {len(relation):,} prompts, {RELATIONS_7B} relations, both signs, with p-values:")
    print(f"{seconds:.0f} s with the drawing of the responses, peak {peak:.0f} MB ({before:.0f} MB before)")
    print(f"p <= .05 for {(scores.p <= 0.05).mean():.4f} of units and relations that know nothing")
    return [{"what": f"{n_units} units streamed", "seconds": seconds, "peak_mb": peak, "neurons": n_units}]


def main() -> None:
    print(f"{N_NEURONS} neurons x {N_PROMPTS} prompts, {N_RELATIONS} relations; {machine()}")
    print(f"scikit-learn ran on {SAMPLE} neurons and one relation, and is scaled by {N_NEURONS / SAMPLE:.0f}")
    scores, relation = drawn(N_NEURONS)
    rows = [row for kind, change in KINDS.items() for row in compared(kind, change(scores), relation)]
    rows += streamed(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
    print(f"written to {record('average_precision', rows)}")


if __name__ == "__main__":
    main()
