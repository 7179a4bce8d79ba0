"""Steering: push along a direction, remove a direction, or hold neurons at a value.

Steer      x' = x + strength * v                              (activation addition)
ProjectOut x' = x - (x . r) r, r of norm 1                    (directional ablation)
Clamp      x'[unit] = value                                   (a lesion where the value is 0 or the unit's mean)
Source: Turner et al. 2023 (ActAdd); Arditi et al. 2024, section 2.4.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from workbench.directions import Direction
from workbench.site import Site
from workbench.stack import Edit
from workbench.step import Positions, Step, check_positions
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class Steer(Toggle):
    """Add `strength` times a direction at a site.

    direction   a Direction, or any (width,) tensor
    positions   "all", "prompt", "generated", "last" (the prompt's last token and all later ones), or positions
    keep_norm   rescale each token's value to the norm that it had
    """

    direction: Direction | Tensor
    at: Site
    strength: float = 1.0
    positions: Positions | tuple[int, ...] = "all"
    keep_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _as_direction(self.direction))
        object.__setattr__(self, "positions", check_positions(self.positions))

    def install(self, subject: Subject, undo: ExitStack) -> None:
        subject.edit(self.at, self.edit(subject), undo, positions=self.positions)

    def edit(self, subject: Subject) -> Edit:
        """What is done to the value at `at`; ValueError where the direction doesn't fit `subject`."""
        vector = _as_direction(self.direction).for_subject(subject, self.at)
        push = (self.strength * vector).reshape(subject.anatomy.width(self.at))

        def pushed(value: Tensor, step: Step) -> Tensor:
            new = value + push.to(value.device, value.dtype)
            if self.keep_norm and self.strength != 0:  # at strength 0 nothing may change, not even by rounding
                new = new * (_norm(value) / _norm(new).clamp_min(torch.finfo(new.dtype).tiny))
            return new

        return pushed

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        at = Site(subject.n_layers // 2, "resid_out")
        vector = _example_vector(subject)
        rules: tuple[Positions | tuple[int, ...], ...] = ("all", "prompt", "generated", "last", (0, 2))
        return (*(cls(vector, at, 4.0, rule) for rule in rules), cls(vector, at, 4.0, keep_norm=True))

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(_example_vector(subject), Site(0, "resid_out"), strength=0.0, keep_norm=True)

    def __str__(self) -> str:
        where = "" if self.positions == "all" else f", {self.positions}"
        return f"Steer({_called(self.direction)} x {self.strength:g} at {self.at}{where})"


@dataclass(frozen=True)
class ProjectOut(Toggle):
    """Remove the component along a direction at each of the sites `at`.

    fraction   1 removes all of the component, 0 none; by default at all positions
    """

    direction: Direction | Tensor
    at: tuple[Site, ...]
    positions: Positions | tuple[int, ...] = "all"
    fraction: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _as_direction(self.direction))
        object.__setattr__(self, "at", _as_sites(self.at, "ProjectOut"))
        object.__setattr__(self, "positions", check_positions(self.positions))

    @classmethod
    def everywhere(cls, subject: Subject, direction: Direction) -> ProjectOut:
        """Removal from the input of every block and from everything that a block writes."""
        kinds = ("resid_in", "attn_out", "mlp_out")
        return cls(direction, tuple(Site(layer, kind) for layer in range(subject.n_layers) for kind in kinds))

    def install(self, subject: Subject, undo: ExitStack) -> None:
        for site in self.at:
            unit = _as_direction(self.direction).unit().for_subject(subject, site)

            def edit(value: Tensor, step: Step, unit: Tensor = unit) -> Tensor:
                flat = value.reshape(*value.shape[:2], -1)
                along = unit.to(value.device, value.dtype)
                new = flat - self.fraction * (flat @ along)[..., None] * along
                return new.reshape(value.shape)

            subject.edit(site, edit, undo, positions=self.positions)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        vector = _example_vector(subject)
        return cls.everywhere(subject, vector), cls(vector, (Site(0, "mlp_out"),), "last", 0.5)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(_example_vector(subject), (Site(0, "resid_in"),), fraction=0.0)

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f"{self.fraction:g} of "
        return f"ProjectOut({part}{_called(self.direction)} at {_listed(self.at)})"


@dataclass(frozen=True)
class Clamp(Toggle):
    """Hold units (neurons, or any coordinates of a site) at values.

    units    ((site, (index, ...)), ...) or a mapping of site to indices
    to       one value for all units, or one per unit in the order of `units`
    """

    units: tuple[tuple[Site, tuple[int, ...]], ...]
    to: float | tuple[float, ...] = 0.0
    positions: Positions | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        pairs = self.units.items() if isinstance(self.units, Mapping) else self.units
        try:
            units = tuple((site, tuple(operator.index(index) for index in indices)) for site, indices in pairs)
        except (TypeError, ValueError):
            raise ValueError(f"Clamp: got units={self.units!r:.60}, expected {{Site: [numbers of units]}}.") from None
        object.__setattr__(self, "units", units)
        object.__setattr__(self, "positions", check_positions(self.positions))
        count = sum(len(indices) for _, indices in units)
        if isinstance(self.to, Iterable) and not isinstance(self.to, str):
            values = self.to.tolist() if isinstance(self.to, Tensor | np.ndarray) else self.to
            object.__setattr__(self, "to", tuple(values))
            if len(self.to) != count:  # type: ignore[arg-type]
                raise ValueError(
                    f"Clamp: got {len(self.to)} values for {count} units, expected one value or one per unit."
                )  # type: ignore[arg-type]

    @classmethod
    def to_mean(
        cls,
        subject: Subject,
        texts: Sequence[str],
        units: Mapping[Site, Sequence[int]],
        positions: Positions | tuple[int, ...] = "all",
    ) -> Clamp:
        """Clamp each unit to its mean over all tokens of `texts`: a lesion that keeps the average activity."""
        sites = list(units)
        for site in sites:
            _check_units(subject, site, units[site])
        capture = subject.capture(texts, sites)
        means = [capture[site].double().flatten(1).mean(0)[list(units[site])] for site in sites]
        pairs = tuple((site, tuple(units[site])) for site in sites)
        return cls(pairs, tuple(torch.cat(means).tolist()), positions)

    def install(self, subject: Subject, undo: ExitStack) -> None:
        start = 0
        for site, indices in self.units:
            _check_units(subject, site, indices)
            values = self.to[start : start + len(indices)] if isinstance(self.to, tuple) else [self.to] * len(indices)
            start += len(indices)
            if not indices:
                continue
            index = torch.tensor(indices, device=subject.device)
            target = torch.tensor(values, device=subject.device, dtype=torch.float64)

            def edit(value: Tensor, step: Step, index: Tensor = index, target: Tensor = target) -> Tensor:
                flat = value.reshape(*value.shape[:2], -1)
                held = target.to(value.dtype).expand(*flat.shape[:2], -1)
                return flat.index_copy(-1, index, held).reshape(value.shape)

            subject.edit(site, edit, undo, positions=self.positions)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        kinds = ("neurons", "heads") if subject.anatomy.d_mlp else ("heads",)
        sites = tuple(Site(subject.n_layers // 2, kind) for kind in kinds)  # type: ignore[arg-type]
        return tuple(cls(((site, (0, 3, 7)),), (1.0, -1.0, 0.5)) for site in sites)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(((Site(0, "heads"), ()),))

    def __str__(self) -> str:
        count = sum(len(indices) for _, indices in self.units)
        values = f"{self.to:g}" if isinstance(self.to, float | int) else "given values"
        return f"Clamp({count} units at {_listed(tuple(site for site, _ in self.units))} to {values})"


def _example_vector(subject: Subject) -> Direction:
    noise = torch.randn(subject.anatomy.d_model, generator=torch.Generator().manual_seed(0))
    return Direction(noise, name="random")


def _check_units(subject: Subject, site: Site, indices: Sequence[int]) -> None:
    count = torch.Size(subject.anatomy.width(site)).numel()
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise ValueError(f"Clamp: got unit {wrong[0]} at {site}, expected 0 to {count - 1} on {subject.name}.")


def _norm(value: Tensor) -> Tensor:
    return value.flatten(2).norm(dim=-1).reshape(*value.shape[:2], *(1,) * (value.dim() - 2))


def _as_direction(direction: Direction | Tensor) -> Direction:
    return direction if isinstance(direction, Direction) else Direction(direction)


def _called(direction: Direction | Tensor) -> str:
    made = _as_direction(direction)
    return made.name or made.digest


def _as_sites(at: Site | Sequence[Site], name: str) -> tuple[Site, ...]:
    sites = (at,) if isinstance(at, Site) else tuple(at)
    if not sites:
        raise ValueError(f"{name}: got no site, expected at least one.")
    return sites


def _listed(sites: tuple[Site, ...]) -> str:
    return ", ".join(map(str, sites)) if len(sites) <= 3 else f"{len(sites)} sites"
