"""What it costs to ask before steering: prefill and time per token under each controller, against a constant push.

Rivals run alternately in one process on the organism; "plain" is the model without a toggle. A condition that is read
in passing costs a dot product; a controller that reads late layers, a second prefill, and nothing per token after it.
Run: python bench/controllers.py
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._timing import machine, medians, record
from workbench.corpora import requests, stories
from workbench.directions import Direction
from workbench.methods.steering.controller import Controller
from workbench.site import Site, sites
from workbench.subject import Subject
from workbench.toggle import Toggle
from workbench.toggles.conditional import Condition, ConditionalSteer
from workbench.toggles.steer import Steer
from workbench.toggles.weighted import WeightedSteer

NEW_TOKENS, ROWS, REPEATS = 48, 8, 15


def rivals(subject: Subject) -> dict[str, Toggle | None]:
    """A push that reaches every row, so that all do the same work after deciding; too small to end an answer early."""
    noise = Direction(torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(0)))
    middle, late = Site(subject.n_layers // 2, "resid_out"), Site(subject.n_layers - 1, "resid_out")
    push, blocks = Steer(noise, middle, 1e-3), tuple(sites(range(subject.n_layers), "resid_out"))
    early = Condition(noise, Site(1, "resid_out"), -2.0)
    everywhere = Steer(noise, blocks[0], 1e-3)
    for site in blocks[1:]:
        everywhere = everywhere | Steer(noise, site, 1e-3)
    network = Controller.random((middle, late), blocks, 2 * subject.anatomy.d_model)
    return {
        "plain": None,
        "Steer, one block": push,
        "ConditionalSteer, read in passing": ConditionalSteer(push, early),
        "ConditionalSteer, read late": ConditionalSteer(push, Condition(noise, late, -2.0)),
        "Steer, every block": everywhere,
        "WeightedSteer, every block": WeightedSteer(noise, network, 1e-3, threshold=None),
    }


def main() -> None:
    subject = Subject.organism()
    texts = [item.prompt for item in stories.items("held_out")][: ROWS - 1]
    prompts = [*texts, requests.prompt("sell", "lamp")]
    ids = [row[:64] for row in subject.tokenize(prompts).ids]

    def work(toggle: Toggle | None, n_tokens: int) -> None:
        with subject.under(toggle) if toggle else nullcontext():
            subject.generate(ids, max_new_tokens=n_tokens)

    subject._end_ids = lambda: []  # type: ignore[method-assign]  # every run makes as many tokens
    seconds = {}
    for name, n_tokens in (("prefill", 1), ("generation", NEW_TOKENS)):
        runs = {key: partial(work, toggle, n_tokens) for key, toggle in rivals(subject).items()}
        seconds[name] = medians(runs, REPEATS)
    print(f"organism, {ROWS} prompts, {NEW_TOKENS} new tokens each; {machine()}\n")
    print(f"{'':36s}{'prefill ms':>12s}{'x plain':>9s}{'ms per token':>14s}{'x plain':>9s}{'beyond Steer':>14s}")
    rows: list[dict[str, object]] = []
    per_token = {
        key: (seconds["generation"][key] - seconds["prefill"][key]) / (NEW_TOKENS - 1) for key in seconds["prefill"]
    }
    for key, prefill in seconds["prefill"].items():
        steer = "Steer, every block" if key.startswith("Weighted") else "Steer, one block"
        row = {
            "what": key,
            "prefill_ms": 1e3 * prefill,
            "prefill_ratio": prefill / seconds["prefill"]["plain"],
            "ms_per_token": 1e3 * per_token[key],
            "token_ratio": per_token[key] / per_token["plain"],
            "overhead_us_per_token": 1e6 * (per_token[key] - per_token[steer]),
        }
        rows.append(row)
        print(
            f"{key:36s}{row['prefill_ms']:12.2f}{row['prefill_ratio']:9.2f}{row['ms_per_token']:14.3f}"
            f"{row['token_ratio']:9.2f}{row['overhead_us_per_token']:11.0f} us"
        )
    print(f"\na token is one forward of {ROWS} rows; written to {record('controllers', rows)}")


if __name__ == "__main__":
    main()
