"""Facts as prompts to complete, of this project or of any LRE file: which ones a model answers, and a fair split.

A fact (relation, subject) -> object is asked in several templates, each ending right before the object.
Source: Hernandez et al., 2023 (LRE, its file format); Liu et al., 2025 (arXiv 2502.17355): two tokens, a prefix counts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.corpora import relations
from workbench.generation import text_of

if TYPE_CHECKING:
    from workbench.subject import Subject

PAPER_TOKENS = 2  # new tokens that the paper judges


@dataclass(frozen=True)
class Prompt:
    """One fact in one template: the text up to its object, and what may follow."""

    relation: str
    subject: str
    template: str  # its name
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Facts of several relations, each in one or more templates."""

    prompts: tuple[Prompt, ...]
    name: str = "facts"

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def relations(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(prompt.relation for prompt in self.prompts))

    @property
    def templates(self) -> tuple[str, ...]:
        """Names of the templates that every relation has."""
        by_relation = {name: {p.template for p in self.prompts if p.relation == name} for name in self.relations}
        names = dict.fromkeys(prompt.template for prompt in self.prompts)
        return tuple(name for name in names if all(name in have for have in by_relation.values()))

    def where(self, keep: Callable[[Prompt], bool]) -> Facts:
        """The prompts for which `keep` holds."""
        return Facts(tuple(prompt for prompt in self.prompts if keep(prompt)), self.name)

    def of(self, template: str) -> Facts:
        """The prompts of one template."""
        if template not in self.templates:
            raise ValueError(
                f"Facts: got template {template!r}, expected one that all relations have: {', '.join(self.templates)}."
            )
        return self.where(lambda prompt: prompt.template == template)

    def split(self, held_out: float, seed: int = 0) -> tuple[Facts, Facts]:
        """(detection, evaluation): at least a share `held_out` of every relation's subjects is for evaluation.

        No subject is in both, whatever the relation: a name that was seen with one relation tells about the others.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"Facts: got held_out={held_out}, expected a share between 0 and 1.")
        subjects = {name: {p.subject for p in self.prompts if p.relation == name} for name in self.relations}
        lacking = {name: max(1, round(held_out * len(own))) for name, own in subjects.items()}
        pool, chosen = sorted(set().union(*subjects.values())), set()
        for index in np.random.default_rng(seed).permutation(len(pool)):
            wanted = [name for name, own in subjects.items() if pool[index] in own and lacking[name] > 0]
            if wanted:
                chosen.add(pool[index])
                lacking |= {name: lacking[name] - (pool[index] in own) for name, own in subjects.items()}
        return self.where(lambda p: p.subject not in chosen), self.where(lambda p: p.subject in chosen)


@functools.cache
def project_facts() -> Facts:
    """The project's own twelve relations, in their five forms; "foreign" asks and answers in the second language."""
    made = [
        Prompt(fact.relation, fact.subject, form, relations.prompt(fact, form), (relations.answer(fact, form),))
        for form in relations.FORMS
        for fact in relations.FACTS
    ]
    return Facts(tuple(made), "the project's relations")


def read_lre(path: str | Path, *, suffix: str = "") -> Facts:
    """Facts from one LRE-format JSON file, or from all such files under a folder.

    A file has `name`, `prompt_templates` with {} for the subject, and `samples` of subject and object; its
    `prompt_templates_zs` are read too. The n-th template is called "prompt n", the n-th zero-shot one "zero-shot n".
    suffix   put after every prompt, such as " Answer:". A subject with several objects may be answered with any.
    """
    path = Path(path)
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"read_lre: {path} is no file and no folder with .json files in LRE format.")
    made = [prompt for file in files for prompt in _of_file(file, suffix)]
    return Facts(tuple(made), path.stem)


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"a sample holds {value!r}, expected a word")  # an empty object would be in every answer
    return value.strip()


def _of_file(file: Path, suffix: str) -> Iterable[Prompt]:
    try:
        data: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name = str(data["name"])
        objects: dict[str, list[str]] = {}
        for sample in data["samples"]:
            objects.setdefault(_word(sample["subject"]), []).append(_word(sample["object"]))
        kinds = {"prompt": data["prompt_templates"], "zero-shot": data.get("prompt_templates_zs", [])}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"read_lre: {file} is not in LRE format ({type(problem).__name__}: {problem}), expected a JSON object with "
            "name, prompt_templates and samples of subject and object."
        ) from None
    for kind, templates in kinds.items():
        for number, template in enumerate(templates, start=1):
            if template.count("{}") != 1:
                raise ValueError(f"read_lre: {file}: template {template!r}, expected one {{}} for the subject.")
            for subject, found in objects.items():
                text = template.replace("{}", subject) + suffix
                yield Prompt(name, subject, f"{kind} {number}", text, tuple(dict.fromkeys(found)))


@dataclass(frozen=True, eq=False)
class Answers:
    """What a subject said to prompts. (prompt,) each.

    exact    the text begins with an object, as a whole word
    prefix   the paper's rule: its first two tokens are the beginning of an object, or begin with a whole one.
             It credits objects that share a first word
    """

    texts: tuple[str, ...]
    exact: np.ndarray
    prefix: np.ndarray

    def right(self, rule: str) -> np.ndarray:
        """Which prompts were answered, by the rule "exact" or "prefix"."""
        return {"exact": self.exact, "prefix": self.prefix}[checked_rule(rule)]


def ask(subject: Subject, prompts: Iterable[Prompt]) -> Answers:
    """Let the subject complete each prompt greedily, as it is now: under the toggles that are active."""
    prompts = tuple(prompts)
    if not prompts:
        raise ValueError("ask: got no prompts, expected at least one.")
    spelled = subject.tokenize([f" {answer}" for prompt in prompts for answer in prompt.answers], special=False)
    longest = max(PAPER_TOKENS, 1 + max(spelled.lengths))  # one more shows whether the last word ends there
    said = subject.generate([prompt.text for prompt in prompts], max_new_tokens=longest)
    first = [text_of(subject.tokenizer, ids[:PAPER_TOKENS]) for ids in said.ids]
    exact = [_begins(text, prompt.answers) for text, prompt in zip(said.texts, prompts, strict=True)]
    prefix = [_is_prefix(text, prompt.answers) for text, prompt in zip(first, prompts, strict=True)]
    return Answers(said.texts, np.array(exact), np.array(prefix))


def checked_rule(rule: str) -> str:
    """The rule, if it is one."""
    if rule not in ("exact", "prefix"):
        raise ValueError(f"facts: got rule {rule!r}, expected exact or prefix.")
    return rule


def _begins(text: str, answers: tuple[str, ...]) -> bool:
    """Whether the text is one of the answers, or goes on after it with something that is no letter or digit."""
    said = text.strip()
    return any(said.startswith(answer) and not said[len(answer) : len(answer) + 1].isalnum() for answer in answers)


def _is_prefix(text: str, answers: tuple[str, ...]) -> bool:
    said = text.strip().rstrip("\ufffd")  # two tokens may end inside a letter
    return bool(said) and (any(answer.startswith(said) for answer in answers) or _begins(said, answers))
