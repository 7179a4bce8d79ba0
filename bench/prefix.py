"""A slider step with and without prefix states: 4 prompts under Steer at a layer, as a desk asks at every move.

    python bench/prefix.py

One new token is what a score or a preference reads; twelve are a short text, whose decoding steps run whole either way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._models import realistic_subject
from bench._timing import machine, medians, record
from workbench import Direction, Site, Steer, Subject
from workbench.generation import Generation
from workbench.prefix import PrefixStates

ROUNDS = 5
PROMPTS, TOKENS, NEW = 4, (12, 64, 240), (1, 12)


def step(subject: Subject, steer: Steer, prompts: list[list[int]], new: int, states: PrefixStates | None) -> Generation:
    """One move of the slider."""
    with subject.under(steer):
        if states is None:
            return subject.generate(prompts, max_new_tokens=new)
        with states.resume():
            return subject.generate(prompts, max_new_tokens=new)


def rows_of(subject: Subject, tokens: int) -> list[dict[str, Any]]:
    """Seconds of a step at every layer, whole and resumed in turns, after checking that both say the same."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 1200, (PROMPTS, tokens), generator=generator).tolist()
    direction = Direction(torch.randn(subject.anatomy.d_model, generator=generator))
    states = PrefixStates.read(subject, prompts)
    rows = []
    for layer in range(subject.n_layers):
        steer = Steer(direction, Site(layer, "resid_out"), 4.0)
        for new in NEW:
            whole, resumed = (partial(step, subject, steer, prompts, new, each) for each in (None, states))
            if whole().log_probs != resumed().log_probs:
                raise SystemExit(f"{subject.name}: a resumed step at layer {layer} says something else")
            rivals: dict[str, Callable[[], object]] = {"whole": whole, "resumed": resumed}
            seconds = medians(rivals, ROUNDS)
            what = {"model": subject.name, "tokens": tokens, "layer": layer, "new": new, "state_bytes": states.bytes}
            rows.append(what | seconds | {"ratio": seconds["whole"] / seconds["resumed"]})
    if states.misses:
        raise SystemExit(f"{subject.name}: {states.misses} forwards ran whole that should have been resumed")
    return rows


def main() -> None:
    print(f"{PROMPTS} prompts; median of {ROUNDS} steps in turns; {machine()}\n")
    print("model        tokens  layer  new      whole    resumed   ratio   states")
    rows: list[dict[str, Any]] = []
    for subject in (Subject.organism(), realistic_subject()):
        for tokens in TOKENS:
            rows += rows_of(subject, tokens)
            for row in [each for each in rows if (each["model"], each["tokens"]) == (subject.name, tokens)]:
                print(
                    f"{row['model']:12s} {tokens:6d} {row['layer']:6d} {row['new']:4d} {row['whole'] * 1e3:7.1f} ms "
                    f"{row['resumed'] * 1e3:7.1f} ms {row['ratio']:7.2f} {row['state_bytes'] / 1e6:5.1f} MB",
                    flush=True,
                )
    print(f"\nwritten to {record('prefix', rows)}")


if __name__ == "__main__":
    main()
