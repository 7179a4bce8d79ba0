"""Dice that can be thrown again: sampling noise that is a function of seed, row, position and token, not of a state.

token = argmax_i (log p_i + g_i), g_i = -log(-log u_i), u_i = hash(seed, row, position, i)   (Gumbel-max)
Sources: Chatzi et al., 2024 (arXiv 2409.17027): the counterfactual use; Steele et al., 2014 (SplitMix64): the hash.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Sampler = Literal["full", "top_k", "top_p", "rank", "inverse_cdf"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
AT_ONCE, AT_ONCE_CPU = 2**24, 2**17  # entries (row, token) in work together: 128 MB per array; 1 MB, to stay in caches


@dataclass(frozen=True)
class Dice:
    """One throw per (row, position): the same throw in any batch, in any order, on any device, for any model.

    sampler      how a throw becomes a token. "full", "top_k", "top_p": Gumbel-max with noise by token id, over all
                 tokens or those that truncation leaves; "rank": Gumbel-max with noise by rank; "inverse_cdf": one
                 uniform, ids in order. Full, rank and inverse_cdf sample the same distribution; they differ in what
                 they choose when it changes.
    temperature  0 is greedy: no throw
    top_k, top_p for the samplers of these names; tokens that tie with the last one kept are kept
    """

    seed: int = 0
    sampler: Sampler = "full"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def choose(
        self, logits: Float[Tensor, "batch vocab"], rows: Sequence[int] | Tensor, positions: Int[Tensor, " batch"]
    ) -> Int[Tensor, " batch"]:
        """The token of each row, for the logits of the token at its logical position.

        rows   the index of each sample, given by the user: it names the throw, the place in the batch doesn't
        Penalties on repetition must be in the logits already. Raises ValueError for settings that make no sense.
        """
        self.check()
        if self.temperature == 0:
            return logits.argmax(-1)
        rows = torch.as_tensor(rows, device=logits.device)
        if not len(rows) == len(positions) == len(logits):
            raise ValueError(
                f"Dice: got {len(rows)} rows and {len(positions)} positions for {len(logits)} samples, "
                "expected one of each per sample."
            )
        step = max(1, (AT_ONCE_CPU if logits.device.type == "cpu" else AT_ONCE) // logits.shape[-1])
        parts = zip(logits.split(step), rows.split(step), positions.to(logits.device).split(step), strict=True)
        return torch.cat([self._choose(*part) for part in parts])

    def processor(
        self, rows: Sequence[int], padding: Sequence[int] | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The dice as a logits processor for `model.generate(..., do_sample=False)`: only the chosen token is left.

        rows as in `choose`, one per sequence; padding: tokens on the left of each prompt that are not real (0).
        """
        gaps = torch.tensor([0] * len(rows) if padding is None else list(padding))

        def leave_one(ids: Tensor, scores: Tensor) -> Tensor:
            chosen = self.choose(scores, rows, ids.shape[1] - gaps)
            return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)

        return leave_one

    def check(self) -> None:
        """ValueError for settings that make no sense."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"Dice: got sampler {self.sampler!r}, expected one of {', '.join(SAMPLERS)}.")
        if not isinstance(self.seed, Integral):
            raise ValueError(f"Dice: got seed {self.seed!r}, expected a whole number.")
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"Dice: got temperature {self.temperature!r}, expected 0 (greedy) or a positive number.")
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if (value is None) == (self.sampler == name):
                wanted = "a number" if value is None else "None"
                raise ValueError(f"Dice: got {name}={value} with sampler {self.sampler!r}, expected {wanted}.")
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or self.top_k < 1):
            raise ValueError(f"Dice: got top_k={self.top_k!r}, expected a whole number of at least 1.")
        if self.top_p is not None and (not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1):
            raise ValueError(f"Dice: got top_p={self.top_p!r}, expected a share above 0 and at most 1.")

    def log_probs(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Log-probabilities in float64 that the dice sample from, after temperature and truncation."""
        self.check()
        if self.temperature == 0:
            certain = torch.full_like(logits, -torch.inf, dtype=torch.float64)
            return certain.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        flat = logits.double().reshape(-1, logits.shape[-1]) / self.temperature
        if self._truncates(flat.shape[-1]):
            ids, values = self._kept(flat)
            flat = torch.full_like(flat, -torch.inf).scatter(1, ids, values)
        return flat.log_softmax(-1).reshape(logits.shape)

    def _choose(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        scores = logits.double() / self.temperature  # (batch, vocab); Gumbel-max needs no normalisation
        if self.sampler == "inverse_cdf":
            mass = scores.softmax(-1).cumsum(-1)
            level = uniform(self.seed, rows, positions, torch.tensor([-1], device=logits.device)) * mass[:, -1:]
            last = torch.searchsorted(mass, mass[:, -1:].contiguous())  # should the product round up to the whole mass
            return torch.minimum(torch.searchsorted(mass, level, right=True), last)[:, 0]
        if self.sampler == "rank":
            scores, ids = scores.sort(descending=True, stable=True)
        elif self._truncates(scores.shape[-1]):
            ids, scores = self._kept(scores)  # (batch, kept): no other token is hashed
        else:
            ids = torch.arange(scores.shape[-1], device=scores.device)
        counters = torch.arange(ids.shape[-1], device=ids.device) if self.sampler == "rank" else ids
        best = (scores + gumbel(self.seed, rows, positions, counters)).argmax(-1, keepdim=True)
        return ids.expand_as(scores).gather(1, best)[:, 0]

    def _truncates(self, vocab: int) -> bool:
        return (self.top_k or vocab) < vocab or (self.top_p or 1.0) < 1.0

    def _kept(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, kept) ids and scores of the tokens that truncation leaves; -inf where a row keeps fewer."""
        vocab, total = scores.shape[-1], scores.logsumexp(-1, keepdim=True)
        size = min(vocab, self.top_k + 1 if self.top_k else 64)
        while True:  # a few of the largest scores nearly always hold the nucleus: sorting all would cost more
            values, ids = scores.topk(size)
            if self.top_k:
                lowest = values[:, self.top_k - 1 : self.top_k]
            else:
                mass = (values - total).exp().cumsum(-1)
                last = (mass < float(self.top_p or 1)).sum(-1, keepdim=True)  # the token that brings the mass to top_p
                lowest = torch.where(last < size, values.gather(1, last.clamp_max(size - 1)), -torch.inf)
            if size == vocab or bool((values[:, -1:] < lowest).all()):  # all ties with the last one are in
                return ids, values.masked_fill(values < lowest, -torch.inf)
            size = min(vocab, 16 * size)


def gumbel(seed: int, rows: Tensor, positions: Tensor, ids: Tensor) -> Float[Tensor, "batch n"]:
    """Standard Gumbel noise in float64: mean 0.5772 and variance 1.6449. Shapes as in `uniform`."""
    return uniform(seed, rows, positions, ids).log_().neg_().log_().neg_()


def uniform(seed: int, rows: Tensor, positions: Tensor, ids: Tensor) -> Float[Tensor, "batch n"]:
    """Numbers in (0, 1), never 0 or 1: a hash of seed, row and position (batch,), and ids (n,) or (batch, n).

    The integers are the same on every device. (k + 0.5) / 2^52 with 52 bits k: with 53 the largest would round to 1.
    """
    word = torch.full_like(rows, _signed(operator.index(seed) % 2**64), dtype=torch.int64)
    state = _draw(_draw(_draw(torch.zeros_like(word), word), rows.long()), positions.long())[:, None]  # (batch, 1)
    bits = _draw(state, ids.long()) >> 12  # (batch, n)
    return bits.bitwise_and_(2**52 - 1).double().add_(0.5).mul_(2.0**-52)


def _draw(state: Tensor, counter: Tensor) -> Tensor:
    """Number `counter` of the SplitMix64 stream that starts at `state`; int64 products wrap modulo 2^64."""
    z = state + (counter + 1) * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z ^= (z >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # >> copies the sign bit; the mask makes it logical
        z *= factor
    z ^= (z >> 31).bitwise_and_(2**33 - 1)
    return z


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits: torch has no unsigned arithmetic of that width."""
    return word - 2**64 if word >= 2**63 else word


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
