"""What a push is meant to change: the probability that the next token is one of a set, such as the words of refusal.

p_R = sum over the set of p(token | prompt);  score = log(p_R + 1e-8) - log(1 - p_R + 1e-8), in nats.
Over the first k tokens of the answer: p_R = 1 - prod_t (1 - p_R,t) along the model's own greedy answer.
Source: Arditi et al. 2024, appendix on refusal metrics (k = 1); k > 1 and sets found from data are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.tokens import Texts, batches, left_pad

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from workbench.methods.steering.contrast import Contrast
    from workbench.subject import Subject

EPSILON = 1e-8


@dataclass(frozen=True)
class Target:
    """A set of tokens and how its probability is told. Higher is more of the target.

    ids       the tokens                      words    how they read
    measure   "log_odds" in nats, which keeps counting where a probability is all but 0 or 1; or "probability"
    gaps      where the set was found from data: mean probability in the positive class minus that in the negative
    """

    ids: tuple[int, ...]
    words: tuple[str, ...] = ()
    measure: Literal["log_odds", "probability"] = "log_odds"
    gaps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("Target: got no tokens, expected at least one.")

    @classmethod
    def of_words(
        cls, subject: Subject, words: Sequence[str], measure: Literal["log_odds", "probability"] = "log_odds"
    ) -> Target:
        """The first token of each word, as it is at the start of a text and as it is after a space."""
        if isinstance(words, str) or not all(word.strip() for word in words):
            raise ValueError(f"Target: got words={words!r}, expected a list of words, none of them blank.")
        ids = []
        for word in words:
            for text in (word, f" {word}"):
                made = subject.tokenize([text], special=False).ids[0]
                ids.append(next(token for token in made if str(subject.tokenizer.decode([token])).strip()))
        return cls(tuple(dict.fromkeys(ids)), tuple(words), measure)

    @classmethod
    def found(cls, subject: Subject, contrast: Contrast, *, gap: float = 0.05, limit: int = 5) -> Target:
        """The tokens that begin answers to positive texts rather than to negative ones, most telling first.

        gap     how much more probable on average a token must be; where none is, the one most so stands alone, and
                `tells_apart` is False
        """
        means = [
            last_logprobs(subject, texts).double().exp().mean(0) for texts in (contrast.positive, contrast.negative)
        ]
        difference = means[0] - means[1]  # (vocab,)
        order = difference.sort(descending=True, stable=True).indices[:limit].tolist()
        ids = [token for token in order if difference[token] >= gap] or order[:1]
        words = tuple(str(subject.tokenizer.decode([token])) for token in ids)
        return cls(tuple(ids), words, gaps=tuple(float(difference[token]) for token in ids))

    def tells_apart(self, gap: float = 0.05) -> bool:
        """Whether the answers to the two classes really begin differently; True for a set that was given."""
        return not self.gaps or self.gaps[0] >= gap

    def probability(self, logprobs: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows"]:
        """Total probability of the set, in float64."""
        ids = torch.tensor(self.ids, device=logprobs.device)
        return logprobs.index_select(-1, ids).double().exp().sum(-1).clamp(0.0, 1.0)

    def score(self, logprobs: Float[Tensor, "row token vocab"]) -> Float[Tensor, " row"]:
        """The measure of each row from the log-probabilities at its first answer tokens."""
        p = 1.0 - (1.0 - self.probability(logprobs)).prod(-1)
        return p if self.measure == "probability" else (p + EPSILON).log() - (1.0 - p + EPSILON).log()

    @property
    def name(self) -> str:
        listed = ", ".join(word.strip() or repr(word) for word in self.words) or ", ".join(map(str, self.ids))
        return f"{self.measure.replace('_', '-')} of {listed}"

    @property
    def unit(self) -> str:
        return "nats" if self.measure == "log_odds" else "probability"


@torch.no_grad()
def answer_logprobs(
    subject: Subject, ids: Sequence[Sequence[int]], n_tokens: int = 1
) -> Float[Tensor, "row token vocab"]:
    """Log-probabilities in float32 at the end of each row and after each token of its greedy answer; one batch."""
    rows, found = [list(row) for row in ids], []
    for _ in range(n_tokens):
        batch = left_pad(rows, list(range(len(rows))), pad=subject.pad_id, device=subject.device)
        options = {"attention_mask": batch.mask.long(), "position_ids": batch.positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in subject.accepts}
        logprobs = subject.model(input_ids=batch.ids, use_cache=False, **options).logits[:, -1].float().log_softmax(-1)
        found.append(logprobs)
        rows = [[*row, token] for row, token in zip(rows, logprobs.argmax(-1).tolist(), strict=True)]
    return torch.stack(found, 1)


def last_logprobs(subject: Subject, texts: Texts, *, batch: int = 4096) -> Float[Tensor, "text vocab"]:
    """Log-probabilities of the token after each text, on the CPU."""
    ids = subject.tokenize(texts).ids
    found: dict[int, Tensor] = {}
    for rows in batches([len(row) for row in ids], batch):
        values = answer_logprobs(subject, [ids[row] for row in rows])[:, 0].cpu()
        found |= dict(zip(rows, values, strict=True))
    return torch.stack([found[row] for row in range(len(ids))])


def arm_by_text(
    subject: Subject,
    texts: Texts,
    n_arms: int,
    under: Callable[[Tensor], AbstractContextManager[object]],
    read: Callable[[Tensor, list[int]], Tensor],
    *,
    n_tokens: int = 1,
    batch: int = 4096,
) -> Float[Tensor, "arm text value"]:
    """Every arm of an experiment on every text, as rows of common batches of about `batch` tokens.

    under   (arm of each row) -> a context in which each row is treated as its arm says
    read    (log-probabilities (row, token, vocab), text of each row) -> (row, value)
    """
    ids = subject.tokenize(texts).ids
    pairs = [(arm, text) for text in range(len(ids)) for arm in range(n_arms)]
    found: dict[tuple[int, int], Tensor] = {}
    for rows in batches([len(ids[text]) + n_tokens - 1 for _, text in pairs], batch):
        chosen = [pairs[row] for row in rows]
        with under(torch.tensor([arm for arm, _ in chosen])):
            logprobs = answer_logprobs(subject, [ids[text] for _, text in chosen], n_tokens)
        found |= dict(zip(chosen, read(logprobs, [text for _, text in chosen]).cpu(), strict=True))
    return torch.stack([torch.stack([found[arm, text] for text in range(len(ids))]) for arm in range(n_arms)])
