"""What a feature is about: the tokens that use it most, in context, and the words that it writes.

words(f) = top tokens of W_U (w_final * w_post * W_out^T f) and of its negative; w are the norms' weights, folded.
Source: Shafran, Geiger and Geva, 2025 (arXiv 2506.10920), section on feature descriptions; the logit lens for words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from workbench.generation import text_of
from workbench.methods.neurons.neuron_weights import neuron_vectors, scale_of, write_norm
from workbench.methods.snmf.activations import TokenActivations
from workbench.unembedding import Unembedding, top_tokens

if TYPE_CHECKING:
    from workbench.subject import Subject

CONTEXT = 15  # tokens on each side, as in the paper
TOKEN_COLUMNS = ("feature", "rank", "before", "token", "after", "weight", "text", "position")
WORD_COLUMNS = ("feature", "sign", "rank", "token", "token_id", "score")


def top_contexts(
    subject: Subject, texts: Sequence[str], read: TokenActivations, weights: Tensor, count: int, *, cut: bool = False
) -> pd.DataFrame:
    """The `count` tokens with the largest weight of each feature, each with 15 tokens before and after it.

    Tokens of weight 0 do not use the feature and are never listed, so a feature may have fewer.
    """
    made = subject.tokenize(texts, cut=cut)
    values, rows = weights.T.topk(min(count, len(weights)), dim=1)
    table = []
    for feature, (some, picked) in enumerate(zip(values.tolist(), rows.tolist(), strict=True)):
        for rank, (weight, row) in enumerate(zip(some, picked, strict=True)):
            if weight > 0:
                text, position = int(read.text[row]), int(read.position[row])
                words = _around(subject, texts[text], made.ids[text], made.offsets[text], position)
                table.append((feature, rank, *words, weight, text, position))
    return pd.DataFrame(table, columns=list(TOKEN_COLUMNS))


def written_words(subject: Subject, layer: int, features: Tensor, count: int) -> pd.DataFrame:
    """The `count` words that each feature writes (sign 1) and takes back (sign -1); scores in logits per unit."""
    unembedding = Unembedding.of(subject)
    write = neuron_vectors(subject, layer, "write")
    unit = features.to(write.device) / features.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny).to(write.device)
    folded = (unit.T @ write) * scale_of(subject, write_norm(subject, layer)) * unembedding.norm_weight
    count = min(count, int(unembedding.is_token.sum()))
    scores, ids = top_tokens(
        folded.to(unembedding.weight.device), unembedding.weight, count, allowed=unembedding.is_token, negated=True
    )
    words = {int(index): word for index in ids.unique() for word in unembedding.words([int(index)])}
    table = []
    for row, sign in enumerate((1, -1)):
        for feature in range(features.shape[1]):
            for rank, (score, index) in enumerate(
                zip(scores[row, feature].tolist(), ids[row, feature].tolist(), strict=True)
            ):
                table.append((feature, sign, rank, words[index], index, score))
    return pd.DataFrame(table, columns=list(WORD_COLUMNS))


def _around(
    subject: Subject, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], position: int
) -> tuple[str, str, str]:
    """(before, token, after) as text: cut from the text itself, or decoded where the tokenizer knows no offsets."""
    first, last = max(0, position - CONTEXT), min(len(ids), position + 1 + CONTEXT)
    start, stop = offsets[position]
    if stop > start:
        return text[offsets[first][0] : start], text[start:stop], text[stop : offsets[last - 1][1]]
    parts = ids[first:position], [ids[position]], ids[position + 1 : last]
    before, token, after = (text_of(subject.tokenizer, part) for part in parts)
    return before, token, after
