"""Two classes of texts that differ in one property: the data from which a direction is found, chosen and tested.

Sources of texts: this project's own requests, or a JSON file; a chat model's own template is put around each of them.
Source of the split into training and validation: Arditi et al. 2024, section 2.3.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from workbench.corpora import requests

if TYPE_CHECKING:
    from workbench.subject import Subject

Text = str | tuple[int, ...]
Class = tuple[str, ...] | tuple[tuple[int, ...], ...]
LISTS = (("harmful", "harmless"), ("positive", "negative"))  # what the two lists of a file may be called


@dataclass(frozen=True)
class Contrast:
    """Texts of two classes; a direction found on them points from `negative` to `positive`.

    positive, negative   texts, or token ids, which are taken as they are
    names                what the classes are called in tables and titles
    """

    positive: Class
    negative: Class
    names: tuple[str, str] = ("positive", "negative")

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"Contrast: got one string as {name} texts, expected a list: [{getattr(self, name)[:30]!r}]."
                )
            object.__setattr__(self, name, tuple(_as_text(text) for text in getattr(self, name)))
        if not self.positive or not self.negative:
            raise ValueError(
                f"Contrast: got {len(self.positive)} {self.names[0]} and {len(self.negative)} {self.names[1]} texts, "
                "expected some of each."
            )

    def __len__(self) -> int:
        return len(self.positive) + len(self.negative)

    @classmethod
    def of(cls, data: Any) -> Contrast:
        """A Contrast, or a pair (positive texts, negative texts), as a Contrast."""
        if isinstance(data, cls):
            return data
        if isinstance(data, str) or not isinstance(data, Sequence) or len(data) != 2:
            raise ValueError(f"Contrast: got {data!r:.60}, expected a pair (positive texts, negative texts).")
        return cls(*data)

    @classmethod
    def requests(cls, split: str = "train", seed: int = 0) -> Contrast:
        """The project's own requests that the organism refuses, against those that it answers."""
        items = requests.items(split, seed)  # type: ignore[arg-type]
        forms = ("harmful", "harmless")
        harmful, harmless = (tuple(item.prompt for item in items if item.form == form) for form in forms)
        return cls(harmful, harmless, forms)

    @classmethod
    def read(cls, path: str | Path) -> Contrast:
        """The two lists of a JSON file {"harmful": [...], "harmless": [...]}: texts, or {"instruction": text} each.

        "harmless" may also be missing where the file's name has "harmful" in it and a sister file has "harmless".
        """
        path = Path(path)
        content = json.loads(path.read_text())
        if isinstance(content, list) and "harmful" in path.name:
            sister = path.with_name(path.name.replace("harmful", "harmless"))
            content = {"harmful": content, "harmless": json.loads(sister.read_text())}
        for names in LISTS:
            if isinstance(content, dict) and set(names) <= set(content):
                positive, negative = (tuple(map(_instruction, content[name])) for name in names)
                return cls(positive, negative, names)
        raise ValueError(
            f'Contrast: {path} holds no two lists of texts, expected {{"harmful": [...], "harmless": [...]}}.'
        )

    def chat(self, subject: Subject) -> Contrast:
        """Each text as the user's turn in the model's chat template, up to the answer; unchanged without a template.

        As token ids: the template writes its own begin-of-sequence token, and tokenizing its text would add another.
        """
        tokenizer = subject.tokenizer
        if not tokenizer.chat_template:
            return self

        def asked(text: Text) -> Text:
            if not isinstance(text, str):
                return text
            turn = [{"role": "user", "content": text}]
            return tuple(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))  # type: ignore[arg-type]

        return replace(self, positive=tuple(map(asked, self.positive)), negative=tuple(map(asked, self.negative)))

    def take(self, n: int) -> Contrast:
        """The first `n` texts of each class."""
        return replace(self, positive=self.positive[:n], negative=self.negative[:n])

    def shuffled(self, seed: int = 0) -> Contrast:
        """The same texts with their classes drawn by lot: a contrast without content, for a null."""
        texts = [*self.positive, *self.negative]
        Random(f"shuffled {seed}").shuffle(texts)
        cut = len(self.positive)
        return replace(self, positive=tuple(texts[:cut]), negative=tuple(texts[cut:]))

    def split(self, n_train: int, n_validation: int, seed: int = 0) -> tuple[Contrast, Contrast]:
        """(training, validation) texts of each class, without overlap; as many as there are where they are fewer.

        Where the texts don't suffice for both, validation gets the same share of them as it would have had.
        """
        parts = []
        for texts in (self.positive, self.negative):
            drawn = list(texts)
            Random(f"split {seed}").shuffle(drawn)
            if len(drawn) < 2:
                raise ValueError("Contrast: got a class of one text, expected two or more: one to find, one to choose.")
            held = max(1, min(n_validation, len(drawn) * n_validation // (n_train + n_validation)))
            parts.append((tuple(drawn[held : held + n_train]), tuple(drawn[:held])))
        found, chosen = zip(*parts, strict=True)
        return replace(self, positive=found[0], negative=found[1]), replace(
            self, positive=chosen[0], negative=chosen[1]
        )


def constant_suffix(subject: Subject, contrast: Contrast) -> int:
    """How many tokens at the end all texts have in common: the template's, where no text differs."""
    ids = subject.tokenize(contrast.positive).ids + subject.tokenize(contrast.negative).ids
    shortest = min(map(len, ids))
    same = (len({line[-n] for line in ids}) == 1 for n in range(1, shortest + 1))
    return next((n for n, equal in enumerate(same) if not equal), shortest)


def _as_text(text: Any) -> Text:
    return text if isinstance(text, str) else tuple(int(token) for token in text)


def _instruction(item: Any) -> str:
    text = item.get("instruction") if isinstance(item, dict) else item
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'Contrast: got the item {item!r:.60}, expected a text or {{"instruction": text}}.')
    return text
