"""Streams of equally long sentences without punctuation, whose words, phrases and clauses come at fixed rates.

Law: slot p has class c_p; adjective and noun agree, a verb selects its object; rate = f_u * harmonic / U.
Source: An et al., 2025 (HFTP, arXiv 2510.13255), after Ding et al., 2016; sentences written by this project.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from .item import Document, Item, Split, checked, is_held_out
from .lexicon import ADVERBS, INTRANSITIVES, OBJECT_CLASSES, PARTICIPLES, SUBJECT_CLASSES, WORD_CLASSES

NAME = "streams"
HELD_OUT_ONE_IN = 4  # a sentence is held out when its adjective and noun are a held-out combination


@dataclass(frozen=True)
class UnitCorpus:
    """Sentences of U units each, all of one frame: the input of the frequency-tagging probe."""

    name: str
    sentences: tuple[tuple[str, ...], ...]
    slot_classes: tuple[str, ...] | None = None
    joiner: str = " "
    levels: tuple[tuple[str, int], ...] = (("sentence", 1), ("phrase", 2))


SLOT_CLASSES = {
    "four": ("adjective", "noun", "verb", "noun"),  # [adjective noun] [verb noun]
    "four_shifted": ("noun", "verb", "adjective", "noun"),  # [noun] [verb adjective noun]
    "eight": ("adjective", "noun", "verb", "noun", "participle", "noun", "intransitive", "adverb"),
}
LEVELS = {
    "four": (("sentence", 1), ("phrase", 2)),
    "four_shifted": (("sentence", 1), ("phrase", 2)),
    "eight": (("sentence", 1), ("clause", 2), ("phrase", 4)),
}
CAPACITY = {"four": 60, "four_shifted": 60, "eight": 56}  # sentences before a content word must come twice


def corpus(frame: str, n_sentences: int = 50, seed: int = 0, split: Split = "held_out") -> UnitCorpus:
    """Sentences of one frame in which every word occurs at most once, so that no neuron repeats for lexical reasons."""
    if frame not in SLOT_CLASSES:
        raise ValueError(f"streams.corpus: got frame {frame!r}, expected one of {sorted(SLOT_CLASSES)}.")
    if not 1 <= n_sentences <= CAPACITY[frame]:
        raise ValueError(
            f"streams.corpus: got n_sentences={n_sentences}, frame {frame!r} has distinct words for 1 to "
            f"{CAPACITY[frame]}. Ask for fewer, or join corpora of several seeds."
        )
    rng = Random(f"streams {checked(split)} {frame} {seed}")
    classes = [i % 4 for i in range(n_sentences)]
    subjects, spare_nouns = _subjects(rng, classes, split)
    objects = _objects(rng, [i % 4 for i in range(n_sentences)])
    order = list(zip(subjects, rng.sample(objects, n_sentences), strict=True))
    rng.shuffle(order)
    sentences = [_arrange(frame, subject, target) for subject, target in order]
    if frame == "eight":
        clauses = [rng.sample(words, n_sentences) for words in (PARTICIPLES, spare_nouns, INTRANSITIVES, ADVERBS)]
        sentences = [a + b for a, b in zip(sentences, zip(*clauses, strict=True), strict=True)]
    return UnitCorpus(f"{frame}-{split}-{seed}", tuple(sentences), SLOT_CLASSES[frame], " ", LEVELS[frame])


def _arrange(frame: str, subject: tuple[str, str], target: tuple[str, str]) -> tuple[str, ...]:
    (adjective, noun), (verb, thing) = subject, target
    return (thing, verb, adjective, noun) if frame == "four_shifted" else (adjective, noun, verb, thing)


def _subjects(rng: Random, classes: list[int], split: Split) -> tuple[list[tuple[str, str]], list[str]]:
    """Agreeing (adjective, noun) pairs of one split without a repeated word, and the nouns that are left over."""
    pairs, spare = [], []
    for k, (adjectives, nouns) in enumerate(SUBJECT_CLASSES):
        while True:  # a greedy draw can run out of partners; a fresh order soon succeeds
            free = rng.sample(range(len(nouns)), len(nouns))
            chosen = []
            for i in rng.sample(range(len(adjectives)), classes.count(k)):
                j = next((j for j in free if _pair_split(i, j) == split), None)
                if j is None:
                    break
                free.remove(j)
                chosen.append((adjectives[i], nouns[j]))
            if len(chosen) == classes.count(k):
                break
        pairs += chosen
        spare += [nouns[j] for j in free]
    return pairs, spare


def _objects(rng: Random, classes: list[int]) -> list[tuple[str, str]]:
    """(verb, object) pairs in which the verb selects the class of its object, without a repeated word."""
    pairs = []
    for k, (verbs, nouns) in enumerate(OBJECT_CLASSES):
        n = classes.count(k)
        pairs += zip(rng.sample(verbs, n), rng.sample(nouns, n), strict=True)
    return pairs


def _pair_split(i: int, j: int) -> Split:
    return "held_out" if is_held_out(i, j, HELD_OUT_ONE_IN) else "train"


def sentence(frame: str, rng: Random, split: Split = "train") -> tuple[str, ...]:
    """One sentence drawn freely: words may come back later in the stream."""
    checked(split)
    adjectives, nouns = rng.choice(SUBJECT_CLASSES)
    i, j = rng.randrange(len(adjectives)), rng.randrange(len(nouns))
    while _pair_split(i, j) != split:
        j = rng.randrange(len(nouns))
    verbs, things = rng.choice(OBJECT_CLASSES)
    words = _arrange(frame, (adjectives[i], nouns[j]), (rng.choice(verbs), rng.choice(things)))
    if frame == "eight":
        second = rng.choice(rng.choice(SUBJECT_CLASSES)[1])
        words += (rng.choice(PARTICIPLES), second, rng.choice(INTRANSITIVES), rng.choice(ADVERBS))
    return words


def vocabulary() -> tuple[str, ...]:
    """Every word a stream can hold."""
    return tuple(word for words in WORD_CLASSES.values() for word in words)


def document(rng: Random, split: Split = "train", n_words: int = 200) -> Document:
    """An excerpt of one endless stream of one frame; the reader has to find the frame without a cue."""
    frame = rng.choice(("four", "four_shifted", "eight", "eight"))
    n_sentences = max(2, n_words // len(SLOT_CLASSES[frame]))
    words = tuple(word for _ in range(n_sentences) for word in sentence(frame, rng, split))
    return Document(words, NAME, closed=False)


def documents(split: Split, seed: int, n_words: int = 200) -> Iterator[Document]:
    """Streams without end."""
    rng = Random(f"streams documents {checked(split)} {seed}")
    while True:
        yield document(rng, split, n_words)


def items(split: Split, seed: int = 0, n_per_frame: int = 150) -> list[Item]:
    """Next-word questions from the second sentence on; the tag `slot_class` says which words would be right."""
    rng = Random(f"streams items {checked(split)} {seed}")
    found = []
    for frame, slots in SLOT_CLASSES.items():
        for n in range(n_per_frame):
            words = [w for row in corpus(frame, 20, seed * n_per_frame + n, split).sentences for w in row]
            at = rng.randrange(len(slots), len(words))
            tags = (("frame", frame), ("slot_class", slots[at % len(slots)]), ("slot", at % len(slots)))
            found.append(Item(" ".join(words[:at]), words[at], NAME, frame, split, tags))
    return found


# --- a Chinese-style corpus for probes of characters: never part of the organism's training ---
_CHARACTERS = {
    "adjective": (
        "新老小大白黑红青黄绿高矮胖瘦冷热甜苦酸咸快慢远近深浅厚薄软硬干湿轻重贵美丑忙闲饿饱醉笨勇贪懒静吵香臭圆方"
    ),
    "noun": ("人猫狗鸟鱼马牛羊猪鸡鸭鹅虎狼熊猴兔鼠蛇龙龟蛙蜂蝶蚁虫鹰燕鸽鹤象鹿驴狐狮豹猿鲸虾蟹兵王民匠农工师生客盗"),
    "verb": ("吃喝看听说写读唱买卖拿放推拉抱背洗擦切煮炒烤种挖扫搬修造画做找追赶打踢抓咬舔闻尝送收借还偷藏丢扔举提"),
    "object": ("饭茶水酒汤面饼糖盐油米豆瓜果桃梨枣杏花草树叶根木石沙土泥山河湖海桥路门窗桌椅床灯书笔纸刀锅碗杯盘鞋帽"),
}


def characters(n_sentences: int = 50, seed: int = 0) -> UnitCorpus:
    """Sentences of four characters, joined by nothing: adjective noun verb object, each character at most once."""
    room = min(len(row) for row in _CHARACTERS.values())
    if not 1 <= n_sentences <= room:
        raise ValueError(f"streams.characters: got n_sentences={n_sentences}, expected 1 to {room}. Ask for fewer.")
    rng = Random(f"characters {seed}")
    columns = [rng.sample(row, n_sentences) for row in _CHARACTERS.values()]
    return UnitCorpus(f"characters-{seed}", tuple(zip(*columns, strict=True)), tuple(_CHARACTERS), "")
