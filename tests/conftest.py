"""What several test files share: the project's folder and small notebooks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any import of torch: its threads should not spin

if not Path("/dev/nvidia0").exists():  # before any import of triton: without a GPU its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of huggingface_hub: no test may use the network

ROOT = Path(__file__).parents[1]
PARAMETERS = """n: int = 3  # how many
rate_hz: float = 1.5  # how fast
name: str = "a"  # of what
many: bool = False  # more of it"""


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def write_notebook() -> Callable[..., Path]:
    """Writes a notebook with a parameters cell and one cell per text, and returns its path."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    def write(path: Path, *code: str, params: str | None = PARAMETERS, prose: str = "# What is it?") -> Path:
        cells = [new_markdown_cell(prose, id="prose")]
        if params is not None:
            cells.append(new_code_cell(params, id="parameters", metadata={"tags": ["parameters"]}))
        cells += [new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(code)]
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(new_notebook(cells=cells), path)
        return path

    return write
