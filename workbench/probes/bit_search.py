"""Which layers need how many bits in their key/value cache? Profile each layer, plan exactly, check by KL.

min sum_l w_l e_o[l, p_l] subject to mean bits <= cap, e_o the relative error of a layer's attention outputs while all
others are untouched. Source: KVTuner, Li et al., 2025 (arXiv 2502.04420); the exact search and the validation are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from workbench.cache.packed import WHOLE
from workbench.cache.packing import BITS
from workbench.cache.recording import Read, attention_seen, packable_layers
from workbench.generation import text_of
from workbench.methods.cache.bit_plans import BitSearchResult
from workbench.methods.cache.bit_profile import Layout, local_errors
from workbench.methods.cache.bit_world import brute_force, world
from workbench.methods.cache.bits import PAIRS, BitPlan, Pair, clusters, held_bits, pareto, random_choice, search
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds
from workbench.site import Site, sites
from workbench.toggles.quantize import QuantizeKV

if TYPE_CHECKING:
    from workbench.subject import Subject

BASE_BYTES = 1 << 30  # predictions of the unpacked side in memory while plans come and go
SLACK = 1e-9  # a cap is a float: 2 x layers x cap must not fall short of a whole number


@dataclass(frozen=True)
class BitSearch(Probe):
    """A plan of bits per layer, and what it costs. Data: texts, or rows of token ids.

    Every second text is held out to validate plans by KL; the others make the profile. Runs under other toggles: with
    key/value toggles among them, each layer and pair is measured by reading the texts again, which takes long.

    cap          mean bits per number of keys and values that the plan may cost
    budget       nominal: bits of codes alone, as papers count; accounted: bits really held at the length of the longest
                 text of the profile, with scales, minima, sinks and residual
    pairs        (key bits, value bits) to choose from; 16 leaves a side whole
    group, residual, sinks   as in `QuantizeKV`
    weights      of each layer's error in the sum; None: 1 each
    share        layers whose error curves differ by at most this share one choice (see `clusters`); None: none do
    validate     read held-out texts under the plan, its neighbours at cap +- 0.25, every uniform and some random plans
    sweep        further caps whose plans are validated
    n_random     random plans, spread over all the caps, and at most as many that deal the answer's pairs otherwise
    """

    cap: float = 4.0
    budget: Literal["nominal", "accounted"] = "nominal"
    pairs: tuple[Pair, ...] = PAIRS
    group: int = 32
    residual: int = 128
    sinks: int = 4
    weights: tuple[float, ...] | None = None
    share: float | None = None
    validate: bool = True
    sweep: tuple[float, ...] = ()
    n_random: int = 6
    seed: int = 0

    bounds: ClassVar[Bounds] = {"group": 1, "residual": 0, "sinks": 0, "n_random": 0}

    def __post_init__(self) -> None:
        if not self.pairs or any(len(pair) != 2 or not set(pair) <= {*BITS, WHOLE} for pair in self.pairs):
            raise ValueError(
                f"BitSearch: got pairs={self.pairs}, expected at least one (key bits, value bits), each 2, 4, 8 or 16."
            )
        object.__setattr__(self, "pairs", tuple((int(keys), int(values)) for keys, values in self.pairs))

    def measure(self, subject: Subject, data: Any) -> BitSearchResult:
        if self.budget == "accounted" and subject.stages:
            raise ValueError(
                f"BitSearch: got budget='accounted' under {subject.stages}, expected nominal: what a layer "
                "then holds is only known where nothing else acts on it."
            )
        calibration, held_out = self._texts(subject, data)
        layers, notes = _packable(subject)
        if not layers:  # nothing to search, and the untouched model is its own plan
            for _ in subject.predictions(held_out or calibration):
                pass  # read all the same: receipts of other toggles then tell whether they acted
            return self._alone(subject.n_layers, len(held_out), notes)
        errors = self._profile(subject, calibration, layers)
        shapes = _shapes(subject, calibration[0])
        tokens = max(map(len, calibration))
        held = None if subject.stages else self._held(shapes, subject.n_layers, tokens, 8 * subject.dtype.itemsize)
        result = self.planned(errors, layers, held, tuple(notes))
        if not self.validate:
            return result
        plans = [result.plan_of(number) for number in range(len(result.plan_kinds))]
        kl, counts = self._divergences(subject, held_out, plans)
        return replace(result, kl=kl, kl_tokens=counts)

    @property
    def layout(self) -> Layout:
        return Layout(self.group, self.residual, self.sinks)

    def toggle(self, plan: BitPlan) -> QuantizeKV:
        """The toggle that acts by a plan, packed as it was profiled."""
        return QuantizeKV(plan.key_bits, plan.value_bits, self.group, self.residual, self.sinks)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Four layers; in the first, one key in every group is huge, though no query looks at it: it needs key bits."""
        return _planted("key outliers in layer 0", _small(cls, seed), seed, outliers=True)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Four layers that are all the same: none deserves more bits than another."""
        return _planted("four equal layers", _small(cls, seed), seed, outliers=False)

    @classmethod
    def example(cls, subject: Subject) -> tuple[BitSearch, list[str]]:
        texts = [text_of(subject.tokenizer, range(start, start + 14)) for start in range(8, 64, 14)]
        return cls(pairs=((8, 8), (8, 4), (4, 8), (4, 4)), group=2, residual=1, sinks=1, n_random=1), texts

    # Searching

    def planned(
        self,
        errors: np.ndarray,
        layers: Sequence[int],
        held: np.ndarray | None,
        notes: tuple[str, ...] = (),
    ) -> BitSearchResult:
        """The result from a profile (text, layer, pair, measure) and what is held: (layer, pair, 2) bits and numbers.

        The plans are made and not yet validated.
        """
        n_layers, inside = errors.shape[1], list(layers)
        weights = np.ones(n_layers) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        if weights.shape != (n_layers,) or (weights < 0).any():
            raise ValueError(f"BitSearch: got weights {self.weights}, expected {n_layers} numbers of at least 0.")
        costs, per_cap = self._costs(n_layers, inside, held)
        e_o = errors[..., 0].mean(axis=0)
        groups = np.full(n_layers, -1)
        kept = np.array([pareto(*row) for row in zip(e_o[inside], costs[inside], strict=True)])
        groups[inside] = np.arange(len(inside)) if self.share is None else clusters(e_o[inside], kept, self.share)
        kinds, caps, plans = self._candidates(
            weights[inside, None] * e_o[inside], costs[inside], per_cap, groups[inside]
        )
        pairs = np.full((len(plans), n_layers, 2), WHOLE)
        pairs[:, inside] = np.array(self.pairs)[np.array(plans)]
        accounted = np.full(len(plans), np.nan)
        if held is not None:
            chosen = held[inside, :, 0][np.arange(len(inside)), np.array(plans)]  # (plan, layer)
            accounted = chosen.sum(axis=1) / held[inside, 0, 1].sum()
        return BitSearchResult(
            e_o=errors[..., 0].copy(), e_k=errors[..., 1].copy(), e_v=errors[..., 2].copy(), costs=costs,
            groups=groups, weights=weights, plan_pairs=pairs, plan_caps=np.array(caps), accounted=accounted,
            kl=np.zeros((len(plans), 0)), kl_tokens=np.zeros(0), pairs=self.pairs, layers=tuple(inside),
            plan_kinds=tuple(kinds), cap=self.cap, budget=self.budget, notes=notes, seed=self.seed,
        )  # fmt: skip

    def _costs(self, n_layers: int, inside: list[int], held: np.ndarray | None) -> tuple[np.ndarray, float]:
        """(layer, pair) costs in whole numbers, and the budget that one mean bit buys."""
        if self.budget == "nominal":
            return np.tile(np.sum(self.pairs, axis=1), (n_layers, 1)), 2.0 * len(inside)
        assert held is not None
        return held[..., 0], float(held[inside, 0, 1].sum())

    def _candidates(
        self, errors: np.ndarray, costs: np.ndarray, per_cap: float, groups: np.ndarray
    ) -> tuple[list[str], list[float], list[tuple[int, ...]]]:
        """Kind, cap and choice of every plan to compare, the answer first; a plan that comes again is left out."""
        least = costs.min(axis=1).sum() / per_cap
        if self.cap < least - SLACK:
            raise ValueError(
                f"BitSearch: got cap={self.cap}, but the cheapest pairs cost {least:.2f} bits. Allow more."
            )
        caps = [self.cap]
        if self.validate:
            caps += [cap for cap in (self.cap - 0.25, self.cap + 0.25, *self.sweep) if cap >= least - SLACK]
        found: dict[Any, tuple[int, ...]] = {
            ("searched", cap): search(errors, costs, math.floor(cap * per_cap + SLACK), groups) for cap in caps
        }
        if self.validate:
            found |= {("uniform", float("nan"), p): (p,) * len(costs) for p in range(costs.shape[1])}
            rng = np.random.default_rng(self.seed)
            answer = found["searched", self.cap]
            for number in range(self.n_random if len(set(answer)) > 1 else 0):
                found["shuffled", self.cap, number] = tuple(map(int, rng.permutation(answer)))
            for number in range(self.n_random):
                cap = caps[number % len(caps)]
                found["random", cap, number] = random_choice(costs, math.floor(cap * per_cap + SLACK), rng)
        seen: dict[tuple[str, tuple[int, ...]], float] = {}
        for (kind, cap, *_), plan in found.items():
            if kind != "shuffled" or plan != found["searched", self.cap]:
                seen.setdefault((kind, plan), cap)
        return [kind for kind, _ in seen], list(seen.values()), [plan for _, plan in seen]

    # Reading

    def _texts(self, subject: Subject, data: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids to calibrate on and to validate on."""
        if isinstance(data, str) or len(data) < 1 + self.validate:
            raise ValueError(
                f"BitSearch: got {data!r:.40}, expected at least {1 + self.validate} texts: every second one validates "
                "plans. With one alone set validate=False."
            )
        ids = [list(row) for row in subject.tokenize(data).ids]
        start = self.layout.start(self.pairs)
        short = min(map(len, ids))
        if short <= start:
            raise ValueError(
                f"BitSearch: got a text of {short} tokens, of which nothing would be packed for some pair. "
                f"Give more than {start} (sinks, residual and the largest unit), or set a smaller group or residual."
            )
        return (ids[::2], ids[1::2]) if self.validate else (ids, [])

    def _profile(self, subject: Subject, texts: list[list[int]], layers: Sequence[int]) -> np.ndarray:
        """(text, layer, pair, measure) errors."""
        errors = np.full((len(texts), subject.n_layers, len(self.pairs), 3), np.nan)
        for number, text in enumerate(texts):
            if subject.stages:
                errors[number, ..., 0] = errors_by_reading(self, subject, text, layers)
                continue

            def see(read: Read, into: np.ndarray = errors[number]) -> None:
                if read.layer in layers:
                    options = {"scaling": read.scaling, "soft_cap": read.soft_cap}
                    tensors = (read.query[0], read.keys[0], read.values[0])
                    into[read.layer] = local_errors(*tensors, self.pairs, self.layout, **options)

            with attention_seen(subject, see):
                _forward(subject, text)
        return errors

    def _held(self, shapes: dict[int, tuple[int, int, int]], n_layers: int, tokens: int, whole: int) -> np.ndarray:
        """(layer, pair, 2) bits that a layer holds of so many tokens, and numbers that they stand for."""
        options = {"group": self.group, "residual": self.residual, "sinks": self.sinks, "whole": whole}
        rows = [
            [
                (held_bits(pair, tokens, shape, **options), tokens * shape[0] * (shape[1] + shape[2]))
                for pair in self.pairs
            ]
            for shape in (shapes.get(layer, (0, 0, 0)) for layer in range(n_layers))  # recurrent layers have none
        ]
        return np.array(rows, dtype=np.int64)

    def _divergences(
        self, subject: Subject, texts: list[list[int]], plans: Sequence[BitPlan]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(plan, text) mean KL, and (text,) tokens, over the tokens that see something packed under every plan."""
        start = self.layout.start(self.pairs)
        kl = np.zeros((len(plans), len(texts)))
        for rows in _chunks(texts, start, subject.model.config.get_text_config().vocab_size):
            chunk = [texts[row] for row in rows]
            base = {rows[i]: logprobs[start:].cpu() for i, _, logprobs in subject.predictions(chunk)}
            for number, plan in enumerate(plans):
                with subject.under(self.toggle(plan)), self._in_pieces(subject):
                    for i, _, logprobs in subject.predictions(chunk):
                        kl[number, rows[i]] = _divergence(base[rows[i]], logprobs[start:].cpu())
        return kl, np.array([len(text) - start for text in texts], dtype=np.float64)

    @contextmanager
    def _in_pieces(self, subject: Subject) -> Iterator[None]:
        """Read so many tokens at once that every query still sees packed what it would see token by token.

        Packing happens where T - S - R is a multiple of a unit; no piece begins before such a place and ends after it.
        """
        stages = subject.stages
        before = stages.piece
        if set(stages.receipts) == {"store"}:  # other stages have clocks of their own
            stages.piece = math.gcd(self.sinks + self.residual, self.group)
        try:
            yield
        finally:
            stages.piece = before

    def _alone(self, n_layers: int, n_texts: int, notes: Sequence[str]) -> BitSearchResult:
        """What is said of a model without a layer to pack."""
        nothing = np.full((1, n_layers, len(self.pairs)), np.nan)
        return BitSearchResult(
            e_o=nothing, e_k=nothing, e_v=nothing, costs=np.tile(np.sum(self.pairs, axis=1), (n_layers, 1)),
            groups=np.full(n_layers, -1), weights=np.ones(n_layers), plan_pairs=np.full((1, n_layers, 2), WHOLE),
            plan_caps=np.array([self.cap]), accounted=np.full(1, np.nan), kl=np.zeros((1, n_texts)),
            kl_tokens=np.ones(n_texts), pairs=self.pairs, layers=(), plan_kinds=("searched",), cap=self.cap,
            budget=self.budget, notes=tuple(notes), seed=self.seed,
        )  # fmt: skip


def search_bits(subject: Subject, data: Any, cap: float = 4.0, **settings: Any) -> BitPlan:
    """The best plan within `cap` mean bits by its summed error on `data`, all of which makes the profile.

    Settings as in `BitSearch`, which also says what the plan costs in KL.
    """
    probe = BitSearch(cap=cap, validate=False, **settings)
    result = probe.run(subject, data)
    assert isinstance(result, BitSearchResult)
    return result.plan


@torch.no_grad()
def errors_by_reading(probe: BitSearch, subject: Subject, text: list[int], layers: Sequence[int]) -> np.ndarray:
    """(layer, pair) e_o by its definition: read the text with one layer packed at a time. Slow, under any toggle."""
    start, errors = probe.layout.start(probe.pairs), np.full((subject.n_layers, len(probe.pairs)), np.nan)
    base = subject.capture([text], sites(layers, "heads"), progress=False)
    for layer, (number, (keys, values)) in product(layers, enumerate(probe.pairs)):
        pairs = [(WHOLE, WHOLE)] * subject.n_layers
        pairs[layer] = (keys, values)
        site = Site(layer, "heads")
        with subject.under(probe.toggle(BitPlan(tuple(pairs)))):
            packed = subject.capture([text], [site], progress=False)
        before, after = (one[site][start:].double().flatten(1) for one in (base, packed))
        norm = before.norm(dim=-1)
        errors[layer, number] = float(((after - before).norm(dim=-1) / norm).where(norm > 0, 0.0).mean())
    return errors


def _packable(subject: Subject) -> tuple[tuple[int, ...], list[str]]:
    """The layers that can be packed, and what is to be said of the others."""
    try:
        layers = packable_layers(subject)
    except ValueError as refusal:  # a model whose attention can't be reached has no layer to pack
        return (), [str(refusal)]
    alone = subject.n_layers - len(layers)
    return layers, [f"{alone} sliding-window or recurrent layers left alone"] if alone else []


def _forward(subject: Subject, text: list[int]) -> None:
    """One forward, of which next to nothing is kept."""
    subject.capture([text], [Site(0, "resid_out")], tokens="last", progress=False)


def _shapes(subject: Subject, text: list[int]) -> dict[int, tuple[int, int, int]]:
    """Key/value heads, key width and value width of each layer."""
    found: dict[int, tuple[int, int, int]] = {}

    def see(read: Read) -> None:
        found[read.layer] = (read.keys.shape[1], read.keys.shape[3], read.values.shape[3])

    with subject.untoggled(), attention_seen(subject, see):
        _forward(subject, text[:2])
    return found


def _chunks(texts: list[list[int]], start: int, vocab: int) -> Iterator[list[int]]:
    """Numbers of texts whose predictions together fit into BASE_BYTES."""
    chunk: list[int] = []
    size = 0
    for row, text in enumerate(texts):
        new = 4 * vocab * (len(text) - start)
        if chunk and size + new > BASE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += new
    yield chunk


def _divergence(base: Tensor, packed: Tensor) -> float:
    """Mean over tokens of KL(base || packed), in float64."""
    before, after = base.double(), packed.double()
    return float(torch.where(before.exp() > 0, before.exp() * (before - after), 0.0).sum(-1).mean())


# Worlds whose truth is known


def solved(layers: Sequence[tuple[Tensor, Tensor, Tensor]], probe: BitSearch) -> BitSearchResult:
    """What `probe` finds in layers given as tensors."""
    errors = np.stack([local_errors(*tensors, probe.pairs, probe.layout) for tensors in layers])[None]
    return probe.planned(errors, range(len(layers)), None)


def _small(cls: type[BitSearch], seed: int) -> BitSearch:
    return cls(group=8, residual=8, sinks=2, validate=False, seed=seed)


def _planted(name: str, probe: BitSearch, seed: int, *, outliers: bool) -> Planted:
    layers = world(seed, outliers=outliers)

    def key_bits(result: Any) -> np.ndarray:
        return result.plan_pairs[0, :, 0].astype(float)

    def regret(result: Any) -> float:
        exact = brute_force(result.e_o.mean(axis=0), result.costs, 2 * len(layers) * probe.cap)
        return float(result.surrogate()[0] - exact)

    def keys_before_values(result: Any) -> float:
        e_o = result.e_o.mean(axis=0)[0]
        return float(e_o[probe.pairs.index((4, 8))] / e_o[probe.pairs.index((8, 4))])

    def mean_bits(result: Any) -> float:
        return result.plan.mean_bits

    def different_pairs(result: Any) -> float:
        return float(len(set(result.plan.pairs)))

    expectations = [
        Expectation("error above brute force over all plans", regret, -1e-9, 1e-9),  # FINE rounds at 1e-12
        Expectation("mean bits", mean_bits, 0.0, probe.cap),
    ]
    if outliers:
        expectations += [
            Expectation(
                "key bits of layer 0 over the most elsewhere", lambda r: key_bits(r)[0] / key_bits(r)[1:].max(), 2, 4
            ),
            Expectation("layer 0: error of K4V8 over that of K8V4", keys_before_values, 1.5, np.inf),
        ]
    else:
        expectations.append(Expectation("different pairs in the plan", different_pairs, 1, 1))
    arrays = {f"keys of layer {n}": keys.numpy() for n, (_, keys, _) in enumerate(layers)}
    return Planted(name, arrays, lambda: solved(layers, probe), tuple(expectations))
