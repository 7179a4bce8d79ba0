"""Steering against a plain forward, hand-written hooks and nnsight's own edit: the same push, in turns, medians.

    python bench/steering.py

Prefill: 8 prompts of 128 tokens. Decode: 32 greedy tokens after them, through the model's own cached forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, timed, version_of
from bench._models import realistic_subject
from bench._timing import machine, medians, record
from bench.peers import PeerProcess
from workbench import Direction, ProjectOut, Site, Steer, Subject

ROUNDS = 9
LAYER = 4
ROWS, TOKENS, NEW = 8, 128, 32


def given(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Prompts (row, token), and the vector that every rival adds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1200, (ROWS, TOKENS), generator=generator)
    return ids[:rows], torch.randn(512, generator=generator)


@torch.no_grad()
def forward(model: Any, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)  # repeng asks for a row of them per text
    return model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def decode(model: Any, ids: Tensor) -> Tensor:
    start = ids.shape[1]
    positions = torch.arange(start + NEW).expand(len(ids), -1)
    output = model(input_ids=ids, position_ids=positions[:, :start], use_cache=True, logits_to_keep=1)
    for place in range(start, start + NEW):
        chosen, held = output.logits[:, -1:].argmax(-1), output.past_key_values
        here = positions[:, place : place + 1]
        output = model(input_ids=chosen, position_ids=here, past_key_values=held, use_cache=True)
    return output.logits[:, -1]


WORK: dict[str, Callable[[Any, Tensor], Tensor]] = {"forward": forward, "decode": decode}


def hooked(subject: Subject, vector: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """What a careful user writes: one hook that adds the vector to a block's output."""
    handle = subject.model.model.layers[LAYER].register_forward_hook(lambda module, args, output: output + vector)
    try:
        return run()
    finally:
        handle.remove()


def rivals(subject: Subject, ids: Tensor, vector: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The same push by every way that needs no environment of its own, and the forwards without one."""
    steer = Steer(vector, Site(LAYER, "resid_out"))
    nn = subject.nn
    with nn.edit() as (_, edited):
        edited.model.layers[LAYER].output = edited.model.layers[LAYER].output + vector

    def steered(work: str) -> Tensor:
        with subject.under(steer):
            return WORK[work](subject.model, ids)

    def traced() -> Tensor:
        with torch.no_grad(), edited.trace(ids, use_cache=False, logits_to_keep=1):
            logits = edited.output.logits[:, -1].save()
        return logits

    def removed() -> Tensor:
        with subject.under(ProjectOut.everywhere(subject, Direction(vector))):
            return forward(subject.model, ids)

    return {
        "plain forward": lambda: forward(subject.model, ids),
        "Steer": lambda: steered("forward"),
        "raw hook": lambda: hooked(subject, vector, lambda: forward(subject.model, ids)),
        "nnsight edit": traced,
        "ProjectOut everywhere": removed,
        "plain decode": lambda: decode(subject.model, ids),
        "Steer, decode": lambda: steered("decode"),
        "raw hook, decode": lambda: hooked(subject, vector, lambda: decode(subject.model, ids)),
    }


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    subject, (ids, vector) = realistic_subject(), given(2 if quick else ROWS)
    ways = rivals(subject, ids, vector)
    texts = f"steering one of 8 blocks: {len(ids)} rows of {TOKENS} tokens"

    def agree(own: str, other: Callable[[], Any]) -> str:
        gap = float((ways[own]() - torch.as_tensor(other())).abs().max())
        assert gap < 1e-4, f"logits differ by {gap:.1e}"
        return f"equal logits to {gap:.0e}"

    for work, own, others in (
        ("forward", "Steer", ("plain forward", "raw hook", "nnsight edit")),
        ("decode", "Steer, decode", ("plain decode", "raw hook, decode")),
    ):
        what, rounds = texts + (f", {NEW} decoded" if work == "decode" else ""), 2 if quick else 5
        mine = timed(ways[own])
        for name in others:
            check = None if name.startswith("plain") else partial(agree, own, ways[name])
            version = version_of("nnsight" if "nnsight" in name else "torch")
            peer = name.removesuffix(", decode")
            yield Match(what, "Steer", peer, mine, timed(ways[name]), version, check, rounds)
        for name in ("repeng", "steering-vectors"):
            with PeerProcess(name) as peer:
                asked = {"work": work, "rows": len(ids)}
                check = partial(agree, own, partial(peer.ask, "logits", **asked))
                yield Match(what, "Steer", name, mine, peer.side("steered", **asked), peer.version, check, rounds)


def main() -> None:
    subject, (ids, vector) = realistic_subject(), given()
    ways = rivals(subject, ids, vector)
    seconds = medians(ways, ROUNDS)
    logits = {name: run() for name, run in ways.items()}
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
