"""The families that every law is held to, as tiny random models, and texts in the organism's words."""

from __future__ import annotations

import functools

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
