"""Generation: greedy or sampled continuation of a left-padded batch, with true positions. Equals transformers' greedy.

The noise of a sample depends on the seed, its row and the position of the token alone (see `workbench.dice`), so a
prompt alone and in a batch gives the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from workbench.dice import Dice
from workbench.tokens import Batch

OnToken = Callable[[int, int, str], None]  # index of the prompt, token id, text of that token


@dataclass(frozen=True)
class Generation:
    """Continuations of prompts.

    texts    the new text of each prompt, special tokens left out      ids    the new token ids
    ended    True where the model ended the text itself                 log_probs  of the new tokens, in nats, at
    temperature 1 and before any truncation; not compared by ==, as the company in a batch moves their last bits
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    log_probs: tuple[tuple[float, ...], ...] = field(default=(), compare=False, repr=False)

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
    choose: Callable[[Tensor, Tensor], Tensor],
    pad: int,
    use_cache: bool,
    on_token: Callable[[int, int], None] | None,
) -> list[list[tuple[int, float]]]:
    """New ids with their log-probabilities for each row of a batch.

    step     (ids, mask, positions, cache) gives the last logits and the cache
    choose   (logits, logical positions of the tokens to choose) gives the ids
    """
    ids, mask, positions, cache = batch.ids, batch.mask, batch.positions, None
    new: list[list[tuple[int, float]]] = [[] for _ in batch.rows]
    live = torch.ones(len(new), dtype=torch.bool, device=ids.device)
    stops = torch.tensor(list(ends), device=ids.device, dtype=torch.long)
    for _ in range(max_new_tokens):
        logits, cache = step(ids, mask, positions, cache)  # (batch, vocab)
        following = positions[:, -1:] + 1
        chosen = torch.where(live, choose(logits, following[:, 0]), pad)  # (batch,)
        log_probs = logits.gather(1, chosen[:, None])[:, 0].float() - logits.float().logsumexp(-1)
        facts = list(zip(chosen.tolist(), log_probs.tolist(), strict=True))
        for index in live.nonzero()[:, 0].tolist():
            new[index].append(facts[index])
            if on_token:
                on_token(index, facts[index][0])
        live = live & ~torch.isin(chosen, stops)
        if not live.any():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if use_cache:
            ids, positions = chosen[:, None], following
        else:
            ids, positions = torch.cat([ids, chosen[:, None]], 1), torch.cat([positions, following], 1)
    return new


def make_chooser(dice: Dice, rows: Sequence[int], shift: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """What `continue_batch` chooses with: the throw of each row, `shift` positions away from the token's own."""
    dice.check()
    moved = torch.tensor(list(shift))
    return lambda logits, positions: dice.choose(logits, rows, positions + moved.to(positions.device))


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The ids as text, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
