"""What several test files share: the project's folder, the organism, small notebooks, a room of desks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workbench import Subject

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before any import of torch: its threads should not spin

if not Path("/dev/nvidia0").exists():  # before any import of triton: without a GPU its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of huggingface_hub: no test may use the network

ROOT = Path(__file__).parents[1]
PARAMETERS = """n: int = 3  # how many
rate_hz: float = 1.5  # how fast
name: str = "a"  # of what
many: bool = False  # more of it"""


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws without a seed of its own is the same in every run."""
    if "torch" in sys.modules:  # many tests need none
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="module")
def organism() -> Subject:
    """The organism on the CPU, one for all tests of a file."""
    from workbench import Subject  # here: many tests need no torch

    return Subject.organism(device="cpu")


@pytest.fixture(scope="session")
def demo(root: Path) -> Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]:
    """Serves desks to two visitors: `with demo(folder, *options, desks=("steering",)) as (process, address)`.

    The folder is where it works, its home and its place for temporary files; the process is killed when the block ends.
    """

    @contextmanager
    def serve(
        folder: Path, *options: str, desks: Sequence[str] = ("steering",)
    ) -> Iterator[tuple[subprocess.Popen[str], str]]:
        pytest.importorskip("solara", reason="what serves a room is not installed: pip install 'workbench[demo]'")
        words = ["-m", "workbench.cli", "demo", *desks, "--port", "0", "--visitors", "2", *options]
        own = {
            "PYTHONPATH": str(root),
            "WORKBENCH_RUNS": str(folder / "runs"),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }
        with (folder / "log.txt").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env=os.environ | own,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert process.stdout is not None
        try:
            said = next((line for line in process.stdout if "the room is open" in line), "")
            assert said, (folder / "log.txt").read_text()
            yield process, said.split()[4]
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    return serve


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
