"""What every law is held to: families as tiny random models, texts in the organism's words, all probes and toggles."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from workbench import Subject

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi", "opt", "falcon", "mixtral")


@functools.cache
def subject_of(family: str) -> Subject:
    """One shared subject per family: that it is untouched between tests is itself a law."""
    return Subject.tiny(family)


@functools.cache
def texts() -> tuple[str, ...]:
    """Three texts of unequal length."""
    words = [word for word in subject_of("llama").tokenizer.get_vocab() if word.isalpha()]
    words.sort()
    return " ".join(words[:13]), " ".join(words[13:17]), " ".join(words[17:26])


def subclasses_in(package: ModuleType, base: type) -> list[Any]:
    """Every subclass of `base` defined in a module of `package`, by name: new files are found without a registry."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    found, waiting = [], [base]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.startswith(f"{package.__name__}."):
                found.append(cls)
    return sorted(set(found), key=lambda cls: cls.__name__)
