"""Leave out whole transformer blocks: the residual stream passes by them as if they were not there.

x_{i+1} = x_i at a dropped block; the blocks that are left take the lowest slots of the cache, so that time, weights
and cache all fall with the number of blocks. Source: ShortGPT, Men et al., 2024 (arXiv 2403.03853); the slots are ours.
"""

from __future__ import annotations

import operator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from workbench.pruned.blocks import drop_blocks
from workbench.pruned.report import parameter_bytes
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class DropBlocks(Toggle):
    """A model without some of its blocks. Which ones it can spare, `BlockInfluence` tells.

    blocks   their numbers. Those that are left keep theirs: sites inside a dropped block read zeros, and what enters it
             leaves it. Several of these toggles drop what any of them names.
    The bytes freed are those of the dropped blocks' parameters: they wait in memory until the toggle is left.
    """

    blocks: tuple[int, ...] = ()

    in_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try:
            numbers = tuple(sorted({operator.index(block) for block in self.blocks}))
        except TypeError:
            numbers = (-1,)
        if numbers and numbers[0] < 0:
            raise ValueError(f"DropBlocks: got blocks={self.blocks!r}, expected numbers of blocks, such as (3, 7).")
        object.__setattr__(self, "blocks", numbers)

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if not self.blocks:
            return
        before = parameter_bytes(subject)
        drop_blocks(subject, self.blocks, undo)
        subject.count_forwards(undo)
        subject.receipt.bytes_freed = before - parameter_bytes(subject)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        first, last = 0, subject.n_layers - 1
        return cls((first,)), cls((last,)), cls((first, subject.n_layers // 2))

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls()

    def __str__(self) -> str:
        return f"DropBlocks({', '.join(map(str, self.blocks))})"
