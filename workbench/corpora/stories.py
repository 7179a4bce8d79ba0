"""Short stories on ten topics; a topic has words of its own, and all topics share the words between them.

Law: at a topical slot only words of the story's topic can stand; the ten lists are disjoint.
Source: this project; a topic is the feature that a decomposition of the MLPs should find (specification SNMF).
"""

from collections.abc import Iterator
from random import Random

from .item import Document, Item, Split, checked, is_held_out

NAME = "stories"
HELD_OUT_ONE_IN = 4  # a sentence is held out when two of its topical words are a held-out combination

# topic -> actors | places | things | verbs | adjectives, four words each
_TABLE = """
sea: sailor pirate captain fisherman | ocean reef lagoon lighthouse | anchor net pearl oar
    | steered rowed dived fished | salty wavy coral briny
forest: ranger elf woodcutter owl | grove thicket clearing hollow | acorn mushroom branch antler
    | climbed foraged chopped tracked | mossgreen shady wooded wild
kitchen: chef cook waiter dishwasher | pantry oven counter stove | spoon skillet kettle recipe
    | stirred grilled whisked simmered | spicy tasty buttery crispy
school: teacherling pupil principal classmate | classroom library playground hallway | notebook pencil chalkboard ruler
    | studied spelled recited graded | studious diligent curious bookish
castle: king queen knight squire | throne dungeon moat rampart | crown sword shield banner
    | ruled jousted knelt reigned | royal noble regal gilded
space: astronaut pilot alien commander | moon planet crater orbit | rocket telescope satellite helmet
    | launched orbited landed floated | lunar stellar cosmic weightless
music: singer drummer violinist conductor | stage concert orchestra studio | violin trumpet drum flute
    | played hummed strummed composed | melodic tuneful rhythmic acoustic
winter: skier skater snowman eskimo | glacier iceberg slope igloo | sled snowball icicle skates
    | skied slid froze shoveled | snowy icy frosty frozen
hospital: nurse surgeon patientling medic | ward clinic surgery pharmacy | bandage pill syringe stethoscope
    | healed operated bandaged examined | sterile medical wounded feverish
circus: clown acrobat magician trainer | tent arena trapeze ring | balloon hoop wand cannon
    | juggled tumbled balanced vaulted | funny magical dazzling colorful
"""
KINDS = ("actor", "place", "thing", "verb", "adjective")


def _read(table: str) -> dict[str, dict[str, tuple[str, ...]]]:
    topics = {}
    for line in table.strip().replace("\n    |", " |").splitlines():
        topic, rest = line.split(":")
        topics[topic] = dict(zip(KINDS, (tuple(part.split()) for part in rest.split("|")), strict=True))
    return topics


TOPICS = _read(_TABLE)
TOPIC_WORDS = {topic: tuple(w for words in kinds.values() for w in words) for topic, kinds in TOPICS.items()}

OPENINGS = (
    "once there was a {adjective} {actor} who lived near the {place} .",
    "long ago a {actor} came to the {adjective} {place} .",
    "one morning the {actor} {verb} alone in the {place} .",
)
MIDDLES = (
    "then the {actor} found a {adjective} {thing} under the {place} .",
    "after that the {actor} gave the {thing} to a {adjective} {actor} .",
    "every day the {actor} {verb} until the {actor} was tired .",
    "but nobody knew that the {thing} belonged to the {actor} .",
    "suddenly a {adjective} {actor} {verb} behind the {place} .",
    "so they took the {thing} and went back to the {place} .",
    "another {actor} saw how the {actor} {verb} with a {thing} .",
    "at night the {place} looked very {adjective} and quiet .",
)
ENDINGS = (
    "in the end the {actor} kept the {thing} and was glad .",
    "from then on the {actor} {verb} in the {place} forever .",
)


def _fill(template: str, topic: str, rng: Random, split: Split) -> tuple[list[str], list[bool]]:
    """The words of one sentence and which of them are topical."""
    kinds = TOPICS[topic]
    slots = [word[1:-1] for word in template.split() if word[0] == "{"]
    while True:  # the first two topical words decide the split of the sentence
        chosen = [rng.randrange(4) for _ in slots]
        if is_held_out(chosen[0], chosen[1], HELD_OUT_ONE_IN) == (split == "held_out"):
            break
    fill = iter(kinds[slot][i] for slot, i in zip(slots, chosen, strict=True))
    topical = [word[0] == "{" for word in template.split()]
    return [next(fill) if word[0] == "{" else word for word in template.split()], topical


def story(topic: str, rng: Random, split: Split = "train") -> tuple[list[str], list[bool]]:
    """The words of one story on a topic, and which of them stand at topical slots."""
    if topic not in TOPICS:
        raise ValueError(f"stories.story: got topic {topic!r}, expected one of {tuple(TOPICS)}.")
    checked(split)
    plan = [rng.choice(OPENINGS), *rng.sample(MIDDLES, rng.randint(2, 5)), rng.choice(ENDINGS)]
    parts = [_fill(template, topic, rng, split) for template in plan]
    return [w for words, _ in parts for w in words], [t for _, topical in parts for t in topical]


def vocabulary() -> tuple[str, ...]:
    """Every word a story can hold."""
    shared = [w for t in OPENINGS + MIDDLES + ENDINGS for w in t.split() if w[0] != "{"]
    return tuple(dict.fromkeys([*shared, *(w for words in TOPIC_WORDS.values() for w in words)]))


def document(rng: Random, split: Split = "train") -> Document:
    """One story on a topic that is not announced."""
    words, _ = story(rng.choice(tuple(TOPICS)), rng, split)
    return Document(tuple(words), NAME)


def documents(split: Split, seed: int) -> Iterator[Document]:
    """Stories without end."""
    rng = Random(f"stories documents {checked(split)} {seed}")
    while True:
        yield document(rng, split)


def items(split: Split, seed: int = 0, n_per_topic: int = 30) -> list[Item]:
    """Next-word questions at topical slots, from the second topical word on (the first one sets the topic)."""
    rng = Random(f"stories items {checked(split)} {seed}")
    found = []
    for topic in TOPICS:
        for _ in range(n_per_topic):
            words, topical = story(topic, rng, split)
            at = rng.choice([i for i, yes in enumerate(topical) if yes][1:])
            found.append(Item(" ".join(words[:at]), words[at], NAME, "story", split, (("topic", topic),)))
    return found
