"""A world in which the right controller is known: prompts that are easy to tell apart, a model with one causal layer.

values = noise + or - 4 along one direction;  log-odds of the behaviour = -3 + 2 push[causal layer]
A controller must open for one class and put its weight on the causal layer; what it does elsewhere changes nothing.
Source: this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from workbench.methods.steering.controller import Mode
from workbench.methods.steering.controller_training import Response, Trained, Training, train
from workbench.site import Site

WIDTH, PROMPTS, LAYERS = 32, 512, 4
REST, GAIN, APART = -3.0, 2.0, 4.0


@dataclass(frozen=True, eq=False)
class ControlledWorld:
    """values (prompt, width) read of each prompt; wanted (prompt,); `response` of the simulated model to pushes."""

    values: Float[Tensor, "prompt width"]
    wanted: Bool[Tensor, " prompt"]
    causal: int

    @classmethod
    def of(cls, seed: int = 0, causal: int = 2) -> ControlledWorld:
        """A world in which only the layer `causal` of four moves the behaviour."""
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.arange(PROMPTS) < PROMPTS // 2
        apart = normalize(torch.randn(WIDTH, generator=generator), dim=0)
        values = torch.randn(PROMPTS, WIDTH, generator=generator)
        return cls(values + torch.where(wanted, APART, -APART)[:, None] * apart, wanted, causal)

    def response(self, rows: Tensor, pushes: Float[Tensor, "row site"]) -> tuple[Tensor, Tensor]:
        """log p(behaviour) and KL from the unsteered model of each row."""
        base, moved = torch.tensor(REST), REST + GAIN * pushes[:, self.causal]
        kl = torch.zeros(len(pushes))
        for side in (1, -1):  # the behaviour, and its absence
            kl = kl + logsigmoid(side * base).exp() * (logsigmoid(side * base) - logsigmoid(side * moved))
        return logsigmoid(moved), kl

    def trained(self, mode: Mode = "corrected", seed: int = 0, response: Response | None = None) -> Trained:
        """A controller trained in this world, in paper mode with the published settings."""
        training = Training(seed=seed, progress=False) if mode == "corrected" else Training.as_published(seed)
        sites = tuple(Site(layer, "resid_out") for layer in range(LAYERS))
        labels, answer = self.wanted.numpy(), response or self.response
        return train(self.values, labels, answer, reads=sites[:1], edits=sites, training=training)
