"""One model for many: one visitor at a time computes, in the order of asking, and each asks for one thing at most.

Toggles act in the shared model, so two visitors' toggles must never meet; and whoever drags a slider asks for the
newest picture alone, so nobody waits for more than one picture of each other visitor. Source: own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from workbench.widgets.controls import Control
from workbench.widgets.desk import Desk
from workbench.widgets.picture import Picture

T = TypeVar("T")
LONGEST = 4000  # characters of a text that a visitor may write: a longer one would keep the whole room waiting


class Turns:
    """A single thread that computes for everybody, first come, first served."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "workbench-room")
        self._thread.submit(int).result()  # it starts here, so that it belongs to no visitor

    def take(self, work: Callable[[], T]) -> T:
        """What `work` gives, or raises, once it is its turn. ValueError in words when the room closes before."""
        try:
            return self._thread.submit(work).result()
        except (CancelledError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "shutdown" not in str(error):
                raise
            raise ValueError("The room is closing; nothing more is computed.") from error

    def close(self) -> None:
        """Compute nothing more; what is being computed ends first."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Seat:
    """A desk as a visitor moves it: its pictures wait for their turn, and no setting leads out of the desk.

    A program may set a choice to what it does not offer, such as a file with a direction; a visitor may not.
    """

    desk: Desk
    turns: Turns

    @property
    def question(self) -> str:
        return self.desk.question

    @property
    def settings(self) -> dict[str, Any]:
        return self.desk.settings

    def controls(self) -> tuple[Control, ...]:
        return self.desk.controls()

    def picture(self) -> Picture:
        return self.turns.take(self.desk.picture)

    def command(self) -> str:
        return self.desk.command()

    def changed(self, **settings: Any) -> Self:
        """The seat with other settings. ValueError for what the desk does not offer, and for texts without an end."""
        offered = {control.name: control for control in self.controls()}
        for name, value in settings.items():
            if name not in offered:
                raise ValueError(f"room: got setting {name!r}, expected one of {', '.join(offered)}.")
            if isinstance(value, str) and len(value) > LONGEST:
                raise ValueError(f"{name}: got {len(value)} characters, expected {LONGEST} at most. Shorten the text.")
            offered[name].check(value)  # also where it is hidden, which a desk itself lets pass
        return replace(self, desk=self.desk.changed(**settings))
