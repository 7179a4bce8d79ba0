"""How a toggle changes weights: it swaps Parameters and attributes of the modules that are there, never a module.

Tracing libraries and hooks hold modules; on leaving, the very same objects are put back, so that bits, identities and
optimisers' references are what they were. What no Parameter can express stands in for a `forward`. Source: own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_ABSENT = object()


def swap(module: nn.Module, name: str, new: Any, undo: ExitStack) -> None:
    """Replace a Parameter or a plain attribute of `module` until `undo` unwinds; ValueError for a submodule."""
    if name in module._modules or isinstance(new, nn.Module):
        raise ValueError(
            f"swap: {name!r} of {type(module).__name__} is a module, expected a Parameter or an attribute."
        )
    held = next((part for part in (module._parameters, module._buffers) if name in part), vars(module))
    old = held.get(name, _ABSENT)
    setattr(module, name, new)
    if old is _ABSENT:
        undo.callback(delattr, module, name)
    else:
        undo.callback(setattr, module, name, old)


def swap_weight(module: nn.Module, name: str, new: Tensor, undo: ExitStack) -> None:
    """Replace a Parameter by a frozen one that holds a copy of `new` in memory of its own."""
    swap(module, name, nn.Parameter(new.detach().clone().contiguous(), requires_grad=False), undo)


@dataclass(eq=False)
class StandIn:
    """What runs instead of a module's forward.

    forward   gets what the module gets        inner   what stands in the module's own forward; what to call to run it
    silent    nothing inside the module runs: what is read there counts as zero
    reason    why what is read inside can't be told, where it does run in another way
    """

    forward: Callable[..., Any]
    inner: Callable[..., Any]
    silent: bool = False
    reason: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def stand_in(
    module: nn.Module,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    undo: ExitStack,
    *,
    silent: bool = False,
    reason: str = "",
) -> None:
    """Let `make(forward)` run instead of `forward`, the module's own or what stands in for it already.

    Hooks of the module go on firing. Raises ValueError for a module that accelerate moves between devices, and on
    leaving where another took the place meanwhile, as a tracer does that wraps the model while a toggle acts.
    """
    if hasattr(module, "_hf_hook"):
        raise ValueError(
            f"stand_in: accelerate moves {type(module).__name__} between devices and runs it in its own way. "
            "Load the model on one device."
        )
    inner = module.forward
    mine = StandIn(make(inner), inner, silent, reason)
    old = vars(module).get("forward", _ABSENT)
    vars(module)["forward"] = mine

    def leave() -> None:
        if vars(module).get("forward") is not mine:
            raise RuntimeError(
                f"stand_in: something else runs instead of {type(module).__name__}.forward by now. "
                "Wrap the model (subject.nn) before toggles act, not while they do."
            )
        if old is _ABSENT:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = old

    undo.callback(leave)


def standing_in(module: nn.Module) -> StandIn | None:
    """What stands in for the module's forward; None where nothing of ours does."""
    found = vars(module).get("forward")
    return found if isinstance(found, StandIn) else None
