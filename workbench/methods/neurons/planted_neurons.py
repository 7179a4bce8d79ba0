"""Simulated neurons whose token is known, and a net of one layer in which they write: truth for labels and clamps.

v_j = s sqrt(d) W_t / |W_t| + noise, one layer per strength s; logits = W (h + value v_j) / sqrt(d).
Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.methods.neurons.labelling import Score, prepared_rows
from workbench.methods.neurons.neuron_reading import Part
from workbench.site import Site

VOCAB, D_MODEL = 2000, 64


@dataclass(frozen=True, eq=False)
class World:
    """rows (layer, vocab, d_model), vectors (layer, neuron, d_model), truth (layer, neuron) the token of each vector.

    In the last layer ten rows are six times as long as the others: they win most dot products there.
    """

    rows: Tensor
    vectors: Tensor
    truth: Tensor
    strengths: tuple[float, ...]

    @classmethod
    def of(
        cls, seed: int, strengths: tuple[float, ...] = (4.0, 2.0, 1.5, 1.0, 0.75, 1.0), n_neurons: int = 256
    ) -> World:
        """A world of as many layers as strengths; strength 0 is a random vector."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(VOCAB, D_MODEL, generator=generator)
        long = rows.clone()
        long[torch.randperm(VOCAB, generator=generator)[:10]] *= 6
        shape = len(strengths), n_neurons
        truth = torch.randint(VOCAB, shape, generator=generator)
        signal = torch.nn.functional.normalize(rows[truth], dim=-1) * D_MODEL**0.5
        noise = torch.randn(*shape, D_MODEL, generator=generator)
        vectors = torch.tensor(strengths)[:, None, None] * signal + noise
        return cls(torch.stack([*[rows] * (len(strengths) - 1), long]), vectors, truth, strengths)

    def parts(self, score: Score) -> Iterator[Part]:
        """What a reading compares, layer by layer."""
        for vectors, rows in zip(self.vectors, self.rows, strict=True):
            yield Part(vectors, prepared_rows(rows, score))

    def hidden(self, seed: int, n_prompts: int = 8) -> Tensor:
        """(prompt, d_model) residual vectors that the net starts from."""
        return torch.randn(n_prompts, D_MODEL, generator=torch.Generator().manual_seed(seed + 1))

    def predict(self, hidden: Tensor, held: tuple[Site, int, float] | None) -> Tensor:
        """(prompt, vocab) log-probabilities of the net while a neuron is held at a value; None: no neuron acts."""
        if held is None:
            return (hidden @ self.rows[0].T / D_MODEL**0.5).log_softmax(-1)
        site, neuron, value = held
        pushed = hidden + value * self.vectors[site.layer, neuron]
        return (pushed @ self.rows[site.layer].T / D_MODEL**0.5).log_softmax(-1)
