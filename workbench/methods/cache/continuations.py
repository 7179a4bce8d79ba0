"""Prompts with continuations, as token ids: what cache compression is measured on.

Law: prompt + continuation are the tokens of the whole text, so that nothing is scored that the model would not read so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.corpora.item import Item

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt and its continuation as token ids; `group` is what recall is told apart by, such as a distance."""

    prompt: list[int]
    continuation: list[int]
    group: str


def own_text(
    subject: Subject, prompts: Sequence[str], *, prompt_tokens: int = 128, continuation: int = 32, seed: int = 0
) -> list[tuple[list[int], list[int]]]:
    """What the untoggled model itself would write, for a model that knows none of the project's words.

    Each prompt is continued by sampling up to `prompt_tokens` tokens, and from there greedily: the full cache says
    these continuations word for word, so any other word is the toggles' doing. Texts that end early are left out.
    """
    with subject.untoggled():
        ids = subject.tokenize(prompts).ids
        longest = max(map(len, ids))
        if longest >= prompt_tokens:
            raise ValueError(f"own_text: got prompts of up to {longest} tokens, expected under {prompt_tokens}.")
        written = subject.generate(ids, max_new_tokens=prompt_tokens - min(map(len, ids)), temperature=1.0, seed=seed)
        begun = [(one + list(new))[:prompt_tokens] for one, new in zip(ids, written.ids, strict=True)]
        begun = [one for one in begun if len(one) == prompt_tokens]
        if not begun:
            raise ValueError(f"own_text: every text ended before {prompt_tokens} tokens. Ask for fewer prompt_tokens.")
        ended = subject.generate(begun, max_new_tokens=continuation)
    pairs = [(one, list(new)) for one, new in zip(begun, ended.ids, strict=True) if len(new) == continuation]
    if not pairs:
        raise ValueError(
            f"own_text: every text ended before {continuation} more tokens. Ask for a shorter continuation."
        )
    return pairs


def texts_of(subject: Subject, data: Any, continuation: int) -> list[Text]:
    """The data as prompts and continuations in token ids. Raises ValueError for what can't be split or doesn't fit."""
    if isinstance(data, str) or len(data) == 0:
        raise ValueError(
            f"CacheLoss: got {data!r:.40}, expected a list of items, (prompt, continuation) pairs or texts."
        )
    made = [_text(subject, one, continuation) for one in data]
    subject.tokenize([text.prompt + text.continuation for text in made])  # names a text beyond the context
    return made


def _text(subject: Subject, one: Any, continuation: int) -> Text:
    if isinstance(one, str):
        ids = subject.tokenize([one]).ids[0]
        if len(ids) <= continuation:
            raise ValueError(
                f"CacheLoss: got a text of {len(ids)} tokens, of which the last {continuation} are to be scored. "
                "Give longer texts, or score fewer tokens: CacheLoss(continuation=...)."
            )
        return Text(ids[:-continuation], ids[-continuation:], "texts")
    group = "texts"
    if isinstance(one, Item):
        tags = dict(one.tags)
        one, group = (one.prompt, one.answer), str(tags.get("distance", one.form))
    if not (isinstance(one, list | tuple) and len(one) == 2) or isinstance(one[0], str) != isinstance(one[1], str):
        raise ValueError(
            f"CacheLoss: got {one!r:.40}, expected an item, a text, or a (prompt, continuation) pair: two texts, or "
            "token ids of both."
        )
    prompt, following = one
    if isinstance(prompt, str):
        whole = subject.tokenize([f"{prompt} {following}"]).ids[0]
        start = subject.tokenize([prompt]).ids[0]
        if whole[: len(start)] != start:
            raise ValueError(
                f"CacheLoss: the tokens of {prompt[-30:]!r} change when {following[:30]!r} follows, so the two can't "
                "be told apart. Give both as token ids."
            )
        prompt, following = start, whole[len(start) :]
    if not len(prompt) or not len(following):
        raise ValueError("CacheLoss: got an empty prompt or continuation, expected at least one token of each.")
    return Text([int(token) for token in prompt], [int(token) for token in following], group)
