"""Words as the model spells them: from questions with candidate words to token ids, and to the probability of a word.

P_l(w | x) = prod_t softmax(lens(l, h_l(x, w_<t)))[w_t], teacher forced; one forward scores all words of a question.
Sources: Zhong et al., 2025, ACL Findings (words of several tokens); mode "paper": prefix sums of Wendler et al., 2024
(arXiv 2402.10588).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.corpora.bilingual import BilingualItem

if TYPE_CHECKING:
    from workbench.subject import Subject

Word = tuple[int, ...]  # token ids
SPACE_MARKS = "▁Ġ "  # what tokenizers write for a leading space


@dataclass(frozen=True)
class Candidates:
    """One question in token ids: its prompt, and the words of each language in the order of the question."""

    prompt: Word
    words: tuple[tuple[Word, ...], ...]

    @property
    def collide(self) -> bool:
        """Whether a word of one language is, or begins, a word of another: their probabilities would be shared."""
        return any(
            a[: len(b)] == b[: len(a)]
            for k, first in enumerate(self.words)
            for second in self.words[:k]
            for a in first
            for b in second
        )


def spelled(subject: Subject, items: Sequence[BilingualItem], *, first_token: bool) -> list[Candidates]:
    """The questions in token ids; with `first_token` every word is cut to its first, which counts once per language.

    Raises ValueError where the tokenizer joins the end of a prompt to a word, or does not know a word.
    """
    texts = [
        [item.prompt] + [item.prompt + item.separator + word for _, words in item.words for word in words]
        for item in items
    ]
    ids = iter(_ids(subject, [text for some in texts for text in some]))
    found = []
    for item, (_, *longer) in zip(items, texts, strict=True):
        prompt = next(ids)
        rest = iter([_after(prompt, next(ids), text)[: 1 if first_token else None] for text in longer])
        words = [tuple(dict.fromkeys(next(rest) for _ in words)) for _, words in item.words]
        found.append(Candidates(tuple(prompt), tuple(words)))
    return found


def prefixes(subject: Subject, items: Sequence[BilingualItem]) -> list[Candidates]:
    """Mode "paper": in place of each language's right word, every single token that begins it.

    That is every character prefix with and without the mark of a leading space, and the token of the first byte of a
    word that is not ASCII, in vocabularies that write bytes as <0xE4>. Vocabularies that spell bytes as other letters
    (GPT-2's) have no piece that begins such a word.
    """
    prompts, pieces = _ids(subject, [item.prompt for item in items]), _pieces(subject)

    def begin(word: str) -> tuple[Word, ...]:
        starts = [word[:n] for n in range(1, len(word) + 1)]
        starts += [] if word[:1].isascii() else [f"<0x{word.encode()[0]:02X}>"]
        return tuple((index,) for start in starts for index in pieces.get(start, ()))

    right = [tuple(begin(words[0]) for _, words in item.words) for item in items]
    return [Candidates(tuple(prompt), words) for prompt, words in zip(prompts, right, strict=True)]


def kept(items: Sequence[BilingualItem], coded: Sequence[Candidates], paper: bool) -> tuple[list[int], dict[str, int]]:
    """Indices of the questions whose languages can be told apart, and per task the number of those dropped.

    Mode "paper" drops as well where one language's right word is contained in another's, and where a right word
    begins with no token of the vocabulary.
    """
    good, dropped = [], Counter({item.task: 0 for item in items})
    for index, (item, one) in enumerate(zip(items, coded, strict=True)):
        right = [words[0] for _, words in item.words]
        contained = any(a in b for k, a in enumerate(right) for j, b in enumerate(right) if j != k)
        if one.collide or (paper and (contained or not all(one.words))):
            dropped[item.task] += 1
        else:
            good.append(index)
    return good, dict(dropped)


@dataclass(frozen=True, eq=False)
class Reading:
    """What must be read to score some questions: texts in token ids, the tokens to read, and pairs (row, token).

    Rows are in the order of a capture with these masks. `prompt_row` (item,) is where the prompt ends; `word_of`
    (pair,) is the word that a pair belongs to, counted over all questions, languages and words in order.
    """

    texts: list[list[int]]
    masks: list[list[bool]]
    pairs: Int[Tensor, "pair 2"]
    word_of: Int[np.ndarray, " pair"]
    prompt_row: Int[np.ndarray, " item"]
    shape: tuple[int, int, int]  # (item, language, word), filled up to the most words of any language


def reading(coded: Sequence[Candidates]) -> Reading:
    """The fewest texts that hold every (prompt, beginning of a word), each beginning read once."""
    texts: list[list[int]] = []
    masks: list[list[bool]] = []
    pairs: list[tuple[int, int]] = []
    word_of: list[int] = []
    prompt_row: list[int] = []
    shape = len(coded), len(coded[0].words), max(len(words) for one in coded for words in one.words)
    n_rows = 0
    for item, one in enumerate(coded):
        row_of: dict[Word, int] = {}
        for stem in _longest({word[:-1] for words in one.words for word in words}):
            wanted = [n for n in range(len(stem) + 1) if stem[:n] not in row_of]
            row_of |= {stem[:n]: n_rows + k for k, n in enumerate(wanted)}
            n_rows += len(wanted)
            texts.append([*one.prompt, *stem])
            masks.append([position - len(one.prompt) + 1 in wanted for position in range(len(texts[-1]))])
        prompt_row.append(row_of[()])
        for language, words in enumerate(one.words):
            for k, word in enumerate(words):
                pairs += [(row_of[word[:n]], token) for n, token in enumerate(word)]
                word_of += [(item * shape[1] + language) * shape[2] + k] * len(word)
    return Reading(texts, masks, torch.tensor(pairs), np.array(word_of), np.array(prompt_row), shape)


def n_rows(one: Candidates) -> int:
    """How many rows a question needs: the different beginnings of its words."""
    return len({word[:n] for words in one.words for word in words for n in range(len(word))})


def word_log_prob(
    plan: Reading, log_prob: Float[np.ndarray, "layer pair"], *, geometric: bool = False
) -> Float[np.ndarray, "item layer language word"]:
    """Log-probability of each word: the sum over its tokens, or their mean; NaN where a language has fewer words."""
    total = np.zeros((len(log_prob), int(np.prod(plan.shape))))
    n_tokens = np.bincount(plan.word_of, minlength=total.shape[1])
    for layer, values in enumerate(log_prob):
        total[layer] = np.bincount(plan.word_of, weights=values, minlength=total.shape[1])
    if geometric:
        total = total / np.maximum(n_tokens, 1)
    total[:, n_tokens == 0] = np.nan
    return np.moveaxis(total.reshape(len(log_prob), *plan.shape), 0, 1)


def check_items(items: Sequence[BilingualItem]) -> None:
    """ValueError that names the item which does not fit the others."""
    if not items or not all(isinstance(item, BilingualItem) for item in items):
        what = "no items" if not items else f"{next(i for i in items if not isinstance(i, BilingualItem))!r:.40}"
        raise ValueError(f"LatentLanguage: got {what}, expected BilingualItems such as corpora.bilingual.fact_items().")
    languages = tuple(name for name, _ in items[0].words)
    ends = {item.task: (item.source, item.target) for item in items}
    for index, item in enumerate(items):
        if ends[item.task] != (item.source, item.target):
            raise ValueError(
                f"LatentLanguage: item {index} of task {item.task!r} goes from {item.source} to {item.target}, another "
                f"one from {' to '.join(ends[item.task])}, expected one direction per task. Name two tasks."
            )
        names, counts = tuple(name for name, _ in item.words), {len(words) for _, words in item.words}
        if names != languages or len(set(names)) < 2:
            raise ValueError(
                f"LatentLanguage: item {index} has words of {names}, expected two or more languages, the same in all."
            )
        if item.target not in names:
            raise ValueError(f"LatentLanguage: item {index} has target {item.target!r}, expected one of {names}.")
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"LatentLanguage: item {index} has {sorted(counts)} words per language, expected as many in each."
            )


def _longest(stems: set[Word]) -> list[Word]:
    """The stems that begin no other stem, in order."""
    inner = {stem[:n] for stem in stems for n in range(len(stem))}
    return sorted(stems - inner)


def _ids(subject: Subject, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts in one call, without special tokens after a text, which nothing could follow."""
    made = subject.tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    found = []
    for text, ids, special in zip(texts, made["input_ids"], made["special_tokens_mask"], strict=True):
        if not ids or subject.tokenizer.unk_token_id in ids:
            subject.tokenize([text])  # says in words which one is unknown, or that there is none
        end = max((index + 1 for index, mark in enumerate(special) if not mark), default=len(ids))
        found.append(list(ids[:end]))
    return found


def _after(prompt: list[int], whole: list[int], text: str) -> Word:
    """The tokens of the word alone."""
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ValueError(
            f"LatentLanguage: the tokens of {text!r} do not begin with those of its prompt. End the prompt where a "
            "token ends, such as before a space, and give the rest as separator."
        )
    return tuple(whole[len(prompt) :])


def _pieces(subject: Subject) -> dict[str, list[int]]:
    """Token ids by their text without a leading space."""
    found: dict[str, list[int]] = {}
    for piece, index in sorted(subject.tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        text = piece[1:] if piece[:1] in SPACE_MARKS and len(piece) > 1 else piece
        found.setdefault(text, []).append(index)
    return found
