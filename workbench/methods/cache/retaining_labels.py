"""What an answer needs of its prompt: the attention that retaining heads learn to foresee, and what they see of it.

label = max over the queries that predict the answer, and over the query heads of a key/value head, of the weight that
a token of the prompt gets. Source: Locret, Huang et al., 2024 (arXiv 2410.01805), section 3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.cache import View, use_stage
from workbench.cache.rotation import Rotation
from workbench.methods.cache.retaining import arrivals, inputs
from workbench.toggle import Receipt, Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject

See = Callable[[int, Tensor, Tensor], None]  # layer, inputs (token, inputs), labels (token, kv_head)
Pair = tuple[str | Sequence[int], str | Sequence[int]]  # prompt and answer, as texts or as token ids
Read = Callable[[int, See], None]  # the number of a text; calls `see` once per layer of full attention


@contextmanager
def shown_texts(subject: Subject, data: Sequence[Pair]) -> Iterator[Read]:
    """How to read the texts `data`, pairs (prompt, answer): one exact forward of one text at each call."""
    texts, shown = [question(subject, prompt, answer) for prompt, answer in data], Shown()
    with subject.under(Show(shown)):
        yield functools.partial(_read, subject, shown, texts)


def importance(weights: Float[Tensor, "head query slot"], kv_heads: int) -> Float[Tensor, "slot kv_head"]:
    """The labels: the largest weight that a token gets from any query and any head that reads its key."""
    return weights.amax(1).unflatten(0, (kv_heads, -1)).amax(1).T


def question(subject: Subject, prompt: str | Sequence[int], answer: str | Sequence[int]) -> tuple[list[int], int]:
    """Token ids of prompt and answer (texts are joined by a space), and how many belong to the prompt.

    Raises ValueError where one of the two has no token of its own.
    """
    if not isinstance(prompt, str) and not isinstance(answer, str) and len(prompt) and len(answer):
        return [*prompt, *answer], len(prompt)
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ValueError(
            f"retaining heads: got {prompt!r:.60} and {answer!r:.60}, expected two texts, or token ids of both."
        )
    made = subject.tokenize([f"{prompt} {answer}"])
    ids, offsets, special = made.ids[0], made.offsets[0], made.special[0]
    answers = [at for at, (start, _) in enumerate(offsets) if start >= len(prompt) and not special[at]]
    if not answers or not answers[0] or not prompt.strip():
        raise ValueError(
            f"retaining heads: got prompt {prompt[-30:]!r} and answer {answer[:30]!r}, expected at least one "
            "token of each."
        )
    return ids[: answers[-1] + 1], answers[0]


@dataclass(eq=False)
class Shown:
    """A select stage that drops nothing, and shows what heads would see and should say."""

    n_prompt: int = 0
    see: See = lambda *_: None
    receipt: Receipt | None = None
    running: bool = False

    def keep(self, view: View) -> None:
        """Show this layer's inputs and labels of the prompt."""
        assert self.receipt is not None
        self.receipt.fired += 1
        # The query of a token predicts the next one: those of the answer's own tokens would leave out the query that
        # has to find its first token, and it is the prompt's last.
        asking = slice(self.n_prompt - 1, view.query.shape[2] - 1)
        labels = importance(view.attention(asking)[0], view.keys.shape[1])[: self.n_prompt]
        column, slot, _ = arrivals(view)
        self.see(view.layer, inputs(view, column[:, : self.n_prompt], slot[:, : self.n_prompt])[0], labels)


@dataclass(frozen=True, eq=False)
class Show(Toggle):
    """Lets `shown` look into every layer; changes nothing."""

    shown: Shown

    claims: ClassVar[frozenset[str]] = frozenset({"kv.select"})

    def install(self, subject: Subject, undo: ExitStack) -> None:
        stages, rotation = subject.stages, Rotation.if_any(subject)
        self.shown.receipt = subject.receipt
        use_stage(subject, "select", self.shown, undo)
        undo.callback(setattr, stages, "rotation", stages.rotation)
        stages.rotation = rotation

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        return ()

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls(Shown())

    def __str__(self) -> str:
        return "training of retaining heads"


def _read(subject: Subject, shown: Shown, texts: Sequence[tuple[list[int], int]], number: int, see: See) -> None:
    """One forward of one text; `see` is called by each layer with the prompt's inputs and labels."""
    ids, shown.n_prompt = texts[number]
    shown.see = see
    options = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in subject.accepts else {})
    with torch.no_grad():
        subject.model(input_ids=torch.tensor([ids], device=subject.device), **options)
