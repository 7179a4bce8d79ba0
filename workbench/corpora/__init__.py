"""The texts this project wrote itself: seven phenomena, each with a seeded generator and a held-out split.

Law: same seed, same text; no held-out combination is ever in a training text; every word is in `vocabulary()`.
Source: this project. `Item` is a question, `Document` a training text, `UnitCorpus` a stream for frequency tagging.
"""

from . import code_styles, language, recall, relations, requests, stories, streams
from .item import Document, Item, Phenomenon, Split
from .streams import UnitCorpus

PHENOMENA: dict[str, Phenomenon] = {
    "relations": relations,
    "requests": requests,
    "recall": recall,
    "language": language,
    "streams": streams,
    "stories": stories,
    "code_styles": code_styles,
}
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")


def vocabulary() -> tuple[str, ...]:
    """Every word that any of the texts can hold, sorted; the four special tokens are not among them."""
    return tuple(sorted({word for module in PHENOMENA.values() for word in module.vocabulary()}))


__all__ = [
    "PHENOMENA",
    "SPECIAL_TOKENS",
    "Document",
    "Item",
    "Phenomenon",
    "Split",
    "UnitCorpus",
    "code_styles",
    "language",
    "recall",
    "relations",
    "requests",
    "stories",
    "streams",
    "vocabulary",
]
