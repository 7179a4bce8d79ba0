"""One number per unit and prompt: the mean of a unit over a prompt's tokens, or its value at the last one.

x[unit, prompt] = mean over the prompt's own tokens; padding never counts, special tokens only if asked to.
Source: Liu et al., 2025 (arXiv 2502.17355), section 3; that a begin-of-text token stays out of the mean is our choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from workbench.site import Site

if TYPE_CHECKING:
    from workbench.subject import Subject

KINDS = {"neurons": "neurons", "gate": "gate", "up": "up", "down": "mlp_out"}  # part -> kind of site
BYTES_AT_ONCE = 2**27  # of captured values: more layers or texts than this are read one group after another


@dataclass(frozen=True)
class Layout:
    """Which unit is which column: the parts of a layer stand side by side, in this order and of these widths."""

    layers: tuple[int, ...]
    parts: tuple[str, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, subject: Subject, parts: Sequence[str], layers: Sequence[int] | None = None) -> Layout:
        """Raises ValueError for an unknown part, or one that a layer of the model lacks."""
        wrong = [part for part in parts if part not in KINDS]
        if wrong or not parts:
            raise ValueError(f"RelationNeurons: got parts {tuple(parts)}, expected some of {', '.join(KINDS)}.")
        made = cls(tuple(range(subject.n_layers) if layers is None else layers), tuple(parts), ())
        widths = {tuple(subject.anatomy.width(site)[0] for site in made.sites_of(layer)) for layer in made.layers}
        if len(widths) != 1:
            raise ValueError(f"RelationNeurons: the layers have different widths {widths}. Name layers of one width.")
        return cls(made.layers, made.parts, widths.pop())

    @property
    def n_units(self) -> int:
        """Units per layer."""
        return sum(self.widths)

    def sites_of(self, layer: int) -> tuple[Site, ...]:
        return tuple(Site(layer, KINDS[part]) for part in self.parts)  # type: ignore[arg-type]

    def part_of(self, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index of the part, index inside it) of columns."""
        ends = np.cumsum(self.widths)
        part = np.searchsorted(ends, column, side="right")
        return part, column - (ends - self.widths)[part]

    def units_by_site(self, units: np.ndarray) -> dict[Site, tuple[int, ...]]:
        """Units (unit, 2: layer index, column), as what `Clamp` takes. Sites and indices come in order of `units`,
        which must be sorted."""
        found: dict[Site, list[int]] = {}
        part, inside = self.part_of(units[:, 1])
        for layer, p, index in zip(units[:, 0], part, inside, strict=True):
            found.setdefault(self.sites_of(self.layers[layer])[p], []).append(int(index))
        return {site: tuple(indices) for site, indices in found.items()}


def parts_there(subject: Subject, parts: Sequence[str]) -> tuple[str, ...]:
    """Those of `parts` that every layer of the subject has: GPT-2 has no gate, mixtures of experts only `down`."""
    return tuple(part for part in parts if all(KINDS[part] in places for places in subject.anatomy.places))


def layer_responses(
    subject: Subject, texts: Sequence[str], layout: Layout, *, tokens: str = "mean", special: bool = False
) -> Iterator[np.ndarray]:
    """For each layer in turn the responses (unit, prompt) in float32; few layers are in memory at a time.

    tokens    "mean" over the prompt or its "last" token          special   count special tokens in the mean
    """
    if tokens not in ("mean", "last"):
        raise ValueError(f"RelationNeurons: got tokens={tokens!r}, expected mean or last.")
    at_once = max(1, BYTES_AT_ONCE // (4 * layout.n_units * len(texts)))
    for start in range(0, len(layout.layers), at_once):
        sites = [site for layer in layout.layers[start : start + at_once] for site in layout.sites_of(layer)]
        values = _read(subject, texts, sites, tokens, special)  # (prompt, units of these layers)
        for left in range(0, values.shape[1], layout.n_units):
            yield values[:, left : left + layout.n_units].T


def _read(subject: Subject, texts: Sequence[str], sites: list[Site], tokens: str, special: bool) -> np.ndarray:
    if tokens == "last" or special:
        capture = subject.capture(texts, sites, tokens="last" if tokens == "last" else "mean")
        return torch.cat([capture[site].float() for site in sites], dim=1).numpy()
    made = subject.tokenize(texts)
    width = sum(subject.anatomy.width(site)[0] for site in sites)
    step = max(1, BYTES_AT_ONCE // (4 * width * max(made.lengths)))
    rows = []
    for start in range(0, len(texts), step):
        masks = [[not mark for mark in marks] for marks in made.special[start : start + step]]
        capture = subject.capture(texts[start : start + step], sites, tokens=masks, progress=False)
        values = torch.cat([capture[site] for site in sites], dim=1)  # (token, unit)
        count = torch.bincount(capture.text, minlength=len(masks))[:, None]
        total = torch.zeros(len(masks), width, dtype=torch.float64).index_add_(0, capture.text, values.double())
        rows.append((total / count).float())
    return torch.cat(rows).numpy()
