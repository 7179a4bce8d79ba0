"""Capture through nnsight: one trace per batch, on NDIF (nnsight's remote service) or simulated here.

The same values as the forward hooks of `capture.py` where no toggle is active; toggles are local and refused by name.
Source: Fiotto-Kaufman et al. 2024, "NNsight and NDIF".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from workbench.capture import Capture, Selection, chosen_tokens, describe_rows
from workbench.site import EXECUTION_ORDER, Site
from workbench.tokens import Batch, Tokens, batches, left_pad

if TYPE_CHECKING:
    from workbench.subject import Subject


def capture_by_trace(
    subject: Subject, tokens: Tokens, at: Sequence[Site], selection: Selection, *, batch: int, remote: bool | str
) -> Capture:
    """What `Subject.capture` gives, read by nnsight traces; `remote` is True (NDIF), "local" (simulated) or False."""
    if subject.active:
        names = ", ".join(map(str, subject.active))
        raise ValueError(
            f"capture: {names} can only act on a local model. Leave the toggles, or load with remote=False."
        )
    wanted = chosen_tokens(tokens, selection)
    mean = isinstance(selection, str) and selection == "mean"
    rows: dict[Site, dict[int, torch.Tensor]] = {site: {} for site in at}
    for group in batches(tokens.lengths, batch):
        one = left_pad(tokens.ids, group, pad=subject.pad_id, device=torch.device("cpu"))
        for site, values in _trace(subject, one, at, remote).items():
            for index, row in enumerate(group):
                text = values[index, -tokens.lengths[row] :]  # (seq, *width), padding cut off
                rows[site][row] = text.float().mean(0, keepdim=True) if mean else text[wanted[row]]
    made = {site: torch.cat([rows[site][row] for row in range(len(tokens))]) for site in at}
    return Capture(made, *describe_rows(tokens, wanted, mean))


def _trace(subject: Subject, batch: Batch, at: Sequence[Site], remote: bool | str) -> dict[Site, torch.Tensor]:
    """Values (batch, seq, *width) at the sites, read in the order in which the forward meets them."""
    anatomy = subject.anatomy
    ordered = sorted(dict.fromkeys(at), key=lambda site: (site.layer, EXECUTION_ORDER.index(site.kind)))
    plan = []  # plain values only: what a traced block mentions travels to the service
    for site in ordered:
        path = ".".join(filter(None, (anatomy.blocks, str(site.layer), anatomy.place(site).path)))
        plan.append((path, anatomy.place(site).side))
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "position_ids": batch.positions}
    if "position_ids" not in subject.accepts:
        del inputs["position_ids"]
    model = subject.nn
    reads = list(dict.fromkeys(plan))  # a fused projection serves two sites and is read once
    with model.trace(**inputs, remote=remote):
        saved = []
        for path, side in reads:
            envoy = model.get(path)
            raw = envoy.input if side == "in" else envoy.output
            saved.append((raw if isinstance(raw, torch.Tensor) else raw[0]).clone())
        saved.save()  # type: ignore[attr-defined]  # nnsight gives every object this method inside a trace
    values = dict(zip(reads, saved, strict=True))
    result = {}
    for site, read in zip(ordered, plan, strict=True):
        columns = anatomy.place(site).columns
        value = values[read].detach().cpu()
        value = value[..., slice(*columns)] if columns else value
        result[site] = value.reshape(*batch.ids.shape, *anatomy.width(site))
    return result
