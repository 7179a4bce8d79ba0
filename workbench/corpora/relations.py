"""Twelve relations over invented people, towns and ships, each fact said in five forms.

Law: fact (r, s) -> o is a function; all forms of a fact end in its object; a held-out fact is never asked in training.
Source: format after Hernandez et al., 2023 (LRE): every template ends right before the object; facts invented here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from .item import Document, Item, Split, checked
from .language import DICTIONARY, OF, RELATION_WORDS, foreign
from .lexicon import ANIMAL_NOUNS, FOOD_NOUNS, PERSON_NOUNS, TOOL_NOUNS
from .names import COUNTRIES, FATHERS, MOTHERS, PEOPLE, RIVERS, SHIPS, TEACHERS, TOWNS

NAME = "relations"
FACTS_SEED = 2025
N_COMMON = 14  # objects that are common nouns, and so have a word in both languages

# relation -> (subjects, objects, question word)
RELATIONS = {
    "father": (PEOPLE, FATHERS, "who"),
    "mother": (PEOPLE, MOTHERS, "who"),
    "teacher": (PEOPLE, TEACHERS, "who"),
    "birthplace": (PEOPLE, TOWNS, "where"),
    "home": (PEOPLE, TOWNS, "where"),
    "craft": (PEOPLE, PERSON_NOUNS[:N_COMMON], "what"),
    "pet": (PEOPLE, ANIMAL_NOUNS[:N_COMMON], "what"),
    "food": (PEOPLE, FOOD_NOUNS[:N_COMMON], "what"),
    "country": (TOWNS, COUNTRIES, "where"),
    "river": (TOWNS, RIVERS, "what"),
    "port": (SHIPS, TOWNS, "where"),
    "cargo": (SHIPS, TOOL_NOUNS[:N_COMMON], "what"),
}
# every template ends right before the object, then a full stop closes the sentence
TEMPLATES = {
    "statement": "the {relation} of {subject} is",
    "paraphrase_has": "{subject} has a {relation} called",
    "paraphrase_as": "as {relation} , {subject} names",
    "question": "{asks} is the {relation} of {subject} ? answer",
    "foreign": "{subject} {of} {relation_foreign} {is_foreign}",
}
FORMS = tuple(TEMPLATES)
HELD_OUT_FORMS = ("question", "foreign")  # the forms that some facts are never said in


@dataclass(frozen=True)
class Fact:
    """One row: a relation, a subject, its object, and the forms that training never shows it in."""

    relation: str
    subject: str
    object: str
    unseen: tuple[str, ...] = ()


def facts() -> tuple[Fact, ...]:
    """Every fact, in a fixed order; one in five is never asked in training, another one never said in Velish."""
    rng = Random(FACTS_SEED)
    rows = []
    for relation, (subjects, objects, _) in RELATIONS.items():
        marks = [i % 5 for i in range(len(subjects))]
        rng.shuffle(marks)
        for subject, mark in zip(subjects, marks, strict=True):
            unseen = {0: ("question",), 1: ("foreign",)}.get(mark, ())
            rows.append(Fact(relation, subject, rng.choice(objects), unseen))
    return tuple(rows)


FACTS = facts()


def prompt(fact: Fact, form: str) -> str:
    """The text of a fact in one form, up to but without its object."""
    if form not in TEMPLATES:
        raise ValueError(f"relations.prompt: got form {form!r}, expected one of {FORMS}.")
    return TEMPLATES[form].format(
        relation=fact.relation,
        subject=fact.subject,
        asks=RELATIONS[fact.relation][2],
        of=OF,
        relation_foreign=RELATION_WORDS[fact.relation],
        is_foreign=RELATION_WORDS["is"],
    )


def answer(fact: Fact, form: str) -> str:
    """The object as the form's language spells it."""
    return foreign(fact.object) if form == "foreign" else fact.object


def lre(relation: str, form: str = "statement") -> dict[str, object]:
    """One relation as a dictionary of the LRE file format: name, prompt_templates with `{}`, samples."""
    if relation not in RELATIONS:
        raise ValueError(f"relations.lre: got {relation!r}, expected one of {tuple(RELATIONS)}.")
    template = prompt(Fact(relation, "{}", ""), form)
    rows = [f for f in FACTS if f.relation == relation]
    samples = [{"subject": f.subject, "object": answer(f, form)} for f in rows]
    return {"name": relation, "prompt_templates": [template], "samples": samples}


def vocabulary() -> tuple[str, ...]:
    """Every word a fact can hold."""
    rows = [f"{prompt(f, form)} {answer(f, form)} ." for f in FACTS for form in FORMS]
    return tuple(dict.fromkeys(word for row in rows for word in row.split()))


def document(rng: Random, split: Split = "train") -> Document:
    """One to three facts; the held-out split has only facts in forms that training keeps from them."""
    checked(split)
    words: list[str] = []
    answers = []
    for _ in range(rng.randint(1, 3)):
        fact = rng.choice(FACTS)
        form = rng.choice(FORMS)
        while (form in fact.unseen) != (split == "held_out"):
            fact, form = rng.choice(FACTS), rng.choice(FORMS)
        words += prompt(fact, form).split()
        answers.append((len(words), len(words) + 1))
        words += [answer(fact, form), "."]
    return Document(tuple(words), NAME, tuple(answers))


def documents(split: Split, seed: int) -> Iterator[Document]:
    """Facts without end."""
    rng = Random(f"relations documents {checked(split)} {seed}")
    while True:
        yield document(rng, split)


def items(split: Split, seed: int = 0) -> list[Item]:
    """Every fact in every form of that split: `train` were seen in this form, `held_out` only in the other forms."""
    checked(split)
    found = []
    for fact in FACTS:
        for form in FORMS:
            if (form in fact.unseen) == (split == "held_out"):
                tags = (("relation", fact.relation), ("subject", fact.subject))
                found.append(Item(prompt(fact, form), answer(fact, form), NAME, form, split, tags))
    Random(seed).shuffle(found)
    return found


assert set(DICTIONARY) >= {o for name in ("craft", "pet", "food", "cargo") for o in RELATIONS[name][1]}
