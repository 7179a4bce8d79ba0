"""Tiny random models in which some heads and neurons are known to do nothing: what a good criterion must find.

A neuron is dead where its row of the up projection is zero, or its column of the down projection: nothing hears it,
however loud it is. A head is dead where its columns of the output projection are zero. Source: own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from workbench.pruned.units import rows_of
from workbench.site import Site

if TYPE_CHECKING:
    from workbench.subject import Subject


def living(seed: int = 0) -> Subject:
    """A tiny random model with two key/value heads of two query heads each, and 48 neurons per layer."""
    from workbench.subject import Subject

    return Subject.tiny("llama", seed, verify=False)


def mute(subject: Subject, layer: int, *, heads: Iterable[int] = (), neurons: Iterable[int] = ()) -> None:
    """Let units write nothing, in place: only for models made for this."""
    for kind, units, width in (("heads", heads, subject.anatomy.d_head), ("neurons", neurons, 1)):
        columns = rows_of(subject.anatomy.module(subject.model, Site(layer, kind)))  # type: ignore[arg-type]
        with torch.no_grad():
            for unit in units:
                columns[:, unit * width : (unit + 1) * width] = 0.0


def deafen(subject: Subject, layer: int, neurons: Iterable[int]) -> None:
    """Let neurons read nothing, so that they never fire, in place."""
    with torch.no_grad():
        rows_of(subject.anatomy.module(subject.model, Site(layer, "up")))[list(neurons)] = 0.0


def amplify(subject: Subject, layer: int, neurons: Iterable[int], factor: float = 3.0) -> None:
    """Let neurons fire more strongly, in place."""
    with torch.no_grad():
        for kind in ("gate", "up"):
            rows_of(subject.anatomy.module(subject.model, Site(layer, kind)))[list(neurons)] *= factor  # type: ignore[arg-type]


def half_dead(seed: int = 0) -> Subject:
    """A model of whose heads and neurons every second one in each layer writes nothing: half of their parameters."""
    subject = living(seed)
    for layer in range(subject.n_layers):
        mute(subject, layer, heads=(2, 3), neurons=range(1, subject.anatomy.d_mlp or 0, 2))
    return subject


def random_texts(subject: Subject, seed: int, n_texts: int = 6, length: int = 24) -> list[list[int]]:
    """Random token ids, in texts of unequal lengths."""
    made = torch.Generator().manual_seed(seed)
    return [torch.randint(4, subject.anatomy.vocab, (length + 3 * n,), generator=made).tolist() for n in range(n_texts)]
