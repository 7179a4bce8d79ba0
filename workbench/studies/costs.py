"""What a toggle costs, measured: bytes of the cache, parameters of the blocks, how far predictions move.

cache    bytes of a reference text's cache under the toggle / without it, scales, indices and statistics included
weights  parameters of all blocks that act under the toggle / without it
kl       KL(without || with) in nats per prediction, on the calibration texts
Source: own; sizes are those of tensor storages that are really held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from workbench.corpora import recall
from workbench.methods.cache.continuations import Text
from workbench.methods.cache.reading import read
from workbench.pruned.report import Sizes, parameter_bytes
from workbench.strength import log_probs_at, mean_kl

if TYPE_CHECKING:
    from workbench.subject import Subject
    from workbench.toggle import Toggle

N_REFERENCE = 160  # tokens of the reference text
N_TEXTS, N_WORDS = 12, 40  # to calibrate on
POSITIONS = (-1, -8, -16)  # where predictions are compared
CACHE, WEIGHTS, ACTIVATIONS = "cache", "weights", "activations"
COST_OF = {CACHE: "cache", WEIGHTS: "weights", ACTIVATIONS: "kl"}  # what the kinds of a family are matched by
COST_NAMES = {
    CACHE: "bytes of the cache / untoggled",
    WEIGHTS: "parameters of the blocks / untoggled",
    ACTIVATIONS: "KL from untoggled (nats per prediction)",
}


@dataclass(frozen=True)
class Cost:
    """What is left, as shares of the subject without the toggle, and how far predictions move: see the module."""

    cache: float
    weights: float
    kl: float


def cost(subject: Subject, toggle: Toggle, seed: int) -> Cost:
    """What `toggle` leaves of the subject, and how far it moves predictions on the calibration texts of a seed."""
    texts = calibration(seed)
    before, plain = block_bytes(subject), log_probs_at(subject, texts, POSITIONS)
    with subject.under(toggle):
        weights = block_bytes(subject) / before
        kl = mean_kl(plain, log_probs_at(subject, texts, POSITIONS))
    return Cost(cache_share(subject, toggle), weights, kl)


def cache_share(subject: Subject, toggle: Toggle) -> float:
    """Bytes of the reference text's cache under `toggle` over those without it."""
    text = _reference(subject)
    held = read(subject, [text], 0, N_REFERENCE)[0].cache_bytes
    with subject.under(toggle):
        return read(subject, [text], 0, N_REFERENCE)[0].cache_bytes / held


def block_bytes(subject: Subject) -> int:
    """Bytes of the parameters that act now, without embeddings, final norm and unembedding."""
    return parameter_bytes(subject) - Sizes.of(subject).outside * subject.dtype.itemsize


def nearest(ladder: Sequence[Toggle], costs: Callable[[Toggle], float], wanted: float) -> Toggle:
    """The rung whose cost comes nearest to the one wanted; costs rise along the ladder, so few are measured."""
    low, high, known = 0, len(ladder) - 1, {}

    def at(rung: int) -> float:
        if rung not in known:
            known[rung] = costs(ladder[rung])
        return known[rung]

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= wanted else (low, middle)
    return ladder[min((low, high), key=lambda rung: abs(at(rung) - wanted))]


def calibration(seed: int) -> tuple[str, ...]:
    """Pieces of what the organism was raised on but codes and programs, from the split that it was trained on."""
    return tuple(" ".join(recall.filler(Random(f"calibration {seed} {n}"), N_WORDS)) for n in range(N_TEXTS))


def _reference(subject: Subject) -> Text:
    words = " ".join(recall.filler(Random("reference"), N_REFERENCE + 1))
    ids = list(subject.tokenize([words], cut=True).ids[0])[: N_REFERENCE + 1]
    return Text(ids[:-1], ids[-1:], "")
