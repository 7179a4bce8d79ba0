"""Prune: heads, key/value groups, neurons and blocks leave the model, and come back to the bit.

mask    what reads a removed unit is zeroed: the same function, no faster
slice   its weights are taken away: the same function, fewer bytes and less time
Source: own; the criteria that rank units have theirs in `workbench.methods.pruning`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from workbench.pruned.blocks import drop_blocks
from workbench.pruned.cut import Form, cut_layer
from workbench.pruned.plan import LayerPlan, Plan, Shape
from workbench.pruned.report import parameter_bytes
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class Prune(Toggle):
    """A model without the units that a plan does not keep.

    plan   a Plan; sites go on showing units by their original numbers, removed ones as zeros
    form   "slice" takes weights away; "mask" only unhears them, at full cost. Both give the same predictions.
    The bytes freed are those of the parameters that act: the originals wait in memory until the toggle is left.
    """

    plan: Plan
    form: Form = "slice"

    values: ClassVar[tuple[type, ...]] = (Plan, LayerPlan, Shape)
    precedes: ClassVar[frozenset[str]] = frozenset({"kv.project", "ffn.experts"})
    in_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.plan, Plan):
            raise ValueError(f"Prune: got {self.plan!r:.60}, expected a Plan, as Plan.of(subject, ...) makes one.")
        if self.form not in ("mask", "slice"):
            raise ValueError(f"Prune: got form {self.form!r}, expected 'slice' or 'mask'.")

    def install(self, subject: Subject, undo: ExitStack) -> None:
        plan = self.plan.for_subject(subject)
        before = parameter_bytes(subject)
        for layer, kept in plan.layers:  # those that are dropped are not among them
            cut_layer(subject, subject.units[layer], kept, self.form, undo)
        if plan.dropped:
            drop_blocks(subject, plan.dropped, undo)
        subject.count_forwards(undo)
        subject.receipt.bytes_freed = before - parameter_bytes(subject)

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        group = range(subject.anatomy.n_heads // subject.anatomy.n_kv_heads)
        first = subject.n_layers // 2
        plans = [Plan.of(subject, drop=[first])]
        for unit in ("heads", "neurons"):
            refusal = vars(subject.units[first])[f"no_{unit}"]
            if not refusal and unit == "neurons":
                plans.append(Plan.of(subject, {first: {"neurons": range(0, subject.anatomy.d_mlp or 0, 3)}}))
            if not refusal and unit == "heads":
                heads = [head for head in range(subject.anatomy.n_heads) if head not in group]
                plans.append(Plan.of(subject, {first: {"heads": heads}}))
        masked = cls(Plan.of(subject, {first: {"heads": ()}}), form="mask")
        return (*(cls(plan) for plan in plans), masked)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(Plan.of(subject))

    def __str__(self) -> str:
        return f"Prune({self.plan}{'' if self.form == 'slice' else ', masked'})"
