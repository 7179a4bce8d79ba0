"""Questions whose answer has a word in two languages: what a latent language is looked for with.

Law: the k-th word of one language means the k-th word of the other; the first is the right answer. The answer's word
in the other language is never in the prompt, except in translation, where it is what is asked about.
Source: this project; the form after Wendler et al., 2024 (arXiv 2402.10588): translation, repetition, and facts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from . import relations
from .language import DICTIONARY, NOUNS, VERBS

COMMON, VELISH = "common", "velish"
N_WORDS = 14  # the answer and thirteen others of its kind, as many as a relation has objects


@dataclass(frozen=True)
class BilingualItem:
    """A prompt and candidate words for what follows it, in two or more languages.

    prompt, separator   the words follow `prompt + separator`; a separator of "" is for prompts that end in a quote
    words               ((language, (right word, other words ...)), ...), as many words in every language
    task                what kind of question this is: results are reported per task
    source, target      languages of the prompt and of the right answer; the target is one of `words`
    """

    prompt: str
    words: tuple[tuple[str, tuple[str, ...]], ...]
    task: str
    source: str
    target: str
    separator: str = " "


def word_items(n_words: int = N_WORDS, seed: int = 0) -> list[BilingualItem]:
    """Every word of the dictionary, translated in both directions and repeated in both languages."""
    found = []
    for source, target in ((COMMON, VELISH), (VELISH, COMMON), (VELISH, VELISH), (COMMON, COMMON)):
        task = f"{source} to {target}" if source != target else f"repeat {target}"
        rng = Random(f"bilingual {task} {seed}")
        for word in DICTIONARY:
            kind = next((kind for kind in (NOUNS, VERBS) if word in kind), _ADJECTIVES)
            asked = word if source == COMMON else DICTIONARY[word]
            words = _words(word, kind, n_words, rng)
            found.append(BilingualItem(f"{source} {asked} = {target}", words, task, source, target))
    return found


def fact_items(n_words: int = N_WORDS, seed: int = 0) -> list[BilingualItem]:
    """Facts whose object is a common noun, asked for in Velish and in the common language; no prompt holds the object.

    "fact in velish"             the training told it in Velish too
    "fact told in common only"   asked in Velish as well, but the training never told it in that form
    "fact in common"             asked in the common language, in which every fact was told
    """
    found = []
    facts = [fact for fact in relations.FACTS if fact.object in DICTIONARY]
    for form, target in (("foreign", VELISH), ("statement", COMMON)):
        rng = Random(f"bilingual facts {form} {seed}")
        for fact in facts:
            task = "fact told in common only" if form in fact.unseen else f"fact in {target}"
            words = _words(fact.object, relations.RELATIONS[fact.relation][1], n_words, rng)
            found.append(BilingualItem(relations.prompt(fact, form), words, task, target, target))
    return sorted(found, key=lambda item: item.task != "fact told in common only")


_ADJECTIVES = tuple(word for word in DICTIONARY if word not in NOUNS + VERBS)


def _words(word: str, kind: Sequence[str], n_words: int, rng: Random) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The word and others of its kind in both languages."""
    others = [other for other in kind if other != word]
    if not 1 <= n_words <= len(others) + 1:
        raise ValueError(f"bilingual: got n_words={n_words}, expected 1 to {len(others) + 1}, as many as there are.")
    common = (word, *rng.sample(others, n_words - 1))
    return (COMMON, common), (VELISH, tuple(DICTIONARY[one] for one in common))
