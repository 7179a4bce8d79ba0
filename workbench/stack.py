"""The toggles that act on a subject now: installing, lifting and removing them, and the edits that they make.

Toggles are undone in reverse, also after an exception. Edits run in the order of composition; each sees the Step of
the forward under way, and what it moved is counted in the receipt of its toggle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.anatomy import add_tap
from workbench.site import Site
from workbench.step import Positions, Step, StepWatch, check_positions
from workbench.toggle import Receipt, Toggle, conflicting_claims

if TYPE_CHECKING:
    from workbench.subject import Subject

Edit = Callable[[Tensor, Step], Tensor]
Rule = Positions | Sequence[int] | Callable[[Step], Tensor]


@dataclass(eq=False)
class _Installed:
    """An active toggle: its receipt and how to take it back; not `ready` while its install is under way."""

    toggle: Toggle
    receipt: Receipt
    undo: ExitStack = field(default_factory=ExitStack)
    ready: bool = False


class ToggleStack:
    """Which toggles act on `subject`, in order."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.watch = StepWatch()
        self._watching = ExitStack()
        self._installed: list[_Installed] = []

    @property
    def active(self) -> tuple[Toggle, ...]:
        return tuple(item.toggle for item in self._installed)

    @property
    def receipts(self) -> tuple[Receipt, ...]:
        return tuple(item.receipt for item in self._installed)

    @contextmanager
    def under(self, toggle: Toggle, *, adopt_cache: bool) -> Iterator[None]:
        """Install the parts of `toggle` one by one and take them back; see `Subject.under`."""
        mine: list[_Installed] = []
        adopted, self.watch.adopt = self.watch.adopt, self.watch.adopt or adopt_cache
        try:
            for part in toggle.parts:
                for other, claim in conflicting_claims(self.active, part):
                    raise ValueError(
                        f"under: {part} and {other} both claim {claim!r}; only one can act. Leave one out."
                    )
                mine.append(_Installed(part, Receipt(part)))
                self._install(mine[-1])
            yield
        finally:
            self.watch.adopt = adopted
            for item in reversed(mine):
                self._remove(item)
        for item in mine:
            if not item.receipt.fired:
                # 1 is this line, 2 and 3 are the two context managers around it, 4 their machinery, 5 the user's `with`
                warnings.warn(f"{item.toggle} was active but never fired: it changed nothing.", stacklevel=5)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without any toggle; afterwards the same act again, with the same receipts.

        A toggle may ask for this first thing in its install: it is then not installed a second time.
        """
        items = list(self._installed)
        for item in reversed(items):
            self._remove(item) if item.ready else self._forget(item)
        try:
            yield
        finally:
            for item in items:
                self._install(item) if item.ready else self._begin(item)

    def edit(self, site: Site, fn: Edit, undo: ExitStack, *, positions: Rule) -> None:
        """Replace the value at `site` by `fn(value, step)` where the position rule holds; see `Subject.edit`."""
        rule = positions if callable(positions) else check_positions(positions)
        receipt = self._installed[-1].receipt if self._installed else None

        def tap(value: Tensor) -> Tensor:
            step = self.watch.step
            if step is None:
                raise RuntimeError(
                    f"{site}: no forward of the whole decoder is under way; an edit acts only inside one."
                )
            acted = (rule(step) if callable(rule) else step.where(rule)).to(value.device)  # (batch, seq)
            new = fn(value, step).to(value.dtype)
            new = torch.where(acted.reshape(*acted.shape, *(1,) * (value.dim() - 2)), new, value)
            if receipt is not None:
                receipt.count_edit(value.detach(), new.detach(), acted)
            return new

        with ExitStack() as alone:
            if not self._installed:  # an edit outside of any toggle still needs to know its positions
                self._watch_into(alone)
            add_tap(self.subject.model, self.subject.anatomy, site, tap, undo)
            undo.callback(alone.pop_all().close)

    def _install(self, item: _Installed) -> None:
        self._begin(item)
        item.undo, item.ready = ExitStack(), False
        try:
            item.toggle.install(self.subject, item.undo)
        except BaseException:
            self._remove(item)
            raise
        item.ready = True

    def _begin(self, item: _Installed) -> None:
        if not self._installed:
            self._watch_into(self._watching)
        self._installed.append(item)

    def _remove(self, item: _Installed) -> None:
        try:
            item.undo.close()
        finally:
            self._forget(item)

    def _forget(self, item: _Installed) -> None:
        if item in self._installed:
            self._installed.remove(item)
            if not self._installed:
                self._watching.close()

    def _watch_into(self, undo: ExitStack) -> None:
        trunk = self.subject.model.get_submodule(self.subject.anatomy.trunk)
        self.watch.install(trunk, lambda: self.active, undo)
