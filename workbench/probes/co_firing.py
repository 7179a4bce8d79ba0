"""Do the neurons of each layer fire in groups, so that a router could switch most of them off for a token?

Half of the texts make the experts, the other half tells what is lost, beside experts of neurons drawn by lot.
Source: CMoE, Pei et al., 2025 (arXiv 2502.04416); see `workbench.methods.pruning.co_firing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from workbench.generation import text_of
from workbench.methods.pruning.co_firing import CoFiringResult, layer_facts
from workbench.methods.pruning.experts import Experts, carve, router_scores, selected
from workbench.methods.pruning.ffn_weights import FFNWeights, Rows, ffn_inputs
from workbench.probe import Expectation, Planted, Probe
from workbench.settings import Bounds

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class CoFiring(Probe):
    """Data: texts, at least two. Layers are read as they are: unlike in CarveMoE, none is carved behind another.

    experts, shared   as for `CarveMoE.carve`        layers   None: all        lots   how many controls are drawn
    tokens            of each half of the texts that count
    """

    experts: int = 8
    shared: int = 2
    layers: tuple[int, ...] | None = None
    lots: int = 3
    tokens: int = 2048
    cut: bool = False
    seed: int = 0

    bounds: ClassVar[Bounds] = {"experts": 1, "shared": 0, "layers": 0, "lots": 1, "tokens": 1}

    def measure(self, subject: Subject, data: Sequence[str]) -> CoFiringResult:
        ids = subject.tokenize(data if isinstance(data, str) else list(data), cut=self.cut).ids
        if len(ids) < 2:
            raise ValueError(f"CoFiring: got {len(ids)} text, expected at least two: one half is held out.")
        tables = []
        for layer in range(subject.n_layers) if self.layers is None else self.layers:
            weights = FFNWeights.of(subject, layer)
            seen, unseen = (ffn_inputs(subject, ids[half::2], layer, self.tokens, self.seed) for half in (0, 1))
            numbers = weights.units.tolist()
            tables.append(self._facts(weights, numbers, seen, unseen, layer))
        return CoFiringResult(facts=pd.concat(tables, ignore_index=True), seed=self.seed)

    def _facts(self, weights: FFNWeights, numbers: list[int], seen: Tensor, unseen: Tensor, layer: int) -> pd.DataFrame:
        normed = weights.said(seen, normed=True).float().cpu()
        experts = carve(normed, numbers, layer=layer, experts=self.experts, shared=self.shared)
        said, down = weights.said(unseen).float().cpu(), weights.down.float().cpu()
        return layer_facts(said, down, experts, partial(_ranked, weights, unseen), self.lots, self.seed)

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Neurons in six blocks, each of which fires for one topic only, and 24 that always fire."""
        return _planted("six blocks", seed, spread=0.0, low=0.8, high=1.0)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Neurons that fire each for itself: experts are no better than lots."""
        return _planted("no blocks", seed, spread=1.0, low=-0.15, high=0.3)

    @classmethod
    def example(cls, subject: Subject) -> tuple[CoFiring, list[str]]:
        texts = [text_of(subject.tokenizer, range(start, start + 16)) for start in (8, 30, 60, 90)]
        return cls(experts=6, shared=1, lots=2), texts


def _ranked(weights: FFNWeights, x: Tensor, experts: Experts) -> Tensor:
    """(token, expert) the routed experts, the best first."""
    places = torch.searchsorted(weights.units, torch.tensor(experts.switches)).to(x.device)
    gate = None if weights.gate is None else weights.gate.take(places).normed(x)
    scores = router_scores(gate, weights.up.take(places).normed(x), weights.act)
    return selected(scores, len(experts.experts)).cpu()


def _planted(name: str, seed: int, *, spread: float, low: float, high: float) -> Planted:
    """96 neurons in 64 dims. spread 0: rows of a block are one direction; 1: each neuron has a direction of its own."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    directions, own = torch.linalg.qr(noise(64, 64))[0], nn.functional.normalize(noise(96, 64), dim=1)
    block = torch.arange(96).sub(12).div(12, rounding_mode="floor").clamp_min(0)  # 24 of block 0, 12 of each other
    rows = nn.functional.normalize((1 - spread) * directions[block] + spread * own, dim=1)
    gate, up, down = rows + 0.02 * noise(96, 64), rows + 0.02 * noise(96, 64), noise(64, 96)
    topic = torch.randint(1, 7, (2000,), generator=generator)
    x = 8 * (1 - spread) * (directions[0] + directions[topic]) + (0.5 + spread) * noise(2000, 64)
    weights = FFNWeights(torch.arange(96), Rows(gate, None), Rows(up, None), down, None, nn.SiLU())

    def solve() -> CoFiringResult:
        facts = CoFiring(seed=seed)._facts(weights, list(range(96)), x[::2], x[1::2], 0)
        return CoFiringResult(facts=facts, seed=seed)

    def at(active: int, result: Any) -> float:
        facts = result.facts.set_index(["experts", "active"])["error"].unstack(0)
        return float(1 - facts.iloc[active, 1] / facts.iloc[active, 0])

    def rest(result: Any) -> float:
        return float(result.facts.loc[result.facts["active"] == 6, "error"].max())

    tests = (
        Expectation("error saved against lots, one expert active", partial(at, 1), low, high),
        Expectation("error with all experts", rest, 0.0, 1e-12),
    )
    return Planted(name, {"x": x.numpy(), "gate": gate.numpy(), "up": up.numpy(), "down": down.numpy()}, solve, tests)
