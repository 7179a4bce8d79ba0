"""Steering against a plain forward, hand-written hooks and nnsight's own edit: the same push, in turns, medians.

    python bench/steering.py

Prefill: 8 prompts of 128 tokens. Decode: 32 greedy tokens after them, through the model's own cached forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._models import realistic_subject
from bench._timing import machine, medians, record
from workbench import Direction, ProjectOut, Site, Steer, Subject

ROUNDS = 9
LAYER = 4
ROWS, TOKENS, NEW = 8, 128, 32


@torch.no_grad()
def forward(subject: Subject, ids: Tensor) -> Tensor:
    return subject.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def decode(subject: Subject, ids: Tensor) -> Tensor:
    output = subject.model(input_ids=ids, use_cache=True, logits_to_keep=1)
    for _ in range(NEW):
        chosen = output.logits[:, -1:].argmax(-1)
        output = subject.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
    return output.logits[:, -1]


def hooked(subject: Subject, vector: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """What a careful user writes: one hook that adds the vector to a block's output."""
    handle = subject.model.model.layers[LAYER].register_forward_hook(lambda module, args, output: output + vector)
    try:
        return run()
    finally:
        handle.remove()


def main() -> None:
    subject = realistic_subject()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1200, (ROWS, TOKENS), generator=generator)
    vector = torch.randn(512, generator=generator)
    steer = Steer(vector, Site(LAYER, "resid_out"))
    nn = subject.nn
    with nn.edit() as (_, edited):
        edited.model.layers[LAYER].output = edited.model.layers[LAYER].output + vector

    def steered(run: Callable[[Subject, Tensor], Tensor]) -> Tensor:
        with subject.under(steer):
            return run(subject, ids)

    def traced() -> Tensor:
        with torch.no_grad(), edited.trace(ids, use_cache=False, logits_to_keep=1):
            logits = edited.output.logits[:, -1].save()
        return logits

    def removed() -> Tensor:
        with subject.under(ProjectOut.everywhere(subject, Direction(vector))):
            return forward(subject, ids)

    rivals: dict[str, Callable[[], Tensor]] = {
        "plain forward": lambda: forward(subject, ids),
        "Steer": lambda: steered(forward),
        "raw hook": lambda: hooked(subject, vector, lambda: forward(subject, ids)),
        "nnsight edit": traced,
        "ProjectOut everywhere": removed,
        "plain decode": lambda: decode(subject, ids),
        "Steer, decode": lambda: steered(decode),
        "raw hook, decode": lambda: hooked(subject, vector, lambda: decode(subject, ids)),
    }
    seconds = medians(rivals, ROUNDS)
    logits = {name: run() for name, run in rivals.items()}
    print(f"{ROWS} rows of {TOKENS} tokens, {NEW} decoded; 8 blocks, d_model 512; {machine()}\n")
    rows = []
    for name, value in seconds.items():
        base = "plain decode" if "decode" in name else "plain forward"
        rows.append({"what": name, "seconds": value, "ratio": value / seconds[base], "against": base})
        print(f"{name:24s} {value:8.4f} s   {value / seconds[base]:6.3f} x {base}")
    gaps = {name: float((logits["Steer"] - logits[name]).abs().max()) for name in ("raw hook", "nnsight edit")}
    gaps["decode"] = float((logits["Steer, decode"] - logits["raw hook, decode"]).abs().max())
    moved = float((logits["Steer"] - logits["plain forward"]).abs().max())
    print(f"\nlargest difference of logits from Steer's: {gaps}; the push itself moves them by {moved:.2f}")
    print(f"written to {record('steering', rows)}")
    if max(gaps.values()) > 1e-4 or moved < 1e-2:
        raise SystemExit("the rivals do not steer alike")


if __name__ == "__main__":
    main()
