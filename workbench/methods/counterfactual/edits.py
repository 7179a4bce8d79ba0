"""An edit of a text: what is changed, where the text goes on from, and which words to read in what follows.

Two prompts that differ, or (position, new ids) in the prompt or in what the model wrote after it. Ids are kept as they
are: decoding and encoding again can split a word otherwise, and every later position would take another throw.
Source: Chatzi et al., 2024 (arXiv 2409.17027), whose code does encode again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.subject import Subject

Prompt = str | tuple[int, ...]
NOTHING_READ = "none"


@dataclass(frozen=True)
class Edit:
    """One change. Give `edited`, or `position` and `ids`. A string gets the tokenizer's special tokens, ids stay as is.

    prompt     before the edit                         edited   the prompt after it; the same prompt is a control
    position   logical position of the first new id, in the prompt or beyond it, in what the model wrote
    ids        put in place of as many tokens; what the prompt holds after them stays, what the model wrote is redone
    name       what is edited: results are grouped by it
    reads      attribute -> value -> words: the value whose word comes first in the text is the attribute's
    """

    prompt: Prompt
    edited: Prompt | None = None
    position: int | None = None
    ids: tuple[int, ...] = ()
    name: str = "edit"
    reads: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """An edit in token ids.

    before     the prompt's ids           after   the edited prompt's; None where the edit lies in what the model wrote
    position   of the first changed token; the prompt's length where nothing changes
    start      how many tokens of what the model wrote lie before the first token that is generated again
    """

    before: tuple[int, ...]
    after: tuple[int, ...] | None
    position: int
    ids: tuple[int, ...]
    start: int

    def factual(self, written: Sequence[int]) -> tuple[int, ...]:
        """What the factual text has before its first compared token; `written` are the ids after the prompt."""
        return (*self.before, *written[: self.start])

    def edited(self, written: Sequence[int]) -> tuple[int, ...]:
        """The same place after the edit."""
        return (*(*self.before, *written)[: self.position], *self.ids) if self.after is None else self.after


def plan(subject: Subject, edit: Edit) -> Plan:
    """The edit in the subject's ids. ValueError for an edit that names no change or two, or ids that don't exist."""
    if (edit.edited is None) == (edit.position is None):
        raise ValueError(
            f"Edit {edit.name!r}: got edited={edit.edited!r} and position={edit.position}, expected one of them: "
            "the edited prompt, or a position with new ids."
        )
    spelled = [words for values in edit.reads.values() for words in values.values() if isinstance(words, str)]
    if spelled:
        raise ValueError(f"Edit {edit.name!r}: got {spelled[0]!r} among its reads, expected a list: [{spelled[0]!r}].")
    before = _ids(subject, edit.prompt)
    if edit.edited is not None:
        after = _ids(subject, edit.edited)
        same = next((k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
        position = min(len(before), len(after)) if same is None else same
        return Plan(before, after, position, (), 0)
    vocab = int(subject.model.config.get_text_config().vocab_size)
    if not edit.ids or not all(0 <= token < vocab for token in edit.ids):
        raise ValueError(f"Edit {edit.name!r}: got ids={edit.ids}, expected token ids from 0 to {vocab - 1}.")
    position = int(edit.position or 0)
    end = position + len(edit.ids)
    if position < 0:
        raise ValueError(f"Edit {edit.name!r}: got position {position}, expected a logical position from 0.")
    if end <= len(before):
        return Plan(before, (*before[:position], *edit.ids, *before[end:]), position, edit.ids, 0)
    return Plan(before, None, position, edit.ids, end - len(before))


def read(text: str, values: Mapping[str, Sequence[str]]) -> str:
    """The value one of whose words comes first in `text`, words being parted by spaces and stripped of punctuation."""
    words = [word.strip(".,;:!?\"'()") or word for word in text.split()]
    first = {
        value: min((words.index(w) for w in some if w in words), default=len(words)) for value, some in values.items()
    }
    found = [value for value, at in first.items() if at < len(words)]
    return min(found, key=lambda value: first[value]) if found else NOTHING_READ


def _ids(subject: Subject, prompt: Prompt) -> tuple[int, ...]:
    return tuple(subject.tokenize([prompt]).ids[0])  # type: ignore[list-item]
