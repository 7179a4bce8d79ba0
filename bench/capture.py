"""Capture against plain forward hooks: time as a ratio, and peak memory against what was asked for.

    python bench/capture.py

Time: the same forwards with hand-written hooks that keep the same values, in turns, medians.
Memory: peak of live tensors made by capture, as PyTorch's dispatcher sees them, over texts of three corpus sizes.
In the table also nnsight's trace and TransformerLens' run_with_cache, over the same batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, Side, timed, version_of
from bench._models import realistic_subject
from bench._timing import medians, record
from bench.peers import PeerProcess
from workbench import Site, Subject
from workbench.capture import Capture
from workbench.memory import AllocationMeter
from workbench.tokens import Batch, batches, left_pad

ROUNDS = 7
BATCH = 2048
N_TEXTS, FEW = 120, 8
Kept = dict[int, Tensor]  # layer -> (token, d_mlp)


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 120, (count,), generator=generator).tolist()
    return [torch.randint(5, 1200, (length,), generator=generator).tolist() for length in lengths]


def padded(ids: list[list[int]]) -> Iterator[Batch]:
    """The batches that every rival reads."""
    for rows in batches([len(one) for one in ids], BATCH):
        yield left_pad(ids, rows, pad=0, device=torch.device("cpu"))


def ours(subject: Subject, ids: list[list[int]]) -> Capture:
    sites = [Site(layer, "neurons") for layer in range(subject.n_layers)]
    return subject.capture(ids, sites, batch=BATCH, progress=False)


def raw_hooks(subject: Subject, ids: list[list[int]]) -> Kept:
    """What a careful user writes: batches, one hook per layer, real tokens kept."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in range(subject.n_layers)}
    mask: Tensor

    def keep(layer: int):
        return lambda module, args: kept[layer].append(args[0][mask])

    blocks = subject.model.model.layers
    handles = [blocks[layer].mlp.down_proj.register_forward_pre_hook(keep(layer)) for layer in kept]
    with torch.no_grad():
        for batch in padded(ids):
            mask = batch.mask
            subject.model(**inputs(batch))
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(values) for layer, values in kept.items()}


def inputs(batch: Batch) -> dict[str, object]:
    """What every rival gives the model: no cache, and logits of one position, which nobody reads."""
    ids, mask = {"input_ids": batch.ids, "attention_mask": batch.mask.long()}, {"position_ids": batch.positions}
    return {**ids, **mask, "use_cache": False, "logits_to_keep": 1}


def nnsight_trace(subject: Subject, ids: list[list[int]]) -> Kept:
    """What nnsight's reader writes: one trace per batch, the inputs of the down projections saved."""
    nn, kept = subject.nn, {layer: [] for layer in range(subject.n_layers)}
    for batch in padded(ids):
        given = inputs(batch)
        with torch.no_grad(), nn.trace(given.pop("input_ids"), **given):
            saved = []
            for block in nn.model.layers:  # a comprehension is a scope of its own, which a traced block loses
                saved.append(block.mlp.down_proj.input)
            saved.save()  # type: ignore[attr-defined]  # nnsight gives every object this method inside a trace
        for layer, values in enumerate(saved):
            kept[layer].append(values[batch.mask])
    return {layer: torch.cat(values) for layer, values in kept.items()}


def sums(kept: Kept) -> list[float]:
    """The sum of each layer's sizes: equal for the same values in whatever order."""
    return [float(values.double().abs().sum()) for values in kept.values()]


def same(one: list[float], other: list[float]) -> str:
    """How exactly two captures agree; raises where they kept other values."""
    gap = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
    assert gap < 1e-5, f"a layer's values differ by {gap:.0e} of their sum"  # one token of 4,000 would be 2e-4
    return f"sums of a layer's values agree to {gap:.0e}"


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table."""
    subject, ids = realistic_subject(), texts(FEW if quick else N_TEXTS // 2)
    what = f"keep the neurons of {subject.n_layers} blocks over {len(ids)} texts"
    own = sums(dict(enumerate(ours(subject, ids).values.values())))
    here: dict[str, Callable[[Subject, list[list[int]]], Kept]]
    here = {"forward hooks by hand": raw_hooks, "nnsight trace": nnsight_trace}
    mine = timed(lambda: ours(subject, ids))
    for peer, run in here.items():
        version = version_of("nnsight" if "nnsight" in peer else "torch")
        theirs = timed(lambda run=run: run(subject, ids))
        check = lambda run=run: same(own, sums(run(subject, ids)))  # noqa: E731
        yield Match(what, "subject.capture", peer, mine, theirs, version, check)
    with PeerProcess("TransformerLens") as lens:
        theirs, check = lens.side("capture", count=len(ids)), lambda: same(own, lens.ask("sums", count=len(ids)))
        yield Match(what, "subject.capture", "TransformerLens run_with_cache", mine, theirs, lens.version, check)
    memory = (peak_of(lambda: ours(subject, ids)), peak_of(lambda: raw_hooks(subject, ids)))
    yield Match(what, "subject.capture", "forward hooks by hand", *memory, version_of("torch"), rounds=1, warm=False)


def peak_of(run: Callable[[], object]) -> Side:
    """A side that is measured in bytes of tensors."""

    def measured() -> dict[str, float]:
        with AllocationMeter() as meter:
            run()
        return {"peak MB": meter.peak_bytes / 1e6}

    return measured


def main() -> None:
    subject, ids = realistic_subject(), texts(N_TEXTS)
    one, other = ours(subject, ids), raw_hooks(subject, ids)
    for site, values in one.values.items():  # both must keep the same values, in whatever order
        torch.testing.assert_close(values.sum(0), other[site.layer].sum(0), rtol=1e-3, atol=1e-2)
    rivals = {"capture": lambda: ours(subject, ids), "raw hooks": lambda: raw_hooks(subject, ids)}
    seconds = medians(rivals, ROUNDS)
    ratio = seconds["capture"] / seconds["raw hooks"]
    print(f"neurons of {subject.n_layers} blocks, {N_TEXTS} texts: capture {seconds['capture']:.3f} s, "
          f"raw hooks {seconds['raw hooks']:.3f} s, ratio {ratio:.3f} (aim <= 1.1)")  # fmt: skip
    rows: list[dict[str, object]] = [{"what": "time", "ratio": ratio, **seconds}]
    print("\ntexts    asked for     peak           beyond what was asked for")
    for count in (40, 120, 360):
        some = texts(count)
        with AllocationMeter() as meter:
            made = ours(subject, some)
        asked = sum(value.nbytes for value in made.values.values())
        beyond = meter.peak_bytes - asked
        print(f"{count:<8} {asked / 1e6:8.2f} MB {meter.peak_bytes / 1e6:8.2f} MB  {beyond / 1e6:8.2f} MB")
        rows.append({"what": "memory", "texts": count, "asked_bytes": asked, "peak_bytes": meter.peak_bytes})
    record("capture", rows)


if __name__ == "__main__":
    main()
