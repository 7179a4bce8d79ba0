"""One throw taken apart: between which tokens the dice chose at each place of a few texts, how likely, how lucky.

chosen = argmax_i p_i e^(g_i): probability times luck, g_i the Gumbel noise of token i. Sources: Maddison et al., 2014
(Gumbel-max); Chatzi et al., 2024 (arXiv 2409.17027): an edit moves p and leaves g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from workbench.dice import Dice, gumbel
from workbench.methods.counterfactual.agreement import (
    END,
    equal_share,
    gumbel_agreement,
    independent_agreement,
    largest_agreement,
    share_interval,
)

Ids = Sequence[int]
LEADING = 4  # tokens of each text that could have won at a place


@dataclass(frozen=True, eq=False)
class Throw:
    """The n tokens in question at one place of k texts: those that were chosen, and those that came next to it.

    ids (n,)         none twice
    log_probs (k, n) as the dice sample from them, in nats; at temperature 0 the model's own; NaN: that text is over
    luck (k, n)      Gumbel noise g, in nats; 0 at temperature 0; NaN: that text is over
    chosen (k,)      the token of each text, END where it is over
    expected         chance over all dice that the first text's token is the second's too: same dice, fresh dice, and
                     the most that any coupling could reach; NaN where one of the two is over
    """

    ids: np.ndarray
    log_probs: np.ndarray
    luck: np.ndarray
    chosen: np.ndarray
    expected: tuple[float, float, float]

    def log_prob(self, text: int, token: int) -> float:
        """Of one of `ids`, in one of the texts."""
        return float(self.log_probs[text, self.ids.tolist().index(token)])

    def products(self) -> np.ndarray:
        """(k, n) probability times luck over that of the chosen token: 1 where a token was chosen, less elsewhere."""
        scores = self.log_probs + self.luck
        return np.exp(scores - scores.max(axis=1, keepdims=True))


def throws(
    log_probs: Sequence[Tensor], texts: Sequence[Ids], dice: Dice, rows: Sequence[int], first: int
) -> tuple[Throw, ...]:
    """The throw at each place of texts that full Gumbel-max sampling wrote, up to the end of the longest.

    log_probs  per text (length, vocab): the model's prediction of each of its tokens, in nats at temperature 1
    rows       per text the dice's row           first   the logical position whose throw the first tokens took
    """
    if dice.sampler != "full" or not len(log_probs) == len(texts) == len(rows):
        raise ValueError(
            f"throws: got sampler {dice.sampler!r}, {len(log_probs)} predictions, {len(texts)} texts and {len(rows)} "
            "rows, expected the sampler 'full' and one of each per text."
        )
    warm = replace(dice, temperature=dice.temperature or 1.0)
    likely = [warm.log_probs(values).cpu() for values in log_probs]
    longest = max(map(len, texts), default=0)
    return tuple(_throw(likely, texts, dice, rows, place, first + place) for place in range(longest))


def kept_share(before: Sequence[Ids], after: Sequence[Ids], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of the share of tokens that stay where they were, with 95 % interval over pairs of texts."""
    share = equal_share(*(_packed(texts, max(map(len, (*before, *after)))) for texts in (before, after)))
    mean, low, high = map(float, share_interval(share, seed=seed))
    return mean, low, high


def _throw(
    likely: Sequence[Tensor], texts: Sequence[Ids], dice: Dice, rows: Sequence[int], place: int, position: int
) -> Throw:
    live = [number for number, ids in enumerate(texts) if place < len(ids)]
    chosen = np.array([ids[place] if place < len(ids) else END for ids in texts])
    log_p = torch.stack([likely[number][place] for number in live])  # (live, vocab)
    luck = torch.zeros_like(log_p)
    if dice.temperature:
        positions = torch.full((len(live),), position)
        of = torch.tensor([rows[number] for number in live])
        luck = gumbel(dice.seed, of, positions, torch.arange(log_p.shape[1]))
    leading = (log_p + luck).topk(min(LEADING, log_p.shape[1])).indices.flatten().tolist()
    ids = np.array(list(dict.fromkeys([*(int(token) for token in chosen if token != END), *leading])))
    parts = np.full((2, len(texts), len(ids)), np.nan)
    parts[:, live] = np.stack([log_p[:, ids].numpy(), luck[:, ids].numpy()])
    both = live[:2] == [0, 1]
    expected = _expected(dice, log_p[0], log_p[1]) if both else (np.nan, np.nan, np.nan)
    return Throw(ids, parts[0], parts[1], chosen, expected)


def _expected(dice: Dice, log_p: Tensor, log_q: Tensor) -> tuple[float, float, float]:
    if not dice.temperature:
        same = float(log_p.argmax() == log_q.argmax())
        return same, same, same
    p, q = log_p.exp().numpy(), log_q.exp().numpy()
    return gumbel_agreement(p, q), independent_agreement(p, q), largest_agreement(p, q)


def _packed(texts: Sequence[Ids], length: int) -> np.ndarray:
    """(n, length) ids, END after the end."""
    made = np.full((len(texts), length), END)
    for row, ids in enumerate(texts):
        made[row, : len(ids)] = ids
    return made
