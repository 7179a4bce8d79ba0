"""What lies on a desk before anyone has written anything: texts that mean something to the subject, and directions.

The organism and tiny models know the project's own words; any other model gets plain English. Source: own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from workbench.corpora import PHENOMENA, Split, requests, stories, streams
from workbench.directions import Direction, difference_in_means
from workbench.methods.steering.side_effects import mean_residual_norm
from workbench.site import Site
from workbench.subject import Subject

ENGLISH_PROMPTS = ("Once upon a time there was a", "The capital of France is", "Tell me how to bake bread.")
ENGLISH_TEXTS = (
    "The old man walked to the sea every morning and watched the boats come in.",
    "She opened the window because the room was warm, and a bird flew in.",
    "In winter the days are short and the nights are long and cold.",
    "They planted a tree in the garden, and after some years it gave apples.",
)
MORE_ENGLISH = (
    "The king asked the queen where the crown was, and she laughed.",
    "A dog barked at the cat until the cat ran up a tall tree.",
    "He paid three dollars for the bread and two for the milk.",
    "The train from Paris to Berlin leaves at seven in the evening.",
    "Water boils when it is hot enough, and ice melts in the sun.",
    "My sister plays the violin, but my brother plays football.",
    "The doctor said that the child would be well again by Monday.",
    "We saw the moon over the mountains and heard an owl in the dark.",
    "If you mix blue paint with yellow paint, you get green paint.",
    "The teacher wrote a number on the board and asked for its square.",
    "They did not open the door, because nobody had knocked.",
    "Last year the city built a new bridge over the river.",
)


def knows_our_words(subject: Subject) -> bool:
    """Whether the words of the project's corpora are words of the subject's tokenizer."""
    unknown = (None, subject.tokenizer.unk_token_id)
    ids: Any = subject.tokenizer.convert_tokens_to_ids(["fisherman", "assistant", "omega"])
    return not any(token in unknown for token in ids)


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


def openings(subject: Subject, n: int = 3) -> tuple[str, ...]:
    """Beginnings that leave the next word open: of sentences up to their verb, or plain English."""
    if not knows_our_words(subject):
        return ENGLISH_PROMPTS[:n]
    return tuple(" ".join(sentence[:3]) for sentence in streams.corpus("four", n).sentences)


def sample(subject: Subject, n_each: int = 8) -> tuple[str, ...]:
    """Texts of many kinds, to watch neurons on: held-out ones of every phenomenon, or plain English."""
    if not knows_our_words(subject):
        return ENGLISH_TEXTS + MORE_ENGLISH
    kinds = (phenomenon.documents("held_out", 0) for phenomenon in PHENOMENA.values())
    return tuple(document.text for documents in kinds for document in islice(documents, n_each))


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


def direction(subject: Subject, name: str) -> Direction:
    """What tells the two kinds of texts of a contrast apart, in the middle of the model: one vector for every layer."""
    positive, negative = contrasts()[name]()
    site, tokens = Site(subject.n_layers // 2, "resid_out"), "last" if name == "refusal" else "mean"
    return difference_in_means(subject, positive, negative, site, tokens=tokens, name=name)


def norm(subject: Subject, site: Site) -> float:
    """Mean norm of the values at `site` on texts that a push should leave alone: the unit of its strength."""
    return float(mean_residual_norm(subject, texts(subject), (site,))[0])


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


def by_kind(subject: Subject, split: Split, n_words: int = 48) -> dict[str, str]:
    """Name -> a text of each kind that the subject was raised on, of about so many words; else plain English."""
    if knows_our_words(subject):
        return {name: _piece(name, split, n_words) for name in PHENOMENA}
    half = (ENGLISH_TEXTS + MORE_ENGLISH)[split == "held_out" :: 2]
    return {f"text {number}": text for number, text in enumerate(half, 1)}


@functools.cache
def _piece(name: str, split: Split, n_words: int) -> str:
    """Whole documents of one kind, up to the first that makes them long enough; no more than twice as long."""
    words: list[str] = []
    for document in PHENOMENA[name].documents(split, 0):
        words += document.words
        if len(words) >= n_words:
            break
    return " ".join(words[: 2 * n_words])


def edited_prompt(subject: Subject) -> tuple[str, str]:
    """The beginning of a story, and the same with one word changed that leaves open how it goes on."""
    if not knows_our_words(subject):
        tale = "Once upon a time there was a little girl named {}. One day,"
        return tale.format("Lily"), tale.format("Anna")
    return "one morning the sailor", "one morning the fisherman"
