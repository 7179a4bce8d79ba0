"""A code of four symbols to be said again after other text: what a compressed cache must not lose.

Law: the answer is the four symbols; distance = words between the last symbol and the first answer word, cue included.
Source: this project, after the passkey test of Mohtashami and Jaggi, 2023 (arXiv 2305.16300); fillers: other texts.
"""

from collections.abc import Iterator
from random import Random

from . import language, relations, requests, stories, streams
from .item import Document, Item, Split, checked, words

NAME = "recall"
SYMBOLS = words(
    """
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon
phi chi psi omega
"""
)
CODE_LENGTH = 4
HEAD, TAIL, CUE = ("the", "code", "is"), (".",), ("recall", "the", "code", ":")
DISTANCES = (8, 16, 32, 64, 128, 256, 384)  # of the evaluated items
MIN_DISTANCE, MAX_DISTANCE = len(TAIL) + len(CUE), 480  # the longest still fits a context of 512
_FILLERS = (stories, stories, streams, relations, language, requests)


def filler(rng: Random, n_words: int, split: Split = "train") -> tuple[str, ...]:
    """Exactly n words of the other phenomena's texts; the last text is cut where the room ends."""
    said: list[str] = []
    while len(said) < n_words:
        source = rng.choice(_FILLERS)
        said += streams.document(rng, split, 24).words if source is streams else source.document(rng, split).words
    return tuple(said[:n_words])


def code(rng: Random) -> tuple[str, ...]:
    """Four different symbols."""
    return tuple(rng.sample(SYMBOLS, CODE_LENGTH))


def recall(symbols: tuple[str, ...], between: tuple[str, ...]) -> tuple[str, ...]:
    """The words up to where the code must be said again."""
    return (*HEAD, *symbols, *TAIL, *between, *CUE)


def vocabulary() -> tuple[str, ...]:
    """The symbols and the words around them; the fillers bring their own."""
    return (*SYMBOLS, *dict.fromkeys(HEAD + TAIL + CUE))


def document(rng: Random, split: Split = "train", distance: int = 64) -> Document:
    """One code, filler, and the code again, `distance` words after it was said."""
    if not MIN_DISTANCE <= distance <= MAX_DISTANCE:
        raise ValueError(f"recall: got distance={distance}, expected {MIN_DISTANCE} to {MAX_DISTANCE}. Change it.")
    checked(split)
    symbols = code(rng)
    asked = recall(symbols, filler(rng, distance - MIN_DISTANCE, split))
    return Document((*asked, *symbols, "."), NAME, ((len(asked), len(asked) + CODE_LENGTH),))


def documents(split: Split, seed: int, distance: int = 64) -> Iterator[Document]:
    """Codes to recall without end."""
    rng = Random(f"recall documents {checked(split)} {seed}")
    while True:
        yield document(rng, split, distance)


def items(split: Split, seed: int = 0, n_per_distance: int = 100, distances: tuple[int, ...] = DISTANCES) -> list[Item]:
    """Codes to recall at each distance; held-out codes and fillers come from other seeds and held-out sentences."""
    found = []
    for distance in distances:
        rng = Random(f"recall items {checked(split)} {seed} {distance}")
        for _ in range(n_per_distance):
            said = document(rng, split, distance).words
            at = len(said) - 1 - CODE_LENGTH
            tags = (("distance", distance),)
            prompt, answer = " ".join(said[:at]), " ".join(said[at:-1])
            found.append(Item(prompt, answer, NAME, f"distance_{distance}", split, tags))
    return found
