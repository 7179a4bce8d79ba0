"""Swapping: whatever kind of attribute it is, the very same object is there again."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from workbench.swap import swap


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("weight", nn.Parameter(torch.ones(3, 2))),
        ("bias", None),
        ("rates", torch.zeros(4)),
        ("in_features", 7),
        ("note", "a new one"),
    ],
)
def test_what_was_swapped_is_put_back_as_the_very_same_object(name: str, new: Any) -> None:
    module = nn.Linear(2, 3)
    module.register_buffer("rates", torch.ones(2), persistent=False)
    before = {name: (list(held), list(held.values())) for name, held in vars(module).items() if isinstance(held, dict)}
    names, old = list(vars(module)), getattr(module, name, None)
    with ExitStack() as undo:
        swap(module, name, new, undo)
        assert getattr(module, name) is new
    assert getattr(module, name, None) is old and list(vars(module)) == names
    for part, (keys, values) in before.items():
        held = vars(module)[part]
        assert list(held) == keys and all(a is b for a, b in zip(held.values(), values, strict=True))
