"""The toggles that act on a subject now: installing, lifting and removing them, and the edits that they make.

Toggles are undone in reverse, also after an exception. Edits run in the order of composition; each sees the Step of
the forward under way, and what it moved is counted in the receipt of its toggle.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from workbench.anatomy import add_tap
from workbench.reading import Decide, Pooling, PromptReading, Tap, meets_first, read_apart
from workbench.site import Site
from workbench.step import Positions, Step, StepWatch, check_positions
from workbench.toggle import Receipt, Toggle, conflicting_claims

if TYPE_CHECKING:
    from workbench.subject import Subject

Edit = Callable[[Tensor, Step], Tensor]
Rule = Positions | Sequence[int] | Callable[[Step], Tensor]


@dataclass(eq=False)
class _Installed:
    """An active toggle: its receipt, how to take it back, its taps in order, and what it reads of the prompt.

    ready   False while its install is under way
    """

    toggle: Toggle
    receipt: Receipt
    undo: ExitStack = field(default_factory=ExitStack)
    taps: list[Tap] = field(default_factory=list)
    reading: PromptReading | None = None
    kept: WeakKeyDictionary[Any, Tensor] = field(default_factory=WeakKeyDictionary)  # of its readings, by cache
    ready: bool = False


class ToggleStack:
    """Which toggles act on `subject`, in order."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.watch = StepWatch()
        self._watching = ExitStack()
        self._installed: list[_Installed] = []
        self._loose: list[Tap] = []  # edits outside of any toggle
        self._apart = False  # a reading pass is under way, which no receipt counts
        self.watch.before.append(self._read_prompts)
        self.watch.after.append(self._keep_readings)

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
                for other in self.active:
                    if part.precedes & other.claims:
                        raise ValueError(
                            f"under: {other} is made for layers as they stand, which {part} changes. "
                            f"Write it after: {part} | {other}."
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
            if receipt is not None and not self._apart:
                receipt.count_edit(value.detach(), new.detach(), acted, step.prompt_lengths)
            return new

        with ExitStack() as alone:
            if not self._installed:  # an edit outside of any toggle still needs to know its positions
                self._watch_into(alone)
            self._tap(site, tap, undo)
            undo.callback(alone.pop_all().close)

    def count_forwards(self, undo: ExitStack) -> None:
        """Let the toggle that is being installed count the tokens of every forward; see `Subject.count_forwards`."""
        receipt = self._installed[-1].receipt

        def count(step: Step, given: Mapping[str, Any]) -> None:
            if not self._apart:
                receipt.count_forward(step.real, step.prompt_lengths)

        self.watch.before.append(count)
        undo.callback(self.watch.before.remove, count)

    def read(
        self, sites: Sequence[Site], decide: Decide, undo: ExitStack, *, tokens: Pooling, edited: Sequence[Site]
    ) -> PromptReading:
        """Let the toggle that is being installed decide from the prompt; see `Subject.read_prompt`."""
        for site in sites:
            self.subject.anatomy.place(site)
        passing = all(meets_first(read, edit) for read in sites for edit in edited)
        item = self._installed[-1]
        reading = item.reading = PromptReading(sites, decide, tokens, passing=passing, kept=item.kept)
        undo.callback(setattr, item, "reading", None)
        if passing:
            for site, see in self._eyes(reading):
                self._tap(site, see, undo)
        return reading

    def _tap(self, site: Site, tap: Callable[[Tensor], Tensor | None], undo: ExitStack) -> None:
        """Add a tap, and note it: a reading pass attaches those that act by then, and no other hook."""
        add_tap(self.subject.model, self.subject.anatomy, site, tap, undo)
        taps = self._installed[-1].taps if self._installed else self._loose
        taps.append((site, tap))
        undo.callback(taps.remove, (site, tap))

    def _eyes(self, reading: PromptReading) -> list[Tap]:
        """One tap per site that only lets `reading` see."""

        def see(site: Site, value: Tensor) -> None:
            assert self.watch.step is not None
            reading.see(site, value, self.watch.step)

        return [(site, partial(see, site)) for site in reading.sites]

    def _read_prompts(self, step: Step, given: Mapping[str, Any]) -> None:
        """Before a forward: recall what was decided, or read the prompts for the toggles that can't in passing."""
        reading = {item: item.reading for item in self._installed if item.reading is not None}
        if step.past:
            for each in reading.values():
                each.recall(given["past_key_values"], len(step.positions))
            return
        for each in reading.values():
            each.forget()
        whole = self.watch.whole  # a text that comes in pieces is read apart, as no piece is the prompt
        waiting = [item for item, each in reading.items() if whole is not None or not each.passing]
        while waiting:  # in their order: the second toggle reads what the first one made of the prompt
            acting = [tap for item in self._installed if item not in waiting for tap in item.taps]
            item = waiting.pop(0)
            self._read_apart([*self._loose, *acting, *self._eyes(reading[item])], given if whole is None else whole)
            for each in reading.values():
                if each.passing and whole is None:
                    each.forget()

    def _read_apart(self, taps: list[Tap], given: Mapping[str, Any]) -> None:
        model, anatomy = self.subject.model, self.subject.anatomy
        step, self.watch.step = self.watch.step, self.watch.read(dict(given) | {"past_key_values": None}, self.active)
        self._apart = True
        try:
            with _untraced(self.subject):
                read_apart(model.get_submodule(anatomy.trunk), model, anatomy, taps, given)
        finally:
            self._apart, self.watch.step = False, step

    def _keep_readings(self, step: Step, cache: Any) -> None:
        """After a forward that began texts: count the prompts that are acted on, and keep what was decided."""
        for item in self._installed:
            if item.reading is not None and not step.past:
                item.receipt.count_prompts((item.reading.now != 0).any(-1))
                if cache is not None:
                    item.reading.keep(cache)

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


@contextmanager
def _untraced(subject: Subject) -> Iterator[None]:
    """Within: an nnsight trace under way sees nothing. It stands in the modules themselves, not in their hooks."""
    traced = vars(subject).get("nn")  # made at its first use
    if traced is None:
        yield
        return
    interleaver = traced.interleaver
    before, interleaver.interleaving = interleaver.interleaving, False
    try:
        yield
    finally:
        interleaver.interleaving = before
