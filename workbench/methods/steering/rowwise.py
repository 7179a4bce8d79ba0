"""Many directions tried in one forward: each row of a batch is pushed along, or freed of, a vector of its own.

row i: x' = x + v_i at one site, or x' = x - (x . r_i) r_i at every place that writes to the residual stream.
Source: this project; the same acts as `Steer` and `ProjectOut`, one direction for all rows there.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from workbench.site import Site
from workbench.step import Positions, Step
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

WRITES = ("resid_in", "attn_out", "mlp_out")  # the input of a block, and what the block adds to it


@dataclass(frozen=True, eq=False)
class RowSteer(Toggle):
    """Add to each row its own vector at a site, layer by layer: `at[k]` gets `pushes[:, k]`.

    A row of zeros is left as it is, to the bit.
    """

    pushes: Float[Tensor, "row site width"]
    at: tuple[Site, ...]
    positions: Positions | tuple[int, ...] = "all"

    def install(self, subject: Subject, undo: ExitStack) -> None:
        for site, pushes in zip(self.at, self.pushes.unbind(1), strict=True):

            def edit(value: Tensor, step: Step, pushes: Tensor = pushes) -> Tensor:
                own = pushes.to(value.device, value.dtype)[:, None]  # (row, 1, width)
                return (value.flatten(2) + own).reshape(value.shape)

            subject.edit(site, edit, undo, positions=self.positions)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return ()  # it fits one batch only

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        raise ValueError("RowSteer: a push per row fits one batch only, so there is no neutral one.")

    def __str__(self) -> str:
        return f"RowSteer({len(self.pushes)} rows at {len(self.at)} sites)"


@dataclass(frozen=True, eq=False)
class RowProjectOut(Toggle):
    """Remove from each row the component along its own unit vector, wherever the residual stream is written to."""

    units: Float[Tensor, "row width"]

    def install(self, subject: Subject, undo: ExitStack) -> None:
        def edit(value: Tensor, step: Step) -> Tensor:
            own = self.units.to(value.device, value.dtype)[:, :, None]  # (row, width, 1)
            return value - (value @ own) * own.mT

        for site in (Site(layer, kind) for layer in range(subject.n_layers) for kind in WRITES):
            subject.edit(site, edit, undo)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return ()  # it fits one batch only

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        raise ValueError("RowProjectOut: a direction per row fits one batch only, so there is no neutral one.")

    def __str__(self) -> str:
        return f"RowProjectOut({len(self.units)} rows)"
