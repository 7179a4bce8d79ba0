"""Ways to make a model smaller, at matched cost: each takes what it compresses to a share, and the cost is measured.

cache        bytes that the cache of a reference text holds / bytes without the toggle
weights      parameters of the blocks that are left / parameters of all blocks, whoever leaves: heads, neurons, blocks
activations  KL(untouched || steered) in nats per prediction of the reference texts: nothing gets smaller
Every kind but bits and ranks has its control: as much of the same, chosen at random. Sources: those of the toggles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from workbench.corpora import requests
from workbench.directions import difference_in_means, random_direction
from workbench.methods.cache.scorers import Random
from workbench.methods.pruning.budgets import Budget
from workbench.probes.block_influence import BlockInfluence
from workbench.probes.pruning_curve import dealt
from workbench.probes.pruning_scores import PruningScores
from workbench.pruned.report import Sizes
from workbench.site import Site
from workbench.strength import strength_for_kl
from workbench.studies.costs import ACTIVATIONS, CACHE, POSITIONS, WEIGHTS, cache_share, calibration, nearest
from workbench.toggle import Toggle
from workbench.toggles.drop_blocks import DropBlocks
from workbench.toggles.evict import EvictKV
from workbench.toggles.lowrank import LowRankKV
from workbench.toggles.prune import Prune
from workbench.toggles.quantize import QuantizeKV
from workbench.toggles.steer import Steer

if TYPE_CHECKING:
    from workbench.subject import Subject

RUNGS = 40  # shares of the tokens that are tried


@dataclass(frozen=True)
class Kind(ABC):
    """One way to compress. `control` marks those that choose at random.

    family   whose cost is matched: "cache", "weights" or "activations"
    """

    family: ClassVar[str]

    @abstractmethod
    def toggle(self, subject: Subject, share: float, seed: int) -> Toggle:
        """The setting that comes nearest to `share`; the seed draws calibration texts and random choices.

        ValueError where the subject can't be compressed so.
        """

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    def control(self) -> bool:
        return self.name.startswith("random")


@dataclass(frozen=True)
class Bits(Kind):
    """A cache in 2, 4, 8 bits or whole numbers, keys before values and early layers first to get more."""

    family: ClassVar[str] = CACHE

    @property
    def name(self) -> str:
        return "fewer bits"

    def toggle(self, subject: Subject, share: float, seed: int) -> Toggle:
        slots = 2 * subject.n_layers
        ladder = []
        for low, high in ((2, 4), (4, 8), (8, 16)):
            for n_high in range(slots):
                bits = [high] * n_high + [low] * (slots - n_high)
                keys, values = tuple(bits[: subject.n_layers]), tuple(bits[subject.n_layers :])
                ladder.append(self.packed(subject, keys, values))
        return nearest(ladder, lambda one: cache_share(subject, one), share)

    @staticmethod
    def packed(subject: Subject, keys: int | tuple[int, ...], values: int | tuple[int, ...]) -> QuantizeKV:
        """Every token in these bits, of all layers or of each: short texts, too, are packed."""
        return QuantizeKV(keys, values, max(8, min(32, subject.anatomy.d_head // 4)), residual=0, sinks=0)


@dataclass(frozen=True)
class Tokens(Kind):
    """A cache of fewer tokens. by, schedule   as in EvictKV."""

    by: str = "snapkv"
    schedule: Literal["uniform", "pyramid", "adaptive"] = "uniform"

    family: ClassVar[str] = CACHE

    @property
    def name(self) -> str:
        if self.by == "random":
            return "random tokens"
        words = [self.by.replace("_", " "), *([] if self.schedule == "uniform" else [self.schedule]), "tokens"]
        return " ".join(words)  # no comma: a sweep takes names apart there

    def toggle(self, subject: Subject, share: float, seed: int) -> Toggle:
        by = Random(seed=seed) if self.by == "random" else self.by
        # Few forced tokens and an eviction at every token: a short question, too, then holds its share and no more.
        # Some scorers hold statistics beside the tokens: those keep fewer.
        ladder = [EvictKV(n / RUNGS, by, self.schedule, sinks=1, window=2, every=1) for n in range(1, RUNGS)]
        return nearest(ladder, lambda one: cache_share(subject, one), share)


@dataclass(frozen=True)
class Ranks(Kind):
    """A cache of shorter vectors, in bases from the calibration texts."""

    family: ClassVar[str] = CACHE

    @property
    def name(self) -> str:
        return "low rank"

    def toggle(self, subject: Subject, share: float, seed: int) -> Toggle:
        return LowRankKV(max(1, round(share * subject.anatomy.d_head)), texts=calibration(seed))


@dataclass(frozen=True)
class Units(Kind):
    """Heads or neurons leave, the lowest scores of all layers first; random: other ones, as many of every layer."""

    of: Literal["heads", "neurons"] = "heads"
    random: bool = False

    family: ClassVar[str] = WEIGHTS

    @property
    def name(self) -> str:
        return f"random {self.of}" if self.random else f"fewer {self.of}"

    def toggle(self, subject: Subject, share: float, seed: int) -> Toggle:
        scores: Any = PruningScores(seed=seed).run(subject, calibration(seed))
        ranking = scores.ranking()
        ranking = dealt(ranking, seed) if self.random else ranking
        budget = Budget(of=self.of, allocation="global")
        sizes = Sizes.of(subject)
        own = sum((sizes.attention if self.of == "heads" else sizes.mlp)(layer) for layer in range(subject.n_layers))
        if not own:
            raise ValueError(
                f"{self.name}: {sizes.no_heads or sizes.no_neurons or f'{subject.name} has no {self.of}'}."
            )
        wanted = (1 - share) * (sizes.total - sizes.outside) / own
        return Prune(ranking.plan(min(wanted, ranking.most(budget)), budget))


@dataclass(frozen=True)
class Blocks(Kind):
    """Whole blocks leave, at least one, those first that turn the residual stream least; random: any."""

    random: bool = False

    family: ClassVar[str] = WEIGHTS

    @property
    def name(self) -> str:
        return "random blocks" if self.random else "fewer blocks"

    def toggle(self, subject: Subject, share: float, seed: int) -> Toggle:
        n = min(max(1, round((1 - share) * subject.n_layers)), subject.n_layers - 1)
        if self.random:
            return DropBlocks(tuple(np.random.default_rng([seed, 3]).permutation(subject.n_layers)[:n].tolist()))
        return self.least_missed(subject, n, seed)

    @staticmethod
    def least_missed(subject: Subject, n: int, seed: int) -> Toggle:
        """Without the n blocks that turn the residual stream of the calibration texts least."""
        probe = BlockInfluence(by="block_influence", n_drop=n, validate=False, seed=seed)
        found: Any = probe.run(subject, list(calibration(seed)))
        return found.drop(n)


@dataclass(frozen=True)
class Push(Kind):
    """A push against the refusal direction in the middle of the model; random: along any direction."""

    random: bool = False

    family: ClassVar[str] = ACTIVATIONS

    @property
    def name(self) -> str:
        return "random push" if self.random else "push from refusal"

    def toggle(self, subject: Subject, share: float, seed: int) -> Toggle:
        site, items = Site(subject.n_layers // 2, "resid_out"), requests.items("train", seed)
        groups = [[item.prompt for item in items if item.form == form][:64] for form in ("harmless", "harmful")]
        direction = difference_in_means(subject, groups[0], groups[1], site, name="away from refusal")
        if self.random:
            direction = random_direction(direction, seed)
        found = strength_for_kl(
            subject, lambda s: Steer(direction, site, s), calibration(seed), share, positions=POSITIONS
        )
        return Steer(direction, site, found.strength)


KINDS: tuple[Kind, ...] = (
    Bits(),
    Tokens("snapkv"),
    Ranks(),
    Units("heads"),
    Units("neurons"),
    Blocks(),
    Push(),
)
CONTROLS: tuple[Kind, ...] = (
    Tokens("random"),
    Units("heads", random=True),
    Units("neurons", random=True),
    Blocks(random=True),
    Push(random=True),
)
MORE: tuple[Kind, ...] = (  # for those who ask for them
    Tokens("snapkv", "pyramid"),
    Tokens("expected_attention"),
    Tokens("tova"),
    Tokens("h2o"),
)


def kinds(names: Sequence[str] = (), *, controls: bool = True) -> tuple[Kind, ...]:
    """Those of these names, or all; ValueError for a name that is none."""
    known = {kind.name: kind for kind in (*KINDS, *CONTROLS, *MORE)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"kinds: got {unknown[0]!r}, expected some of: {', '.join(known)}.")
    return tuple(known[name] for name in names) or (*KINDS, *(CONTROLS if controls else ()))
