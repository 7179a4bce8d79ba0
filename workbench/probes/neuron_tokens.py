"""What does a neuron say? The tokens whose unembedding rows its weights point at, from weights alone; then a check.

label(j) = argmax_t cos(W_t, v_j), v_j what neuron j reads (up row) or writes (down column), with the norms folded in.
Source: Davies, 2025, "Flash Interpretability" (arXiv 2501.02688); cosine, both sides, both signs and the null are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench.generation import text_of
from workbench.methods.neurons.clamping import Claim, clamp_table, monotone, strongest_claims
from workbench.methods.neurons.labelling import Score
from workbench.methods.neurons.labels import NeuronTokensResult
from workbench.methods.neurons.neuron_reading import Reading
from workbench.methods.neurons.neuron_weights import Side, neuron_vectors
from workbench.methods.neurons.planted_neurons import World
from workbench.probe import Expectation, Planted, Probe
from workbench.site import Site
from workbench.toggles import Clamp

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class NeuronTokens(Probe):
    """Labels every MLP neuron with tokens. Data: None, or prompts on which the best labels are checked by clamping.

    mode        "corrected": our choices; "paper": as published. It decides every setting below that is None:
    sides       of "read" (up row), "gate" (gate row), "write" (down column); read and write, read in mode "paper"
    score       "cosine"; "dot" (mode "paper": a few long rows win most labels); "centred": cosine, mean row taken out
    fold_norm   the norm's weight before the MLP into what a neuron reads, those behind it into what it writes and into
                the unembedding; True, False in mode "paper". LayerNorm's subtraction of the mean is not folded
    signs       "both", "+" or "-" (the vector times -1): in gated MLPs a neuron is negative as often as positive
    clamp_at    what the check holds: "neurons"; "up" in mode "paper", which does nothing where the gate is shut
    k           tokens kept per vector              layers   None: all
    n_random    random vectors behind each layer's null line; the line is their 99.9 % quantile
    clamped_per_layer, pushes   how many neurons are checked, and how hard they push, in lengths of the residual stream
    """

    mode: Literal["corrected", "paper"] = "corrected"
    sides: tuple[Side, ...] | None = None
    score: Score | None = None
    fold_norm: bool | None = None
    signs: Literal["both", "+", "-"] | None = None
    clamp_at: Literal["neurons", "up"] | None = None
    k: int = 10
    layers: tuple[int, ...] | None = None
    n_random: int = 10_000
    clamped_per_layer: int = 2
    pushes: tuple[float, ...] = (-1.0, 0.0, 0.5, 1.0, 2.0)
    seed: int = 0

    def measure(self, subject: Subject, data: Sequence[str] | None) -> NeuronTokensResult:
        reading, prompts = Reading.of(self), _prompts(data)
        layers = tuple(range(subject.n_layers)) if self.layers is None else self.layers
        if not layers or not self.pushes or self.clamped_per_layer < 1:
            raise ValueError(
                f"NeuronTokens: got layers={layers}, pushes={self.pushes}, clamped_per_layer={self.clamped_per_layer}, "
                "expected at least one of each."
            )
        result = reading.labels_of(subject, layers)
        if not prompts:
            return result
        return replace(result, clamps=self._checked(subject, prompts, result, reading))

    @classmethod
    def planted(cls, seed: int = 0) -> Planted:
        """Neurons made from known rows with less and less signal, and once beside ten long rows; cosine finds them."""
        world = World.of(seed)

        def right(layer: int, found: Any) -> float:
            truth = world.truth[layer].numpy()
            return float((found.top_token[layer, : len(truth), 0, 0, 0] == truth).mean())

        tests = [
            Expectation(
                f"right labels in layer {layer}, strength {s:g}", partial(right, layer), 1 if s >= 1 else 0.95, 1
            )
            for layer, s in enumerate(world.strengths)
        ]
        tests.append(Expectation("neurons whose token gains with every push", _gaining, 1.0, 1.0))
        return _planted("planted", world, cls(sides=("write",), signs="+", k=2, n_random=2000, seed=seed), tests)

    @classmethod
    def null(cls, seed: int = 0) -> Planted:
        """Random neurons: labels spread over the vocabulary, and 1 in 1000 lies above the null line."""
        world = World.of(seed, strengths=(0.0,) * 6, n_neurons=4000)

        def distinct(found: Any) -> float:
            return len(np.unique(found.top_token[0, :2000, 0, 0, 0]))

        tests = [
            # .001 by definition; line and share each rest on 24,000 vectors: together a standard error of .0003
            Expectation("share above the null line", _labelled, 0.0002, 0.0018),
            Expectation("distinct labels of 2000 neurons", distinct, 1200, 1350),
        ]
        return _planted("null", world, cls(sides=("write",), signs="+", k=2, n_random=24_000, seed=seed), tests)

    @classmethod
    def example(cls, subject: Subject) -> tuple[NeuronTokens, list[str]]:
        prompts = [text_of(subject.tokenizer, range(start, start + 5)) for start in (8, 20)]
        return cls(k=3, n_random=500, clamped_per_layer=1, pushes=(0.0, 1.0)), prompts

    def _checked(
        self, subject: Subject, prompts: list[str], result: NeuronTokensResult, reading: Reading
    ) -> pd.DataFrame:
        """The best labels of each layer under `Clamp`, beside whatever toggles are active."""
        side = result.sides.index("write") if "write" in result.sides else 0
        claims: list[Claim] = []
        for i, layer in enumerate(result.layers):
            site = Site(layer, reading.clamp_at)
            subject.anatomy.place(site)
            tokens = result.top_token[i, :, side, :, 0]  # (neuron, sign)
            best = strongest_claims(result.strength()[i, :, side], tokens, result.signs, site, self.clamped_per_layer)
            claims += [replace(claim, token=result.words(np.array([claim.token_id]))[0]) for claim in best]

        def read(held: tuple[Site, int, float] | None) -> Tensor:
            if held is None:
                return _last_logprobs(subject, prompts)
            site, neuron, value = held
            with subject.under(Clamp(((site, (neuron,)),), value)):
                return _last_logprobs(subject, prompts)

        at = {layer: Site(layer, "resid_out") for layer in result.layers}
        streams = subject.capture(prompts, list(at.values()), tokens="last", progress=False)
        lengths = {layer: float(streams[site].double().norm(dim=1).mean()) for layer, site in at.items()}

        def written(layer: int) -> np.ndarray:
            return neuron_vectors(subject, layer, "write").double().norm(dim=1).cpu().numpy()

        return clamp_table(read, claims, self.pushes, written, lengths.__getitem__, self.seed)


def solved(world: World, probe: NeuronTokens) -> NeuronTokensResult:
    """What `probe` finds in a simulated world, with two neurons of each layer checked on the world's net."""
    reading = Reading.of(probe)
    layers = range(len(world.strengths))
    result = reading.result(
        layers, world.parts(reading.score), allowed=None, words=lambda ids: [f"t{index}" for index in ids]
    )
    hidden = world.hidden(probe.seed)
    claims = [
        Claim(Site(layer, "neurons"), neuron, "+", int(result.top_token[layer, neuron, 0, 0, 0]))
        for layer in layers[:-1]
        for neuron in range(2)
    ]
    norms, length = world.vectors.norm(dim=2).numpy(), float(hidden.norm(dim=1).mean())
    read = partial(world.predict, hidden)
    clamps = clamp_table(read, claims, (0.0, 0.5, 1.0, 2.0), norms.__getitem__, lambda _: length, probe.seed)
    return replace(result, clamps=clamps)


def _planted(name: str, world: World, probe: NeuronTokens, tests: list[Expectation]) -> Planted:
    arrays = {"rows": world.rows[0].numpy(), "vectors": world.vectors.numpy(), "truth": world.truth.numpy()}
    return Planted(name, arrays, lambda: solved(world, probe), tuple(tests))


def _gaining(found: Any) -> float:
    return monotone(found.clamps)


def _labelled(found: Any) -> float:
    return float(found.above_null().mean())


def _last_logprobs(subject: Subject, prompts: list[str]) -> Tensor:
    """(prompt, vocab) log-probabilities of the token after each prompt, float32 on the CPU."""
    last = {row: logprobs[-1].cpu() for row, _, logprobs in subject.predictions(prompts)}
    return torch.stack([last[row] for row in range(len(prompts))])


def _prompts(data: Sequence[str] | None) -> list[str]:
    if data is None:
        return []
    if isinstance(data, str) or not len(data) or not all(isinstance(text, str) for text in data):
        raise ValueError(
            f"NeuronTokens: got {data!r:.60}, expected None (labels alone) or a list of prompts to check labels on."
        )
    return list(data)
