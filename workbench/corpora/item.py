"""The two things a corpus gives: texts to read and questions with a known answer.

Law: a text is words joined by single spaces; the pair (i, j) is held out iff (i + 3j + 1) mod n = 0, n not a
multiple of 3 (then every word i has partners j of both splits).
Source: this project. Held-out combinations follow Lake and Baroni, 2018: every word is seen, the combination is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Item:
    """One evaluated question: the words of `answer` are right after `prompt`."""

    prompt: str
    answer: str
    phenomenon: str
    form: str
    split: Split
    tags: tuple[tuple[str, str | int], ...] = ()

    def tag(self, name: str) -> str | int:
        """The value of one tag, e.g. `item.tag("relation")`."""
        found = dict(self.tags)
        if name not in found:
            raise ValueError(f"Item.tag: got {name!r}, this item has {sorted(found)}. Ask for one of those.")
        return found[name]


@dataclass(frozen=True)
class Document:
    """One training text; `answers` are half-open word ranges that follow from what stands before them."""

    words: tuple[str, ...]
    phenomenon: str
    answers: tuple[tuple[int, int], ...] = ()
    closed: bool = True  # False: an excerpt of something longer, no end-of-text follows

    @property
    def text(self) -> str:
        """The words joined by single spaces."""
        return " ".join(self.words)


class Phenomenon(Protocol):
    """What every phenomenon's module offers."""

    def vocabulary(self) -> tuple[str, ...]: ...
    def document(self, rng: Random, split: Split = "train") -> Document: ...
    def documents(self, split: Split, seed: int) -> Iterator[Document]: ...
    def items(self, split: Split, seed: int) -> list[Item]: ...


def words(text: str) -> tuple[str, ...]:
    """A list of words written as running text."""
    return tuple(text.split())


def checked(split: str) -> str:
    """The split itself, or an error that names the two there are."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'held_out'. Pass one of the two.")
    return split


def is_held_out(i: int, j: int, one_in: int = 5) -> bool:
    """Whether the combination of the i-th and the j-th word is kept from training."""
    return (i + 3 * j + 1) % one_in == 0
