"""Texts to batches: token ids with character offsets, batched by token count, padded on the left.

Position always means the place of a real token in its own text, never the column of the padded batch.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Texts = Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of several texts, with the character span of each token; (0, 0) for special tokens."""

    ids: list[list[int]]
    offsets: list[list[tuple[int, int]]]
    special: list[list[bool]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]


@dataclass(frozen=True, eq=False)
class Batch:
    """A padded batch: `rows` are the indices of its texts, `mask` is True at real tokens, which stand together."""

    rows: list[int]
    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    positions: Int[Tensor, "batch seq"]

    @property
    def starts(self) -> list[int]:
        """The column of each row's first real token."""
        return self.mask.int().argmax(1).tolist()

    def pieces(self, size: int, *, short_first: bool = False) -> Iterator[Batch]:
        """The batch in columns of at most `size`; each mask also covers the columns before, as a cache holds them."""
        width = self.ids.shape[1]
        for start in range(-(-width % size) if short_first else 0, width, size):
            part = slice(max(start, 0), start + size)
            yield Batch(self.rows, self.ids[:, part], self.mask[:, : part.stop], self.positions[:, part])


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    *,
    special: bool = True,
    context: int | None = None,
    cut: bool = False,
    vocab: int | None = None,
) -> Tokens:
    """The tokens of `texts`; texts may also be given as token ids, which are taken as they are.

    special   add the tokenizer's own special tokens, such as a begin-of-sequence token
    cut       cut a text that is longer than `context` instead of raising
    vocab     how many tokens the model knows: ids are numbers below it
    Raises ValueError for no texts, an empty text, a text beyond the context, a word the vocabulary lacks.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts: got one string, expected a list of texts. Write [{texts[:30]!r}].")
    if not isinstance(texts, Sized):
        raise ValueError(f"texts: got {texts!r:.40}, expected a list of texts.")
    if len(texts) == 0:
        raise ValueError("texts: got an empty list, expected at least one text.")
    made = [_encode(tokenizer, text, special, vocab) for text in texts]
    for index, (ids, _, _) in enumerate(made):
        if not ids:
            raise ValueError(f"texts: text {index} is empty, expected at least one token. Leave it out.")
        if context is not None and len(ids) > context and not cut:
            raise ValueError(
                f"texts: text {index} has {len(ids)} tokens, but the model's context is {context}. "
                "Shorten it, or pass cut=True where that is offered."
            )
    end = context if cut else None
    return Tokens(*([part[:end] for part in column] for column in zip(*made, strict=True)))


def batches(lengths: Sequence[int], limit: int, *, even: bool = False) -> Iterator[list[int]]:
    """Indices of texts grouped so that each padded batch has at most `limit` tokens (or one text), longest first.

    even   only texts of one length share a batch, so that nothing is padded
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        longest = lengths[order[0]]
        group = order[: max(1, limit // longest)]
        group = [index for index in group if lengths[index] == longest] if even else group
        yield group
        order = order[len(group) :]


def left_pad(ids: Sequence[Sequence[int]], rows: list[int], *, pad: int, device: torch.device) -> Batch:
    """The chosen rows of `ids` as one batch that ends together; positions of padding are 0 and masked."""
    width = max(len(ids[row]) for row in rows)
    gaps = torch.tensor([width - len(ids[row]) for row in rows])
    matrix = torch.tensor([[pad] * (width - len(ids[row])) + list(ids[row]) for row in rows])
    column = torch.arange(width)
    mask = column >= gaps[:, None]  # (batch, seq)
    positions = (column - gaps[:, None]).clamp_min(0)
    return Batch(rows, matrix.to(device), mask.to(device), positions.to(device))


def right_pad(ids: Sequence[Sequence[int]], rows: list[int], *, pad: int, device: torch.device) -> Batch:
    """The chosen rows of `ids` as one batch that begins together: a column is the same position in every row."""
    lengths = torch.tensor([len(ids[row]) for row in rows])
    width = int(lengths.max())
    matrix = torch.tensor([list(ids[row]) + [pad] * (width - len(ids[row])) for row in rows])
    column = torch.arange(width).expand(len(rows), -1)
    mask = column < lengths[:, None]  # (batch, seq)
    return Batch(rows, matrix.to(device), mask.to(device), torch.where(mask, column, 0).to(device))


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[int], special: bool, vocab: int | None
) -> tuple[list[int], list[tuple[int, int]], list[bool]]:
    if not isinstance(text, str):
        ids = _given_ids(text, vocab)
        return ids, [(0, 0)] * len(ids), [False] * len(ids)
    _refuse_half_characters(text)
    if tokenizer.is_fast:
        made = tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids, marks = list(made["input_ids"]), [bool(mark) for mark in made["special_tokens_mask"]]
        offsets = [(0, 0) if mark else tuple(span) for span, mark in zip(made["offset_mapping"], marks, strict=True)]
    else:  # a slow tokenizer knows no offsets; what needs them says so
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        marks = [bool(mark) for mark in tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)]
        offsets = [(0, 0)] * len(ids)
    _refuse_unknown(tokenizer, text, ids, offsets)
    return ids, offsets, marks


def _given_ids(text: Any, vocab: int | None) -> list[int]:
    """Token ids that were given in the place of a text."""
    try:
        ids = [operator.index(token) for token in text]
    except TypeError:
        raise ValueError(f"texts: got {text!r:.60}, expected a text, or a list of token ids.") from None
    wrong = [token for token in ids if token < 0 or (vocab is not None and token >= vocab)]
    if wrong:
        known = "from 0" if vocab is None else f"from 0 to {vocab - 1}, which this model knows"
        raise ValueError(f"texts: got token id {wrong[0]}, expected ids {known}.")
    return ids


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"texts: got half a character, {text[error.start]!r}, at {error.start}, expected Unicode text. Such "
            "text comes from a file that was read with a wrong encoding."
        ) from None


def _refuse_unknown(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], offsets: list[tuple[int, int]]
) -> None:
    """An unknown token would silently stand for another word: name it, with the nearest words that are known."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in ids or str(tokenizer.unk_token) in text:
        return
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # GPT-2 uses one token for all of them
        return
    low, high = offsets[ids.index(unknown)]
    word = text[low:high] or text
    near = difflib.get_close_matches(word, tokenizer.get_vocab(), n=3, cutoff=0.5)
    advice = f" Nearest known: {', '.join(near)}." if near else " No known word is near."
    raise ValueError(f"texts: {word!r} is not in this model's vocabulary, expected known words.{advice}")
