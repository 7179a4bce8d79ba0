"""Generation: greedy or sampled continuation of a left-padded batch, with true positions. Equals transformers' greedy.

Sampling takes argmax(log p / temperature + g), g standard Gumbel noise (Gumbel-max). The noise of a row depends
on the seed, its prompt's index and the step alone, so a prompt alone and in a batch gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.tokens import Batch

OnToken = Callable[[int, int, str], None]  # index of the prompt, token id, text of that token


@dataclass(frozen=True)
class Generation:
    """Continuations of prompts.

    texts    the new text of each prompt, special tokens left out      ids    the new token ids
    ended    True where the model ended the text itself
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __str__(self) -> str:
        pairs = zip(self.prompts, self.texts, strict=True)
        return "\n".join(f"{prompt} → {text}" for prompt, text in pairs)


def continue_batch(
    step: Callable[[Tensor, Tensor, Tensor, object], tuple[Tensor, object]],
    batch: Batch,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    choose: Callable[[Tensor, int], Tensor],
    pad: int,
    use_cache: bool,
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    """New ids for each row of a batch. `step(ids, mask, positions, cache)` gives the last logits and the cache."""
    ids, mask, positions, cache = batch.ids, batch.mask, batch.positions, None
    new: list[list[int]] = [[] for _ in batch.rows]
    live = torch.ones(len(new), dtype=torch.bool, device=ids.device)
    stops = torch.tensor(list(ends), device=ids.device, dtype=torch.long)
    for number in range(max_new_tokens):
        logits, cache = step(ids, mask, positions, cache)  # (batch, vocab)
        chosen = torch.where(live, choose(logits, number), pad)  # (batch,)
        for index in live.nonzero()[:, 0].tolist():
            new[index].append(int(chosen[index]))
            if on_token:
                on_token(index, new[index][-1])
        live = live & ~torch.isin(chosen, stops)
        if not live.any():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        following = positions[:, -1:] + 1
        if use_cache:
            ids, positions = chosen[:, None], following
        else:
            ids, positions = torch.cat([ids, chosen[:, None]], 1), torch.cat([positions, following], 1)
    return new


def make_chooser(temperature: float, seed: int, rows: Sequence[int]) -> Callable[[Tensor, int], Tensor]:
    """Argmax of the logits, or of logits / temperature plus Gumbel noise keyed by seed and prompt index."""
    if temperature < 0:
        raise ValueError(f"generate: got temperature {temperature}, expected 0 (greedy) or a positive number.")
    if temperature == 0:
        return lambda logits, number: logits.argmax(-1)
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in rows]

    def sample(logits: Tensor, number: int) -> Tensor:
        noise = torch.stack([torch.rand(logits.shape[-1], generator=each, dtype=torch.float64) for each in generators])
        gumbel = -(-noise.clamp_min(1e-300).log()).log()
        return (logits.double() / temperature + gumbel.to(logits.device)).argmax(-1)

    return sample


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The ids as text, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
