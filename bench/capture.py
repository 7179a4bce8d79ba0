"""Capture against plain forward hooks: time as a ratio, and peak memory against what was asked for.

    python bench/capture.py

Time: the same forwards with hand-written hooks that keep the same values, in turns, medians.
Memory: peak of live tensors made by capture, as PyTorch's dispatcher sees them, over texts of three corpus sizes.
"""

from __future__ import annotations

import torch
from _models import realistic_subject
from _timing import medians, record

from workbench import Site, Subject
from workbench.capture import Capture
from workbench.memory import AllocationMeter
from workbench.tokens import batches, left_pad

ROUNDS = 7
BATCH = 2048


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 120, (count,), generator=generator).tolist()
    return [torch.randint(5, 1200, (length,), generator=generator).tolist() for length in lengths]


def raw_hooks(subject: Subject, ids: list[list[int]], layers: list[int]) -> dict[int, torch.Tensor]:
    """What a careful user writes: batches, one hook per layer, real tokens kept."""
    kept: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    mask: torch.Tensor

    def keep(layer: int):
        return lambda module, args: kept[layer].append(args[0][mask])

    blocks = subject.model.model.layers
    handles = [blocks[layer].mlp.down_proj.register_forward_pre_hook(keep(layer)) for layer in layers]
    with torch.no_grad():
        for rows in batches([len(one) for one in ids], BATCH):
            batch = left_pad(ids, rows, pad=0, device=torch.device("cpu"))
            mask = batch.mask
            subject.model(
                input_ids=batch.ids,
                attention_mask=mask.long(),
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=1,
            )
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(values) for layer, values in kept.items()}


def main() -> None:
    subject, ids = realistic_subject(), texts(120)
    layers = list(range(subject.n_layers))
    sites = [Site(layer, "neurons") for layer in layers]

    def ours() -> Capture:
        return subject.capture(ids, sites, batch=BATCH, progress=False)

    def theirs() -> dict[int, torch.Tensor]:
        return raw_hooks(subject, ids, layers)

    one, other = ours(), theirs()
    for site in sites:  # both must keep the same values, in whatever order
        torch.testing.assert_close(one[site].sum(0), other[site.layer].sum(0), rtol=1e-3, atol=1e-2)
    seconds = medians({"capture": ours, "raw hooks": theirs}, ROUNDS)
    ratio = seconds["capture"] / seconds["raw hooks"]
    print(f"neurons of {len(layers)} blocks, 120 texts: capture {seconds['capture']:.3f} s, "
          f"raw hooks {seconds['raw hooks']:.3f} s, ratio {ratio:.3f} (aim <= 1.1)")  # fmt: skip
    rows: list[dict[str, object]] = [{"what": "time", "ratio": ratio, **seconds}]
    print("\ntexts    asked for     peak           beyond what was asked for")
    for count in (40, 120, 360):
        some = texts(count)
        with AllocationMeter() as meter:
            made = subject.capture(some, sites, batch=BATCH, progress=False)
        asked = sum(value.nbytes for value in made.values.values())
        beyond = meter.peak_bytes - asked
        print(f"{count:<8} {asked / 1e6:8.2f} MB {meter.peak_bytes / 1e6:8.2f} MB  {beyond / 1e6:8.2f} MB")
        rows.append({"what": "memory", "texts": count, "asked_bytes": asked, "peak_bytes": meter.peak_bytes})
    record("capture", rows)


if __name__ == "__main__":
    main()
