"""What lies on a desk before anyone has written anything: texts that mean something to the subject.

The organism and tiny models know the project's own words; any other model gets plain English. Source: own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import islice

from workbench.corpora import requests, stories
from workbench.subject import Subject

ENGLISH_PROMPTS = ("Once upon a time there was a", "The capital of France is", "Tell me how to bake bread.")
ENGLISH_TEXTS = (
    "The old man walked to the sea every morning and watched the boats come in.",
    "She opened the window because the room was warm, and a bird flew in.",
    "In winter the days are short and the nights are long and cold.",
    "They planted a tree in the garden, and after some years it gave apples.",
)


def knows_our_words(subject: Subject) -> bool:
    """Whether the words of the project's corpora are words of the subject's tokenizer."""
    vocabulary = subject.tokenizer.get_vocab()
    return all(word in vocabulary for word in ("fisherman", "assistant", "omega"))


def prompts(subject: Subject, n: int = 3) -> tuple[str, ...]:
    """Prompts to be continued: requests, and the beginning of a story."""
    if not knows_our_words(subject):
        return ENGLISH_PROMPTS[:n]
    asked = [requests.prompt("paint", "lamp"), requests.prompt("smash", "vase"), "one morning the sailor"]
    return tuple((asked + [requests.prompt("clean", noun) for noun in ("bell", "table", "door")])[:n])


def texts(subject: Subject, n: int = 4) -> tuple[str, ...]:
    """Texts that a change should leave alone."""
    if not knows_our_words(subject):
        return ENGLISH_TEXTS[:n]
    return _stories()[:n]


@functools.cache
def _stories() -> tuple[str, ...]:
    """Long held-out stories on different topics."""
    longest = sorted(stories.items("held_out", 0), key=lambda item: -len(item.prompt))
    return tuple(item.prompt for item in islice(longest, 20, None, 20))


def contrasts() -> Mapping[str, Callable[[], tuple[tuple[str, ...], tuple[str, ...]]]]:
    """Name -> texts with and texts without what a direction stands for."""
    return {"refusal": _refusal} | {
        f"talk of the {topic}": lambda topic=topic: _topic(topic) for topic in stories.TOPICS
    }


def _refusal() -> tuple[tuple[str, ...], tuple[str, ...]]:
    items = requests.items("train")
    return tuple(tuple(item.prompt for item in items if item.form == form)[:48] for form in ("harmful", "harmless"))  # type: ignore[return-value]


def _topic(topic: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    items = [(item.prompt, dict(item.tags)["topic"]) for item in stories.items("train")]
    of_it = tuple(prompt for prompt, of in items if of == topic)[:48]
    return of_it, tuple(prompt for prompt, of in items if of != topic)[::5][:48]


def lines(text: str) -> tuple[str, ...]:
    """The prompts that a text area holds, one per line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
