"""The key of a run: a hash of everything that decides its numbers, so that nothing is computed twice.

key = sha256(code cells, parameters, package source and shipped weights, contents behind each parameter)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workbench.environment import PACKAGE
from workbench.files import sha256_of, sha256_of_folder

LENGTH = 12  # hex digits: among 10,000 runs, two share a key with a chance of 2e-7


def run_key(code: Iterable[str], params: Mapping[str, Any]) -> str:
    """The key of the run of these code cells under these parameters, with this package, on these inputs."""
    return key_of(key_parts(code, params))


def key_of(parts: Mapping[str, Any]) -> str:
    """The key that these parts make."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def key_parts(code: Iterable[str], params: Mapping[str, Any], package: str | None = None) -> dict[str, Any]:
    """What a key is made of, as JSON data; two runs with different keys differ in one of these parts.

    code     the digest of each code cell       params  the text of each value, which tells 1, 1.0, True and "1" apart
    package  the digest of this package         inputs  what each value refers to (`input_digest`)
    The package is read here unless its digest is given, as for the plans of a whole grid.
    """
    cells = [re.sub(r"[ \t]+$", "", cell.strip(), flags=re.MULTILINE) for cell in code]
    return {
        "code": [hashlib.sha256(cell.encode()).hexdigest() for cell in cells],
        "params": {name: repr(value) for name, value in params.items()},
        "package": package_digest() if package is None else package,
        "inputs": {name: input_digest(value, params.get("revision")) for name, value in params.items()},
    }


def package_digest() -> str:
    """The hash of every file that this package and its kernels are made of, shipped weights included."""
    folders = [PACKAGE]
    spec = importlib.util.find_spec("workbench_kernels")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(place) for place in spec.submodule_search_locations]
    return "+".join(sha256_of_folder(folder, _is_source) for folder in folders)


def input_digest(value: Any, revision: Any = None) -> str | None:
    """What a parameter's text refers to: contents of a file or folder, or the commit of a cached hub model.

    None for a plain value, and for a hub model that was never downloaded: its next key knows the commit.
    """
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 1000:
        return None
    try:
        path = Path(value).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, UnicodeError):  # longer than any file's name, ~nobody, half a character: plain text
        return None
    if is_file:
        return sha256_of(path)
    if is_folder:
        return sha256_of_folder(path, lambda file: not file.name.startswith("."))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
        return None
    from huggingface_hub.constants import HF_HUB_CACHE  # here: slow to import, and needed for text alone

    ref = Path(HF_HUB_CACHE, f"models--{value.replace('/', '--')}", "refs", str(revision or "main"))
    return ref.read_text().strip() if ref.is_file() else None


def _is_source(path: Path) -> bool:
    return "__pycache__" not in path.parts and path.suffix != ".md" and not path.name.startswith(".")
