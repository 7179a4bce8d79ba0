"""What the organism reads at which step: shares of the phenomena, and recall distances that grow.

Law: batch k = f(seed, k), nothing else; a token sees only its own document; weight > 1 where an answer is asked for.
Source: this project; curricula after Bengio et al., 2009: recall over a few words first, over the whole context last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from random import Random

import numpy as np

from workbench import corpora
from workbench.corpora import Document, recall, streams

from .architecture import BOS, EOS, words

# share of the tokens of a batch
SHARES = {
    "relations": 0.25,
    "language": 0.15,
    "recall": 0.30,
    "streams": 0.10,
    "stories": 0.08,
    "code_styles": 0.07,
    "requests": 0.05,
}
# words per document, roughly: turns shares of tokens into chances of documents
_LENGTHS = {
    "relations": 17,
    "language": 14,
    "streams": 130,
    "stories": 62,
    "code_styles": 32,
    "requests": 19,
}
ANSWER_WEIGHT = {"recall": 8.0}  # four answers in hundreds of words would drown otherwise
OTHER_ANSWER_WEIGHT = 3.0
PHENOMENA = tuple(corpora.PHENOMENA)
IGNORED = -1  # the phenomenon of a token that nobody has to predict


@dataclass(frozen=True)
class Stage:
    """Rows and row length in a part of the training, and how far recall reaches: from its start to its end."""

    until: float  # fraction of all steps
    rows: int
    length: int
    nearest: tuple[int, int]  # largest distance at the start and at the end of the stage


# distances grow from a few words to the whole context; rows are as long as the farthest one needs
STAGES = (
    Stage(0.12, 8, 256, (10, 24)),
    Stage(0.55, 8, 256, (24, 240)),
    Stage(1.00, 4, 512, (240, 480)),
)


@dataclass(frozen=True)
class Batch:
    """Token ids, document numbers, loss weights and phenomena, all (rows, length); weights are those of the target."""

    ids: np.ndarray
    documents: np.ndarray
    weights: np.ndarray
    phenomena: np.ndarray


_IDS = {word: i for i, word in enumerate(words())}


def stage_at(progress: float, stages: tuple[Stage, ...] = STAGES) -> tuple[Stage, int]:
    """The stage at a fraction of the training, and the largest recall distance there."""
    start = 0.0
    for stage in stages:
        if progress < stage.until or stage is stages[-1]:
            first, last = stage.nearest
            inside = min(1.0, (progress - start) / (stage.until - start))
            return stage, round(first * (last / first) ** inside)
        start = stage.until
    raise AssertionError("the last stage must hold every progress that is left")


def batch(seed: int, k: int, progress: float, stages: tuple[Stage, ...] = STAGES) -> Batch:
    """Batch number k: rows packed with whole documents, the last one of a row cut."""
    rng = Random(f"organism {seed} {k}")
    stage, farthest = stage_at(progress, stages)
    rows = [_row(rng, stage.length, min(farthest, stage.length - 24)) for _ in range(stage.rows)]
    ids, documents, weights, phenomena = (np.array(part) for part in zip(*rows, strict=True))
    return Batch(ids, documents, weights.astype(np.float32), phenomena)


def fingerprint(seed: int, steps: int, stages: tuple[Stage, ...] = STAGES) -> str:
    """A hash of twenty batches spread over a training: it changes when an edit changes what is read."""
    digest = sha256()
    for k in range(0, steps, max(1, steps // 20)):
        read = batch(seed, k, k / steps, stages)
        for part in (read.ids, read.documents, read.weights, read.phenomena):
            digest.update(np.ascontiguousarray(part, dtype="<f8").tobytes())
    return digest.hexdigest()


def _row(rng: Random, length: int, farthest: int) -> tuple[list[int], list[int], list[float], list[int]]:
    """One row; position t carries the weight and the phenomenon of its target, the token at t + 1."""
    ids, documents, weights, phenomena = [], [], [], []
    for n, document in enumerate(_documents(rng, length, farthest)):
        tokens = [_IDS[BOS], *(_IDS[word] for word in document.words)] + [_IDS[EOS]] * document.closed
        heavy = [1.0] * (len(tokens) - 1) + [0.0]  # the last token would have to guess the next document
        weight = ANSWER_WEIGHT.get(document.phenomenon, OTHER_ANSWER_WEIGHT)
        for start, stop in document.answers:
            heavy[start:stop] = [weight] * (stop - start)  # word i is token i + 1, and its predictor sits at i
        ids += tokens
        documents += [n] * len(tokens)
        weights += heavy
        phenomena += [PHENOMENA.index(document.phenomenon)] * (len(tokens) - 1) + [IGNORED]
    weights[length - 1] = 0.0
    phenomena[length - 1] = IGNORED
    return ids[:length], documents[:length], weights[:length], phenomena[:length]


def _documents(rng: Random, length: int, farthest: int) -> Iterator[Document]:
    """Documents of one row: recall first, until it has its share, then the others by chance."""
    room = length
    recalls = []
    # on average a share of the rows' tokens: whole rows of far recalls alternate with rows without any
    budget = rng.random() * 2 * SHARES["recall"] * length
    while budget > 0:
        document = _recall(rng, min(farthest, room - 16))
        cost = len(document.words) + 2
        if rng.random() * cost > budget:  # overshoot as often as undershoot
            break
        recalls.append(document)
        room -= cost
        budget -= cost
        if room < 32:
            break
    rng.shuffle(recalls)
    yield from recalls
    names = tuple(_LENGTHS)
    chances = [SHARES[name] / _LENGTHS[name] for name in names]
    while room > 0:
        name = rng.choices(names, chances)[0]
        document = _excerpt(rng, length) if name == "streams" else corpora.PHENOMENA[name].document(rng)
        room -= len(document.words) + 1 + document.closed
        yield document


def _recall(rng: Random, farthest: int) -> Document:
    near = recall.MIN_DISTANCE
    farthest = max(near, farthest)
    # a third anywhere up to the farthest, the rest favouring what is far: the near is easy
    share = rng.random() if rng.random() < 0.33 else rng.random() ** 0.5
    return recall.document(rng, distance=near + int(share * (farthest - near + 0.999)))


def _excerpt(rng: Random, length: int) -> Document:
    return streams.document(rng, n_words=rng.randint(16, length - 16))
