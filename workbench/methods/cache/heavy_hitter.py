"""A world where one cached token matters: the planted truth of cache compression, played on the real cache layer.

One query u asks all the time. Every key is 0 but the needle's, 64 u: with width 64 its logit is 8, its weight among m
tokens e^8 / (e^8 + m - 1). Only the needle has a value, the symbol to say. Source: this project, after the heavy
hitters of Zhang et al., 2023 (arXiv 2306.14048).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from workbench.cache import KVLayer, Stages
from workbench.cache.held import held_bytes
from workbench.methods.cache.comparison import Loss, compare
from workbench.methods.cache.continuations import Text
from workbench.methods.cache.reading import Reading, held_tokens
from workbench.step import Step

WIDTH, N_HEADS, N_SYMBOLS, SHARPNESS = 64, 2, 16, 3.0
FILLER = N_SYMBOLS  # the id of every other token


@dataclass(frozen=True, eq=False)
class World:
    """Prompts of n_tokens with one needle each, never among the first 4, and what must be said of it n_answers times.

    needle, symbol   (text,) its position and what it stands for      logit   what its key gives to the query
    """

    needle: np.ndarray
    symbol: np.ndarray
    n_tokens: int
    n_answers: int
    logit: float

    @classmethod
    def of(
        cls,
        seed: int,
        *,
        n_texts: int = 60,
        n_tokens: int = 256,
        n_answers: int = 3,
        before: int = 128,
        logit: float = 8.0,
    ) -> World:
        """Needles drawn evenly from the places 4 to `before`; logit 0 is the world where no score can tell them."""
        rng = np.random.default_rng(seed)
        symbol = rng.integers(1, N_SYMBOLS, n_texts)  # never 0, which is said where nothing is known
        return cls(rng.integers(4, before, n_texts), symbol, n_tokens, n_answers, logit)

    def weight(self, n_held: int | np.ndarray) -> np.ndarray:
        """The attention weight of a needle that is held among n_held tokens."""
        return np.exp(self.logit) / (np.exp(self.logit) + np.asarray(n_held, dtype=np.float64) - 1)

    def texts(self) -> list[Text]:
        """The prompts as token ids, the needle's symbol the only id that is not filler, and it again as answers."""
        made = []
        for needle, symbol in zip(self.needle.tolist(), self.symbol.tolist(), strict=True):
            prompt = [FILLER] * self.n_tokens
            prompt[needle] = symbol
            made.append(Text(prompt, [symbol] * self.n_answers, "needle"))
        return made

    def losses(self, stages: Stages, base: list[Reading] | None = None) -> list[Loss]:
        """What each text loses in a cache layer that runs these stages, against `base`: one that runs none."""
        sides = base or self.read(Stages()), self.read(stages)
        return [compare(before, after, text) for before, after, text in zip(*sides, self.texts(), strict=True)]

    def read(self, stages: Stages) -> list[Reading]:
        """Each text through a cache layer: the prompt in one forward, then answer by answer."""
        steps: list[Step] = []
        layer = KVLayer(0, stages, lambda: steps[-1])
        n_texts, outputs = len(self.needle), []
        keys = torch.zeros(n_texts, 1, self.n_tokens, WIDTH)
        values, query = torch.zeros_like(keys), torch.zeros(n_texts, N_HEADS, self.n_tokens, WIDTH)
        rows = torch.arange(n_texts)
        keys[rows, 0, self.needle, 0] = self.logit * WIDTH**0.5
        values[rows, 0, self.needle, self.symbol] = 1.0
        query[..., 0] = 1.0
        outputs.append(self._attend(layer, steps, 0, query, keys, values)[:, :, -1:])
        held, cache_bytes = held_tokens(layer, self.n_tokens), held_bytes(layer) / n_texts
        for number in range(self.n_answers - 1):
            new = (query[:, :, :1], torch.zeros_like(keys[:, :, :1]), torch.zeros_like(keys[:, :, :1]))
            outputs.append(self._attend(layer, steps, self.n_tokens + number, *new))
        said = torch.cat(outputs, 2).transpose(1, 2)  # (text, answer, head, width)
        logprobs = (SHARPNESS * said.mean(2)[..., :N_SYMBOLS]).log_softmax(-1)
        return [Reading(logprobs[i], (said[i, 1:],), held[i][None], cache_bytes) for i in range(n_texts)]

    def _attend(
        self, layer: KVLayer, steps: list[Step], start: int, query: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        positions = torch.arange(start, start + keys.shape[2]).expand(len(keys), -1)
        ends = torch.full((len(keys),), self.n_tokens)
        steps.append(Step(positions, torch.ones_like(positions, dtype=torch.bool), ends))
        layer.update(keys, values)
        return layer.attend(query, nn.Identity(), WIDTH**-0.5, None)
