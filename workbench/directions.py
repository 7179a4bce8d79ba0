"""Where steering directions come from. A direction is a value: a vector with its site and the model it belongs to.

Difference in means: d = mean(values on one group of texts) - mean(values on another), at one site and token.
Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from workbench.site import Site

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """A vector at a site: adding it there pushes the model one way.

    vector    (width,) float32, not normalised unless made so
    site      where it was found and belongs; None for a bare vector
    model     fingerprint of the subject it was found on; it is refused on another. None for a bare vector
    name      what it stands for
    """

    vector: Tensor
    site: Site | None = None
    model: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        vector = torch.as_tensor(self.vector).detach().float().cpu()
        if vector.dim() != 1 or not len(vector):
            raise ValueError(f"Direction: got a tensor of shape {tuple(vector.shape)}, expected one vector (width,).")
        if not torch.isfinite(vector).all():
            raise ValueError("Direction: the vector holds NaN or infinity, expected finite numbers.")
        object.__setattr__(self, "vector", vector.clone())

    @property
    def norm(self) -> float:
        return float(self.vector.norm())

    def unit(self) -> Direction:
        """The same direction with norm 1."""
        if self.norm == 0:
            raise ValueError(f"{self}: the zero vector has no direction.")
        return Direction(self.vector / self.norm, self.site, self.model, self.name)

    def for_subject(self, subject: Subject, site: Site) -> Tensor:
        """The vector, checked to fit `site` of `subject`: same model and width."""
        width = subject.anatomy.width(site)
        expected = width[0] if len(width) == 1 else width[0] * width[1]
        if len(self.vector) != expected:
            raise ValueError(
                f"{self}: direction has {len(self.vector)} dims, {site} of {subject.name} has {expected}. "
                "Was it made on another model?"
            )
        if self.model is not None and self.model != subject.fingerprint:
            raise ValueError(
                f"{self}: was found on model {self.model}, but {subject.name} is {subject.fingerprint}. "
                "Find it again on this model; Direction(vector) without a model is taken anywhere."
            )
        return self.vector.to(subject.device)

    def __add__(self, other: Direction) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        if (self.site, self.model) != (other.site, other.model) or len(self.vector) != len(other.vector):
            raise ValueError(f"Direction: {self} and {other} belong to different places or models; they don't add.")
        return Direction(self.vector + other.vector, self.site, self.model, f"{self.name} + {other.name}".strip(" +"))

    def __mul__(self, factor: float) -> Direction:
        return Direction(self.vector * factor, self.site, self.model, f"{factor:g} {self.name}".strip())

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return self * -1.0

    def __sub__(self, other: Direction) -> Direction:
        return self + -other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Direction):
            return NotImplemented
        same = (self.site, self.model, self.name) == (other.site, other.model, other.name)
        return same and torch.equal(self.vector, other.vector)

    def __hash__(self) -> int:
        return hash((self.site, self.model, self.name, self.digest))

    @property
    def digest(self) -> str:
        """12 hex digits of the vector's bytes."""
        return hashlib.sha256(self.vector.numpy().tobytes()).hexdigest()[:12]

    def __repr__(self) -> str:
        where = f" at {self.site}" if self.site else ""
        return f"Direction({self.name or self.digest}{where}, norm {self.norm:.3g})"


def difference_in_means(
    subject: Subject,
    towards: Sequence[str],
    away: Sequence[str],
    site: Site,
    *,
    tokens: Literal["last", "mean"] = "last",
    name: str = "difference in means",
) -> Direction:
    """Mean value at `site` on the texts `towards` minus that on `away`, at the last token or the mean over tokens."""
    means = [subject.capture(texts, [site], tokens=tokens)[site].double().mean(0) for texts in (towards, away)]
    return Direction((means[0] - means[1]).flatten(), site, subject.fingerprint, name)


def random_direction(like: Direction, seed: int = 0) -> Direction:
    """A direction of the same norm and place with a random orientation: the control for any effect of `like`."""
    noise = torch.randn(len(like.vector), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Direction(noise / noise.norm() * like.norm, like.site, like.model, f"random, seed {seed}")
