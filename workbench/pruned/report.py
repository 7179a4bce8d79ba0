"""What a plan weighs: parameters, bytes and cache of each layer, before and after. Pure arithmetic on live tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.pruned.blocks import is_dropped

if TYPE_CHECKING:
    from workbench.subject import Subject


def parameter_bytes(subject: Subject) -> int:
    """Bytes of the parameters that act now, each storage once; dropped blocks and silent attention count nothing."""
    silent = {
        id(parameter) for module in subject.model.modules() if is_dropped(module) for parameter in module.parameters()
    }
    acting = {p.data_ptr(): p.nbytes for p in subject.model.parameters() if id(p) not in silent}
    return sum(acting.values())
