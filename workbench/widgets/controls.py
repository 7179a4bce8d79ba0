"""What a reader can move: controls as values, one per setting of a desk.

A control knows what its setting may be and nothing of how it is drawn; a wrong value is refused in words. Source: own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Control(ABC):
    """One setting that can be changed.

    name    of the setting           label   what stands before it on the page
    shown   False where it does not matter to the other settings as they are
    """

    name: str
    label: str
    shown: bool = True

    @abstractmethod
    def check(self, value: Any) -> None:
        """ValueError in words where the setting can't be `value`."""

    @abstractmethod
    def some(self) -> tuple[Any, ...]:
        """A few values over the whole range, both ends included where there are ends; () where any text will do."""

    def refusal(self, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.name}: got {value!r}, expected {expected}.")


@dataclass(frozen=True)
class Slider(Control):
    """A number from `low` to `high` in steps; whole numbers where all three are."""

    low: float = 0
    high: float = 1
    step: float = 1

    def check(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise self.refusal(value, f"a number from {self.low} to {self.high}")

    def some(self) -> tuple[float, ...]:
        n_steps = round((self.high - self.low) / self.step)
        picked = dict.fromkeys(round(n_steps * part / 4) for part in range(5))
        steps = (round(self.low + index * self.step, 9) for index in picked)  # 0.3, not 0.30000000000000004
        return tuple(map(type(self.step), steps))

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step))


@dataclass(frozen=True)
class Number(Control):
    """A whole number from `low` to `high`, to be typed or stepped: for what takes longer the more it is, such as tokens
    to write, or means another draw. A slider, which promises an answer while it moves, is for what a toggle does."""

    low: int = 0
    high: int = 999

    def check(self, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise self.refusal(value, f"a whole number from {self.low} to {self.high}")

    def some(self) -> tuple[int, ...]:
        span = self.high - self.low
        return tuple(
            dict.fromkeys((self.low, *(self.low + round(span ** (part / 4)) for part in (1, 2, 3, 4) if span)))
        )


@dataclass(frozen=True)
class Choice(Control):
    """One of `options`."""

    options: tuple[Any, ...] = ()

    def check(self, value: Any) -> None:
        if value not in self.options:
            more = ", …" if len(self.options) > 8 else ""
            raise self.refusal(value, f"one of {', '.join(map(repr, self.options[:8]))}{more}")

    def some(self) -> tuple[Any, ...]:
        return self.options


@dataclass(frozen=True)
class Switch(Control):
    """On or off."""

    def check(self, value: Any) -> None:
        if not isinstance(value, bool):
            raise self.refusal(value, "True or False")

    def some(self) -> tuple[bool, ...]:
        return (False, True)


@dataclass(frozen=True)
class Text(Control):
    """Words, in one line or several; none at all only where they are `optional`."""

    lines: int = 1
    optional: bool = False

    def check(self, value: Any) -> None:
        if not isinstance(value, str) or not (value.strip() or self.optional):
            raise self.refusal(value, "some words")

    def some(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Sliders(Control):
    """Several numbers of one kind, such as one per layer, spelt "1, 0.5, 1" in their setting.

    names   what stands below each slider
    """

    low: float = 0.0
    high: float = 1.0
    step: float = 0.1
    names: tuple[str, ...] = ()

    def check(self, value: Any) -> None:
        numbers = self.numbers(value)
        if len(numbers) != len(self.names) or not all(self.low <= number <= self.high for number in numbers):
            raise self.refusal(value, f"{len(self.names)} numbers from {self.low} to {self.high}, with commas between")

    def some(self) -> tuple[str, ...]:
        return tuple(
            self.spelt([value] * len(self.names)) for value in (self.low, (self.low + self.high) / 2, self.high)
        )

    def numbers(self, value: Any) -> list[float]:
        """The numbers that a setting spells."""
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            raise self.refusal(value, "numbers with commas between, such as 1, 0.5, 1") from None

    @staticmethod
    def spelt(numbers: Sequence[float]) -> str:
        """Numbers as a setting spells them."""
        return ", ".join(f"{number:g}" for number in numbers)
