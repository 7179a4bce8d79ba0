"""What does a compressed key/value cache lose? The prompt is read, the cache compressed, the continuation scored.

Both sides read the same texts, token by token after the prompt: KL(untoggled || toggled), perplexity, recall word for
word, |o_hat - o| / |o| per attention head, bytes really held, and which tokens are. Source: this project; the recall of
codes is after the passkey test of Mohtashami and Jaggi, 2023 (arXiv 2305.16300).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from workbench.cache import Stages
from workbench.generation import text_of
from workbench.methods.cache.comparison import Loss, compare
from workbench.methods.cache.continuations import Text, texts_of
from workbench.methods.cache.frontier import CONTROL, FrontierResult, Point
from workbench.methods.cache.heavy_hitter import FILLER, N_SYMBOLS, SHARPNESS, World
from workbench.methods.cache.loss import CacheLossResult
from workbench.methods.cache.reading import Reading, read
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.site import sites
from workbench.toggle import Receipt
from workbench.toggles.evict import Evict, EvictKV
from workbench.toggles.steer import Steer

if TYPE_CHECKING:
    from workbench.result import Result
    from workbench.subject import Subject
    from workbench.toggle import Toggle

BASE_BYTES = 1 << 30  # what is held of the untoggled side while toggles come and go


@dataclass(frozen=True)
class CacheLoss(Probe):
    """What the active toggles lose. Run it under toggles: `with subject.under(EvictKV(0.25)): CacheLoss().run(...)`.

    Data: corpora Items; (prompt, continuation) pairs of texts, joined by a space, or of token ids; or whole texts.

    unseen        last tokens of the prompt that are read only once the cache is compressed. 0 is how generation works,
                  and the first token of a continuation then comes from the prompt's own, exact forward; the length of
                  the question makes compression question-agnostic, which is much harder
    continuation  of a whole text, this many last tokens are scored
    maps          of how many texts the kept-token map is held, evenly spread over the data
    batch         prompt tokens per forward, about; prompts are batched with others of their length, so none is padded
    """

    unseen: int = 0
    continuation: int = 32
    maps: int = 4
    batch: int = 4096
    seed: int = 0

    bounds: ClassVar[Bounds] = {"unseen": 0, "continuation": 1, "maps": 0, "batch": 1}

    def measure(self, subject: Subject, data: Any) -> CacheLossResult:
        return compared(self, subject, data, (None,))[0]

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A needle that a quarter of the cache still holds, by attention: its weight, KL and error in closed form."""
        toggle = EvictKV(0.25, "snapkv", every=None)
        return _planted("a needle kept by attention", cls(seed=seed), World.of(seed), toggle, n_held=64)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """The same needles with nothing dropped: no loss, and not a byte less."""
        return _planted("nothing dropped", cls(seed=seed), World.of(seed), EvictKV(1.0), n_held=256)

    @classmethod
    def example(cls, subject: Subject) -> tuple[CacheLoss, list[str]]:
        text = text_of(subject.tokenizer, range(8, 32))
        return cls(continuation=4), [text, " ".join(text.split()[:12])]


@dataclass(frozen=True)
class CacheFrontier(Probe):
    """`CacheLoss` under one toggle after another: quality against bytes, with random eviction as the control.

    settings   (name of the curve, toggle) pairs; `frontier` makes them from a mapping
    loss       how each setting is measured
    control    add random eviction at every budget among the settings; False where a model refuses eviction
    """

    settings: tuple[tuple[str, Toggle], ...]
    loss: CacheLoss = field(default_factory=CacheLoss)
    control: bool = True
    seed: int = 0

    def measure(self, subject: Subject, data: Any) -> FrontierResult:
        settings = self.settings + (random_control(self.settings) if self.control else ())
        if not settings:
            raise ValueError("CacheFrontier: got no settings, expected at least one (name, toggle).")
        losses = compared(self.loss, subject, data, [toggle for _, toggle in settings])
        points = [Point(name, loss) for (name, _), loss in zip(settings, losses, strict=True)]
        return FrontierResult.of(points, seed=self.seed)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """A needle that every query looks at: attention finds it at any budget, recency never, chance at its rate."""
        return _planted_frontier("a needle that attention finds", World.of(seed, n_texts=100), seed, found=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Needles anywhere that no query looks at more than at other tokens: every scorer recalls n / T of them."""
        world = World.of(seed, n_texts=100, before=256 - 8, logit=0.0)
        return _planted_frontier("needles without a mark", world, seed, found=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[CacheFrontier, list[str]]:
        probe, data = CacheLoss.example(subject)
        settings = tuple(("steering", toggle) for toggle in Steer.examples(subject)[:2])
        return cls(settings, probe, control=False), data  # on any subject: some families refuse eviction


def frontier(
    subject: Subject,
    toggles: Mapping[str, Sequence[Toggle]],
    data: Any,
    *,
    loss: CacheLoss | None = None,
    seed: int = 0,
) -> FrontierResult:
    """Quality against bytes of several curves of settings, random eviction beside them; data as for `CacheLoss`."""
    settings = tuple((name, toggle) for name, curve in toggles.items() for toggle in curve)
    result = CacheFrontier(settings, CacheLoss(seed=seed) if loss is None else loss, seed=seed).run(subject, data)
    assert isinstance(result, FrontierResult)
    return result


def random_control(settings: Sequence[tuple[str, Toggle]]) -> tuple[tuple[str, EvictKV], ...]:
    """Random eviction at every budget among the settings; where none evicts, at 3/4, 1/2, 1/4 and 1/8."""
    evicting = [part for _, toggle in settings for part in toggle.parts if isinstance(part, EvictKV)]
    random = [replace(part, by="random", schedule="uniform") for part in evicting]
    random = random or [EvictKV(keep, "random") for keep in (0.75, 0.5, 0.25, 0.125)]
    return tuple((CONTROL, toggle) for toggle in dict.fromkeys(random) if (CONTROL, toggle) not in settings)


# Reading


def compared(probe: CacheLoss, subject: Subject, data: Any, toggles: Sequence[Toggle | None]) -> list[CacheLossResult]:
    """One result per toggle, each on top of those that act already; None adds nothing. The untoggled side is read once.

    A toggle is entered once for as many texts as fit into BASE_BYTES, untoggled: entering can be costly.
    """
    texts = texts_of(subject, data, probe.continuation)
    if not 0 <= probe.unseen < min(len(text.prompt) for text in texts):
        shortest = min(len(text.prompt) for text in texts)
        raise ValueError(f"CacheLoss: got unseen={probe.unseen}, expected 0 to {shortest - 1}: a prompt must be read.")
    losses: list[list[Loss]] = [[] for _ in toggles]
    names, notes = [""] * len(toggles), [""] * len(toggles)
    for chunk in _chunks(texts, _numbers_per_token(subject)):
        with subject.untoggled():
            base = read(subject, chunk, probe.unseen, probe.batch)
        for number, toggle in enumerate(toggles):
            with ExitStack() as undo:
                if toggle is not None:
                    undo.enter_context(subject.under(toggle))
                readings = read(subject, chunk, probe.unseen, probe.batch)
                names[number] = " | ".join(map(str, subject.active)) or "no toggle"
                notes[number] = "; ".join(note for receipt in subject.receipts for note in receipt.notes)
            losses[number] += [compare(*sides) for sides in zip(base, readings, chunk, strict=True)]
    prompts = {i: texts[i].prompt[: len(texts[i].prompt) - probe.unseen] for i in spread(texts, probe.maps)}
    words = {index: [text_of(subject.tokenizer, [token]) for token in ids] for index, ids in prompts.items()}
    groups = [text.group for text in texts]
    return [
        CacheLossResult.of(found, groups, words, toggles=name, notes=note, seed=probe.seed)
        for found, name, note in zip(losses, names, notes, strict=True)
    ]


def _numbers_per_token(subject: Subject) -> int:
    """Numbers that are held of each scored token: its prediction and the attention outputs that led to it."""
    heads = sum(math.prod(subject.anatomy.width(site)) for site in sites(range(subject.n_layers), "heads"))
    return subject.model.config.get_text_config().vocab_size + heads


def _chunks(texts: list[Text], per_token: int) -> Iterator[list[Text]]:
    """The texts in order, cut so that what is held of each chunk fits into BASE_BYTES; one text at least."""
    chunk: list[Text] = []
    size = 0
    for text in texts:
        new = 4 * per_token * len(text.continuation)
        if chunk and size + new > BASE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += new
    yield chunk


def spread(texts: Sequence[Text], count: int) -> list[int]:
    """Indices of up to `count` texts, evenly spread, the last one first: data often goes from near to far."""
    places = np.linspace(len(texts) - 1, 0, min(count, len(texts)))
    return list(dict.fromkeys(places.round().astype(int).tolist()))


# Worlds whose truth is known


def heavy_hitter(toggle: EvictKV, seed: int = 0) -> CacheLossResult:
    """What eviction loses where one token matters: the planted world of `World`, played on a real cache layer."""
    return solved(World.of(seed), toggle, CacheLoss(seed=seed))


def solved(world: World, toggle: EvictKV, probe: CacheLoss, base: list[Reading] | None = None) -> CacheLossResult:
    """What `probe` would find in a world under `toggle`."""
    losses = world.losses(Stages(select=Evict(toggle, 1), receipts={"select": Receipt(toggle)}), base)
    texts = world.texts()
    shown = {index: texts[index].prompt for index in spread(texts, probe.maps)}
    words = {i: ["·" if token == FILLER else f"symbol {token}" for token in prompt] for i, prompt in shown.items()}
    groups = [text.group for text in texts]
    return CacheLossResult.of(losses, groups, words, toggles=str(toggle), seed=probe.seed)


def _planted(name: str, probe: CacheLoss, world: World, toggle: EvictKV, n_held: int) -> Planted:
    after = np.arange(1, world.n_answers)  # the first answer comes from the exact forward of the prompt
    full, short = world.weight(world.n_tokens + after), world.weight(n_held + after)
    kl = [0.0, *(_divergence(*pair) for pair in zip(full, short, strict=True))]
    truths = {
        "kl": (float(np.mean(kl)), 1e-6),  # float32 attention
        "head_error": (float(np.mean(np.abs(short - full) / full)), 1e-6),
        "recall": (1.0, 0.0),
        "held": (n_held / world.n_tokens, 1e-9),
        "held_again": (1.0, 0.0),
    }

    def value(measure: str) -> Callable[[Result], float]:
        return lambda result: float(result.table().set_index("measure").loc[measure, "value"])

    expectations = tuple(Expectation(m, value(m), truth - by, truth + by) for m, (truth, by) in truths.items())
    arrays = {"needle": world.needle, "symbol": world.symbol}
    return Planted(name, arrays, lambda: solved(world, toggle, probe), expectations)


def _divergence(full: float, short: float) -> float:
    """KL between the answers of a needle of these two weights: its symbol against the others, which are alike."""
    logits = SHARPNESS * np.array([full, short])
    said = np.exp(logits) / (np.exp(logits) + N_SYMBOLS - 1)
    other = (1 - said) / (N_SYMBOLS - 1)
    return float(said[0] * np.log(said[0] / said[1]) + (1 - said[0]) * np.log(other[0] / other[1]))


def _planted_frontier(name: str, world: World, seed: int, *, found: bool) -> Planted:
    """Attention, recency and chance at three budgets in one world; how often each must recall the needle."""
    keeps, forced = (0.5, 0.25, 0.125), 12  # 4 sinks and a window of 8, where no needle ever lies
    rivals = tuple((by, EvictKV(keep, by, every=None)) for by in ("snapkv", "streaming") for keep in keeps)

    def solve() -> FrontierResult:
        base = world.read(Stages())
        settings = (*rivals, *random_control(rivals))
        return FrontierResult.of([Point(by, solved(world, one, CacheLoss(), base)) for by, one in settings], seed=seed)

    def recalls(method: str) -> Callable[[Any], float]:
        return lambda result: float(result.curve(method, "recall")["value"].mean())

    chance = [(keep * world.n_tokens - forced) / (world.n_tokens - forced) for keep in keeps]
    # One needle per text; a budget of more tokens holds all that a smaller one does, so the three draws are not apart.
    by_chance = (float(np.mean(chance)), 3 * 0.5 / len(world.needle) ** 0.5)
    truths = {"snapkv": (1.0, 0.0), "streaming": (0.0, 0.0), CONTROL: by_chance}
    if not found:
        truths = dict.fromkeys(truths, by_chance)
    expectations = [Expectation(f"recall by {m}", recalls(m), t - by, t + by) for m, (t, by) in truths.items()]
    return Planted(name, {"needle": world.needle}, solve, tuple(expectations))
