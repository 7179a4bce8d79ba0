"""The logit lens: its cost over the floor, one plain forward and L + 1 unembeddings at the read positions, and a loop.

The loop runs the model once per layer and unembeds every position, as wrappers of every block do. They must agree.
Run: python bench/logit_lens.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, timed, version_of
from bench._timing import machine, medians, peak_mb, record
from workbench import Subject
from workbench.corpora import bilingual
from workbench.methods.lens.lens import lens_sites, read_out, states_of
from workbench.probes.latent_language import LatentLanguage
from workbench.unembedding import Unembedding


def loop(subject: Subject, texts: list[str]) -> np.ndarray:
    """Entropy in bits (layer, text) at the last position, by the plain way."""
    unembedding, rows = Unembedding.of(subject), []
    for site in lens_sites(subject.n_layers):
        seen = subject.capture(texts, [site], progress=False)
        logs = unembedding.logits(seen[site]).log_softmax(-1)  # every position of every text
        entropy = -(logs.exp() * logs).sum(-1) / np.log(2)
        ends = [int((seen.text == row).nonzero()[-1]) for row in range(len(texts))]
        rows.append(entropy[ends].cpu().numpy())
    return np.stack(rows)


def floor(subject: Subject, texts: list[str]) -> list[torch.Tensor]:
    """One forward and the unembedding of the last position of every layer: nothing is computed from them."""
    unembedding = Unembedding.of(subject)
    return [unembedding.logits(values) for values in states_of(subject, texts, "last")]


def ours(subject: Subject, texts: list[str]) -> np.ndarray:
    """The same entropies by the lens of the project."""
    unembedding = Unembedding.of(subject)
    return read_out(states_of(subject, texts, "last"), lambda _, values: unembedding.logits(values)).entropy_bits


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    subject = Subject.organism()
    texts = [item.prompt for item in bilingual.word_items()][: 60 if quick else None]

    def check() -> str:
        gap = float(np.abs(ours(subject, texts) - loop(subject, texts)).max())
        assert gap < 1e-4, f"entropies differ from the loop's by {gap:.1e} bits"
        return f"equal entropies to {gap:.0e} bits"

    what = f"logit lens: {len(texts)} prompts, last position of {subject.n_layers + 1} layers of the organism"
    sides = timed(lambda: ours(subject, texts)), timed(lambda: loop(subject, texts))
    yield Match(what, "read_out", "loop over layers, every position", *sides, version_of("torch"), check)


def main() -> None:
    subject = Subject.organism()
    items = [*bilingual.word_items(), *bilingual.fact_items()]
    texts = [item.prompt for item in items]
    before = peak_mb()
    found = ours(subject, texts)
    grown = peak_mb() - before
    gap = float(np.abs(found - loop(subject, texts)).max())
    seconds = medians(
        {
            "plain forward": lambda: subject.capture(texts, lens_sites(0), tokens="last", progress=False),
            "floor: forward and unembeddings": lambda: floor(subject, texts),
            "read-out of the last position": lambda: ours(subject, texts),
            "latent language, 28 words each": lambda: LatentLanguage(n_bootstrap=10).run(subject, items),
            "loop over layers, every position": lambda: loop(subject, texts),
        }
    )
    print(f"{len(texts)} prompts, {subject.n_layers + 1} layers, {subject.anatomy.vocab} tokens; {machine()}\n")
    rows = []
    for name, value in seconds.items():
        ratio = value / seconds["floor: forward and unembeddings"]
        rows.append({"what": name, "seconds": value, "ratio_to_floor": ratio, "prompts": len(texts)})
        print(f"{name:36s} {value:9.3f} s   {ratio:6.2f} x the floor")
    print(
        f"\nequal to the loop: {gap < 1e-4} (largest difference of entropy {gap:.1e} bits); memory: {grown:.0f} MB more"
    )
    print(f"written to {record('logit_lens', rows)}")
    if gap >= 1e-4:
        raise SystemExit("the lens does not say what the loop says")


if __name__ == "__main__":
    main()
