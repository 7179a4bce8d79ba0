"""When should a sparse cache move to the CPU, and when is a token cheaper to compute again than to fetch?

Of t tokens each step wants r t / 2 old ones, and the share (t - M) / t of them is not on the GPU: m(t) = r (t - M) / 2.
Source: ALISA, Zhao et al., 2024 (arXiv 2403.17312), three phases; this closed form in place of its offline search is
ours, as is `inputs_per_cache`, the price that recomputing from stored inputs has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Phase = Literal["on the GPU", "fetched", "recomputed"]


@dataclass(frozen=True)
class AlisaPlan:
    """Three phases of decoding one sequence: everything on the GPU; the rest fetched; some of the rest recomputed.

    on_gpu             tokens M whose keys and values fit on the GPU
    keep               share r of all tokens that a step attends to, half of them the newest
    compute_s          seconds t_c of one decoding step, behind which fetching hides
    fetch_s            seconds to fetch one token        recompute_s   seconds to compute its keys and values again
    inputs_per_cache   numbers of a token's layer inputs per number of its keys and values; None: not known
    """

    on_gpu: int
    keep: float
    compute_s: float
    fetch_s: float
    recompute_s: float
    inputs_per_cache: float | None = None

    def __post_init__(self) -> None:
        if self.on_gpu < 1 or not 0 < self.keep <= 1:
            raise ValueError(
                f"AlisaPlan: got on_gpu={self.on_gpu} and keep={self.keep}, expected at least 1 token and a share "
                "above 0 and up to 1."
            )
        if min(self.compute_s, self.fetch_s, self.recompute_s) <= 0:
            raise ValueError(
                f"AlisaPlan: got compute_s={self.compute_s}, fetch_s={self.fetch_s}, recompute_s={self.recompute_s}, "
                "expected seconds above 0."
            )

    @classmethod
    def of(
        cls,
        *,
        n_layers: int,
        n_kv_heads: int,
        d_head: int,
        d_model: int,
        on_gpu: int,
        keep: float,
        compute_s: float,
        bytes_per_s: float,
        flops_per_s: float,
        bytes_per_number: float = 2.0,
    ) -> AlisaPlan:
        """The plan of a model's shape: fetching 2 L H D numbers, or computing them by 4 L d H D operations, each."""
        numbers = 2 * n_layers * n_kv_heads * d_head
        return cls(
            on_gpu=on_gpu,
            keep=keep,
            compute_s=compute_s,
            fetch_s=numbers * bytes_per_number / bytes_per_s,
            recompute_s=2 * d_model * numbers / flops_per_s,
            inputs_per_cache=d_model / (2 * n_kv_heads * d_head),
        )

    @property
    def fetching_from(self) -> int:
        """p1: the first length at which not all tokens fit on the GPU."""
        return self.on_gpu + 1

    @property
    def recomputing_from(self) -> int:
        """p2: the first length at which fetching takes longer than a step computes."""
        tokens = self.on_gpu + math.floor(2 * self.compute_s / (self.keep * self.fetch_s))
        while self.missing(tokens) * self.fetch_s <= self.compute_s:
            tokens += 1
        return tokens

    @property
    def recomputed_share(self) -> float:
        """beta: the share of missing tokens to recompute once texts are so long that both pipes are always full."""
        return self.fetch_s / (self.fetch_s + self.recompute_s)

    def phase(self, tokens: int) -> Phase:
        """What is done about missing tokens at a length."""
        if tokens < self.fetching_from:
            return "on the GPU"
        return "fetched" if tokens < self.recomputing_from else "recomputed"

    def missing(self, tokens: int) -> float:
        """m(t): tokens that a step wants and the GPU lacks, on average."""
        return self.keep / 2 * max(0, tokens - self.on_gpu)

    def recomputed(self, tokens: int) -> float:
        """The share of missing tokens that ends computing and fetching together: 0 at p2, towards beta with length.

        The GPU is busy with the step itself too: t_c + b m t_r = (1 - b) m t_f.
        """
        if self.phase(tokens) != "recomputed":
            return 0.0
        each = self.fetch_s + self.recompute_s
        return self.recomputed_share - self.compute_s / (self.missing(tokens) * each)

    def step_s(self, tokens: int) -> float:
        """Seconds of one decoding step: the slower of the GPU and the bus."""
        again, missing = self.recomputed(tokens), self.missing(tokens)
        return max(self.compute_s + again * missing * self.recompute_s, (1 - again) * missing * self.fetch_s)

    @property
    def assumption(self) -> str:
        """What recomputing takes for granted, in words."""
        text = (
            "Recomputing a token's keys and values needs its input to every layer, which must be stored on the GPU "
            "(or else all layers below are computed again, which is not counted here)"
        )
        if self.inputs_per_cache is None:
            return f"{text}."
        saved = 1 - self.inputs_per_cache
        verdict = f"this saves {saved:.0%} of their memory" if saved > 0 else "this saves no memory"
        return f"{text}; for this shape inputs are {self.inputs_per_cache:g} times the keys and values: {verdict}."

    def __str__(self) -> str:
        return (
            f"Up to {self.on_gpu} tokens all on the GPU, from {self.fetching_from} on the missing ones fetched, from "
            f"{self.recomputing_from} on up to {self.recomputed_share:.0%} of them recomputed. {self.assumption}"
        )
