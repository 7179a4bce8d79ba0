"""What every law is held to: families as tiny random models, texts in the organism's words, all probes and toggles."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from pathlib import Path
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
    if guests := os.environ.get("WORKBENCH_CONTRACT"):
        invite(package, Path(guests))
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    found, waiting = [], [base]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.startswith(f"{package.__name__}."):
                found.append(cls)
    return sorted(set(found), key=lambda cls: cls.__name__)


def invite(package: ModuleType, folder: Path) -> None:
    """Let the modules in the folder's own probes/ or toggles/ be found as if they lay in `package` already."""
    if not folder.is_dir():
        raise ValueError(f"WORKBENCH_CONTRACT: got {folder}, expected a folder with probes/ or toggles/ in it.")
    guests = folder.resolve() / package.__name__.rpartition(".")[2]
    if str(guests) in package.__path__ or not guests.is_dir():
        return
    if taken := sorted(path.name for path in guests.glob("*.py") if (Path(package.__path__[0]) / path.name).exists()):
        raise ValueError(f"WORKBENCH_CONTRACT: {package.__name__} has a {taken[0]} already. Give yours another name.")
    package.__path__.append(str(guests))
