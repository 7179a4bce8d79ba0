"""Which blocks would be missed least? Those that hardly turn the residual stream, or hardly change where it ends.

Block influence looks at the two ends of one block, macro influence at the end of the model without it, again after each
removal. Sources: ShortGPT, Men et al., 2024 (arXiv 2403.03853); FuseGPT, Pan et al., 2024 (arXiv 2411.14507).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from workbench.generation import text_of
from workbench.methods.pruning.influence import Ids, droppable, influence, losses, macro_rounds, token_mean
from workbench.methods.pruning.influenced import BLOCK, LAST, MACRO, RANDOM, InfluenceResult
from workbench.organism.tiny import tiny_pair
from workbench.probe import Expectation, Planted, Probe
from workbench.pruned.blocks import attention_of, block_of, blocks_left, groups_left, is_dropped, refusal
from workbench.pruned.plan import Shape
from workbench.settings import Bounds
from workbench.site import Site
from workbench.subject import Subject
from workbench.toggles.drop_blocks import DropBlocks


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockInfluenceResult(InfluenceResult):
    """Influence of each block, and toggles made of it."""

    def drop(self, n: int | None = None, by: str | None = None) -> DropBlocks:
        """The toggle that drops the first n blocks by a measure; None: as many as were asked for, by the chosen one."""
        return DropBlocks(self.order(self.n_drop if n is None else n, by))


@dataclass(frozen=True)
class BlockInfluence(Probe):
    """Ranks blocks by what the model loses without them. Data: texts, or rows of token ids.

    by                     the measure that decides; block_influence measures that one alone, in one forward
    n_drop                 blocks to rank and drop; None: a quarter of them, rounded up
    keep_first, keep_last  so many blocks at either end always stay
    validate               every second text is held out, to be read with 0, 1, ... n_drop blocks dropped: by each
                           measure, the last ones, and random ones
    n_random               random orders
    batch                  tokens per forward: memory is that of their states at every block
    """

    by: Literal["block_influence", "macro_influence"] = "macro_influence"
    n_drop: int | None = None
    keep_first: int = 0
    keep_last: int = 0
    validate: bool = True
    n_random: int = 5
    batch: int = 2048
    seed: int = 0

    bounds: ClassVar[Bounds] = {"n_random": 0, "batch": 1}

    def measure(self, subject: Subject, data: Any) -> BlockInfluenceResult:
        calibration, held_out = self._texts(subject, data)
        allowed, n = self._allowed(subject)
        if self.by == MACRO:
            rounds, going = macro_rounds(subject, calibration, n, allowed, batch=self.batch)
            first = rounds[0]
        else:
            first, rounds, going = influence(subject, calibration, (), batch=self.batch), [], []
        alone = token_mean(first.alone, calibration)
        orders = [(BLOCK, sorted(allowed, key=lambda block: alone[block])), *([(MACRO, going)] if rounds else [])]
        if self.validate:
            orders += self._controls(allowed)
        found = [(name, droppable(subject, order, n)) for name, order in orders]
        removed = np.full((len(found), n), -1)
        nll = np.full((len(found), n + 1, len(held_out)), np.nan)
        for row, (_, order) in enumerate(found):
            removed[row, : len(order)] = order
            if held_out:
                nll[row, : len(order) + 1] = losses(subject, held_out, order)
        parameters, kv_bytes = _weights(subject)
        return BlockInfluenceResult(
            alone=first.alone,
            at_end=np.stack([one.at_end for one in rounds]) if rounds else np.zeros((0, *first.alone.shape)),
            n_tokens=np.array([len(row) for row in calibration]),
            removed=removed,
            nll=nll,
            held_out_tokens=np.array([len(row) - 1 for row in held_out]),
            parameters=parameters,
            kv_bytes=kv_bytes,
            orders=tuple(name for name, _ in found),
            shape=tuple(vars(Shape.of(subject)).values()),
            by=self.by,
            n_drop=min(n, len(dict(found)[self.by])),
            seed=self.seed,
        )

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Six random blocks, two of which write nothing: both measures must drop these first, and lose nothing."""
        return _planted("two blocks that write nothing", seed, idle=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Six random blocks that all write: none can go for nothing."""
        return _planted("six blocks at work", seed, idle=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[BlockInfluence, list[str]]:
        texts = [text_of(subject.tokenizer, range(start, start + 14)) for start in range(8, 64, 14)]
        return cls(n_drop=2, n_random=2), texts

    def _texts(self, subject: Subject, data: Any) -> tuple[Ids, Ids]:
        """Token ids to calibrate on and to validate on."""
        if isinstance(data, str) or len(data) < 1 + self.validate:
            raise ValueError(
                f"BlockInfluence: got {data!r:.40}, expected at least {1 + self.validate} texts: every second one "
                "validates. With one alone set validate=False."
            )
        ids = subject.tokenize(data).ids
        return (ids[::2], ids[1::2]) if self.validate else (ids, [])

    def _allowed(self, subject: Subject) -> tuple[list[int], int]:
        """The blocks that may go, and how many shall."""
        left = blocks_left(subject)
        n = -(-len(left) // 4) if self.n_drop is None else self.n_drop
        if min(self.keep_first, self.keep_last, self.n_random) < 0:
            raise ValueError(f"BlockInfluence: got {self}, expected numbers of at least 0.")
        allowed = left[self.keep_first : len(left) - self.keep_last]
        if not 1 <= n <= min(len(allowed), len(left) - 1):
            raise ValueError(
                f"BlockInfluence: got n_drop={n}, keep_first={self.keep_first}, keep_last={self.keep_last}, but "
                f"{len(left)} blocks are there, of which one at least must stay."
            )
        reasons = [refusal(subject, [block]) for block in allowed]
        if all(reasons):
            raise ValueError(f"BlockInfluence: no block of {subject.name} can go. {reasons[0]}")
        return allowed, n

    def _controls(self, allowed: list[int]) -> list[tuple[str, list[int]]]:
        rng = np.random.default_rng(self.seed)
        return [(LAST, allowed[::-1]), *((RANDOM, rng.permutation(allowed).tolist()) for _ in range(self.n_random))]


def _weights(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """(block,) parameters of each block, and bytes that a token takes in its cache."""
    parameters, kv_bytes = (np.zeros(subject.n_layers, dtype=np.int64) for _ in range(2))
    for layer in blocks_left(subject):
        parameters[layer] = sum(parameter.numel() for parameter in block_of(subject, layer).parameters())
        if not is_dropped(attention_of(subject.model, subject.anatomy, layer)):
            numbers = 2 * len(groups_left(subject, layer)) * subject.anatomy.d_head
            kv_bytes[layer] = numbers * subject.dtype.itemsize
    return parameters, kv_bytes


IDLE = (1, 4)  # of six blocks


def _planted(name: str, seed: int, *, idle: bool) -> Planted:
    """The organism's untrained twin in float64, with uneven weights in the final norm: read after it, the stream would
    have other cosines."""
    model, tokenizer = tiny_pair("organism", seed)
    subject = Subject(model.double(), tokenizer, name=name, verify=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm = model.get_submodule(f"{subject.anatomy.trunk}.norm")
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=draw) * 2)  # type: ignore[operator]
        for block in IDLE if idle else ():
            for kind in ("heads", "neurons"):
                subject.anatomy.module(model, Site(block, kind)).weight.zero_()  # type: ignore[operator]
    ids = torch.randint(8, subject.anatomy.vocab, (8, 12), generator=draw).tolist()
    arrays = {"ids": np.array(ids), "idle": np.array(IDLE)}
    expectations = (
        Expectation("largest influence of an idle block", _largest, 0.0, 1e-12),
        Expectation("idle blocks among the first two", _found, 2.0, 2.0),
        Expectation("nats per token lost with the first two", _lost, -1e-12, 1e-12),
    )
    if not idle:
        expectations = (
            Expectation("smallest influence of a block", lambda r: float(_influences(r).min()), 1e-3, 2.0),
            Expectation("change of the loss with the first two", lambda r: abs(_lost(r)), 1e-6, np.inf),
        )
    return Planted(
        name, arrays, lambda: BlockInfluence(n_drop=2, n_random=1, seed=seed).measure(subject, ids), expectations
    )


def _influences(result: Any) -> np.ndarray:
    """(2, block) BI and MI."""
    return result.table()[["block_influence", "macro_influence"]].to_numpy().T


def _largest(result: Any) -> float:
    return float(_influences(result)[:, list(IDLE)].max())


def _found(result: Any) -> float:
    """The lower count of both measures."""
    return float(min(len(set(result.order(2, by)) & set(IDLE)) for by in (BLOCK, MACRO)))


def _lost(result: Any) -> float:
    return float(result.nll[result.orders.index(MACRO), 2].mean() - result.nll[0, 0].mean())
