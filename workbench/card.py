"""The compatibility card: what was proved about a model at load, in about a second.

conservation   resid_in + attn_out + mlp_out == resid_out, and resid_out[i] == resid_in[i + 1]
edits          adding zero everywhere leaves the logits bit-equal; a non-zero edit at each kind changes them
causality      a later token never changes an earlier prediction; cached and uncached predictions agree
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.anatomy import Anatomy, add_tap, has_units
from workbench.site import KINDS, Site

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class Check:
    """One proved fact: a relative difference that is at most `limit`, or that must be `above` it."""

    name: str
    value: float
    limit: float
    above: bool = False

    @property
    def passed(self) -> bool:
        return self.value > self.limit if self.above else self.value <= self.limit

    @property
    def bound(self) -> str:
        return f"{'above' if self.above else 'at most'} {self.limit:g}"


@dataclass
class Card:
    """What is known of a subject: its shape, its places, and the checks it passed. Prints as a page."""

    name: str
    anatomy: Anatomy
    checks: tuple[Check, ...]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.anatomy.summary()}", ""]
        for kind in KINDS:
            layers = [layer for layer, places in enumerate(self.anatomy.places) if kind in places]
            if layers:
                where = "" if len(layers) == self.anatomy.n_layers else f" (layers {_ranges(layers)})"
                lines.append(f"  {kind:<10} {self.anatomy.places[layers[0]][kind]}{where}")
            else:
                lines.append(f"  {kind:<10} none: {self.anatomy.missing[0][kind]}")
        lines.append("")
        if not self.checks:
            lines.append("  not verified (verify=False, or a remote model)")
        for check in self.checks:
            lines.append(f"  {'✓' if check.passed else '✗'} {check.name:<68} {check.value:.1e}, {check.bound}")
        return "\n".join(lines)


def prove(subject: Subject) -> Card:
    """Run all checks on `subject`; ValueError names the site or fact that does not hold."""
    vocab = subject.anatomy.vocab
    ids = (torch.arange(12, device=subject.device).reshape(2, 6) * 11 + 5) % vocab
    with torch.no_grad():
        checks = (
            *_conservation(subject, ids),
            *_edits(subject, ids),
            _causality(subject, ids),
            _cache(subject, ids),
        )
    for check in checks:
        if not check.passed:
            raise ValueError(
                f"load: {subject.name} fails the check that {check.name}: got {check.value:.2e}, expected "
                f"{check.bound}. Probes would read the wrong place. Load with verify=False only to look into it."
            )
    return Card(subject.name, subject.anatomy, checks)


def _limit(subject: Subject) -> float:
    # Relative to the norm of what is compared: one rounding of a sum in float32 is 6e-8, in bfloat16 4e-3.
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(subject.dtype, 5e-2)


def _conservation(subject: Subject, ids: Tensor) -> list[Check]:
    kinds = ("resid_in", "attn_out", "mlp_out", "resid_out")
    values: dict[Site, Tensor] = {}
    with ExitStack() as undo:
        for layer in range(subject.n_layers):
            for kind in kinds:
                _read(subject, Site(layer, kind), values, undo)  # type: ignore[arg-type]
        subject.model(input_ids=ids)
    worst, where = 0.0, Site(0, "resid_out")
    for layer in range(subject.n_layers):
        before, attention, mlp, after = (values[Site(layer, kind)].double() for kind in kinds)  # type: ignore[arg-type]
        error = _distance(before + attention + mlp, after)
        if error > worst:
            worst, where = error, Site(layer, "resid_out")
    chain = max(
        (
            _distance(values[Site(layer, "resid_out")], values[Site(layer + 1, "resid_in")])
            for layer in range(subject.n_layers - 1)
        ),
        default=0.0,
    )
    limit = _limit(subject)
    name = f"resid_in + attn_out + mlp_out == resid_out (worst at {where})"
    return [
        Check(name, worst, limit),
        Check("resid_out of a block == resid_in of the next", chain, 0.0),
    ]


def _edits(subject: Subject, ids: Tensor) -> list[Check]:
    plain = subject.model(input_ids=ids).logits
    every = [Site(layer, kind) for layer, places in enumerate(subject.anatomy.places) for kind in places]  # type: ignore[misc]
    zero = _edited(subject, ids, every, lambda value: value + torch.zeros_like(value))
    difference = float((zero - plain).abs().max())
    checks = [Check("adding zero at every site leaves the logits bit-equal", difference, 0.0)]
    for kind in KINDS:
        layers = [
            layer
            for layer, places in enumerate(subject.anatomy.places)
            if kind in places and has_units(subject.model, subject.anatomy, Site(layer, kind))  # type: ignore[arg-type]
        ]
        if layers:
            site = Site(layers[len(layers) // 2], kind)  # type: ignore[arg-type]
            changed = _edited(subject, ids, [site], lambda value: value * 0.5 + 0.1)
            moved = _distance(changed, plain)
            checks.append(Check(f"an edit at {site} changes the logits", moved, 0.0, above=True))
    return checks


def _causality(subject: Subject, ids: Tensor) -> Check:
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % subject.anatomy.vocab
    one, two = subject.model(input_ids=ids).logits[:, :-1], subject.model(input_ids=other).logits[:, :-1]
    leak = _distance(two, one)
    return Check("a later token does not change an earlier prediction", leak, _limit(subject))


def _cache(subject: Subject, ids: Tensor) -> Check:
    whole = subject.model(input_ids=ids, use_cache=False).logits[:, -1]
    first = subject.model(input_ids=ids[:, :-1], use_cache=True)
    last = subject.model(input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    return Check("cached and uncached predictions agree", _distance(last, whole), _limit(subject))


def _edited(subject: Subject, ids: Tensor, at: list[Site], fn: Callable[[Tensor], Tensor]) -> Tensor:
    with ExitStack() as undo:
        for site in at:
            add_tap(subject.model, subject.anatomy, site, fn, undo)
        return subject.model(input_ids=ids).logits


def _read(subject: Subject, site: Site, values: dict[Site, Tensor], undo: ExitStack) -> None:
    def keep(value: Tensor) -> None:
        values[site] = value.clone()

    add_tap(subject.model, subject.anatomy, site, keep, undo)


def _distance(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def _ranges(layers: list[int]) -> str:
    return (
        f"{layers[0]}-{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else ", ".join(map(str, layers))
    )
