"""Velish, a small second language: a dictionary and another word order.

Law: adjective noun1 verb noun2  <->  noun1' adjective' noun2' verb'  (noun before adjective, verb last), word by word.
Source: this project; built so that a latent first language can be looked for (Wendler et al., 2024, arXiv 2402.10588).
"""

from collections.abc import Iterator
from random import Random

from .item import Document, Item, Split, checked, is_held_out, words
from .lexicon import (
    ANIMAL_ADJECTIVES,
    ANIMAL_NOUNS,
    FOOD_NOUNS,
    FOOD_VERBS,
    PERSON_ADJECTIVES,
    PERSON_NOUNS,
    TOOL_NOUNS,
    TOOL_VERBS,
)
from .names import VELISH_WORDS

NAME = "language"
HELD_OUT_ONE_IN = 5  # a sentence is held out when its first noun and its verb are a held-out combination
FORMS = ("to_velish", "to_common", "word_to_velish", "word_to_common", "repeat_velish", "repeat_common")

SUBJECTS = ((PERSON_ADJECTIVES[:8], PERSON_NOUNS[:14]), (ANIMAL_ADJECTIVES[:8], ANIMAL_NOUNS[:14]))
TARGETS = ((FOOD_VERBS[:8], FOOD_NOUNS[:14]), (TOOL_VERBS[:8], TOOL_NOUNS[:14]))
NOUNS = tuple(word for lists in SUBJECTS + TARGETS for word in lists[1])
VERBS = tuple(word for verbs, _ in TARGETS for word in verbs)
COMMON_WORDS = NOUNS + VERBS + tuple(word for adjectives, _ in SUBJECTS for word in adjectives)

DICTIONARY = dict(zip(COMMON_WORDS, VELISH_WORDS, strict=False))  # the list of Velish words has some to spare
_GRAMMAR = words("father mother teacher birthplace home craft pet food country river port cargo is")
RELATION_WORDS = dict(zip(_GRAMMAR, VELISH_WORDS[len(COMMON_WORDS) :], strict=False))
OF = VELISH_WORDS[-1]


def foreign(word: str) -> str:
    """The Velish word for a word of the common language; a name is the same in both."""
    return DICTIONARY.get(word, word)


def translate(sentence: tuple[str, ...]) -> tuple[str, ...]:
    """A four-word sentence of the common language in Velish words and Velish order."""
    if len(sentence) != 4 or any(word not in DICTIONARY for word in sentence):
        raise ValueError(f"language.translate: got {sentence}, expected adjective noun verb noun of the dictionary.")
    adjective, noun, verb, thing = sentence
    return tuple(DICTIONARY[word] for word in (noun, adjective, thing, verb))


def sentence(rng: Random, split: Split = "train") -> tuple[str, ...]:
    """One common-language sentence whose words are all in the dictionary."""
    checked(split)
    while True:
        adjectives, nouns = rng.choice(SUBJECTS)
        verbs, things = rng.choice(TARGETS)
        noun, verb = rng.choice(nouns), rng.choice(verbs)
        if is_held_out(NOUNS.index(noun), VERBS.index(verb), HELD_OUT_ONE_IN) == (split == "held_out"):
            return rng.choice(adjectives), noun, verb, rng.choice(things)


def _pair(form: str, rng: Random, split: Split) -> tuple[str, tuple[str, ...]]:
    """A prompt of one form and the words that must follow it."""
    if form.startswith(("word", "repeat")):
        word = rng.choice(COMMON_WORDS)
        source = DICTIONARY[word] if form in ("word_to_common", "repeat_velish") else word
        target = word if form.endswith("common") else DICTIONARY[word]
        first, second = (source,), (target,)
    else:
        common = sentence(rng, split)
        first, second = common, translate(common)
        if form == "to_common":
            first, second = second, first
    names = {"to_velish": ("common", "velish"), "to_common": ("velish", "common")}
    names |= {f"word_{name}": pair for name, pair in list(names.items())}
    names |= {f"repeat_{name}": (name, name) for name in ("velish", "common")}
    here, there = names[form]
    return f"{here} {' '.join(first)} = {there}", second


def vocabulary() -> tuple[str, ...]:
    """Every word of the second language's texts."""
    return ("common", "velish", "=", ".", *COMMON_WORDS, *(DICTIONARY[word] for word in COMMON_WORDS))


def document(rng: Random, split: Split = "train") -> Document:
    """One translated sentence, or a few word pairs."""
    checked(split)
    sentences = rng.random() < 0.7
    forms = FORMS[:2] if sentences else FORMS[2:]
    said: list[str] = []
    answers = []
    for _ in range(1 if sentences else rng.randint(1, 3)):
        prompt, target = _pair(rng.choice(forms), rng, split)
        said += prompt.split()
        answers.append((len(said), len(said) + len(target)))
        said += [*target, "."]
    return Document(tuple(said), NAME, tuple(answers))


def documents(split: Split, seed: int) -> Iterator[Document]:
    """Translations without end."""
    rng = Random(f"language documents {checked(split)} {seed}")
    while True:
        yield document(rng, split)


def items(split: Split, seed: int = 0, n_per_form: int = 200) -> list[Item]:
    """Translations to finish. Word pairs have no held-out split: an unseen dictionary entry cannot be known."""
    rng = Random(f"language items {checked(split)} {seed}")
    found = []
    for form in FORMS if split == "train" else FORMS[:2]:
        for _ in range(n_per_form):
            prompt, target = _pair(form, rng, split)
            found.append(Item(prompt, " ".join(target), NAME, form, split))
    return found
