"""Builds the reference from docstrings: one page per module, opened offline. `python docs/reference/build.py [FOLDER]`

Every public name of the menu stands on the page of `workbench`, and again on the page of the module that it lives in.
Docstrings are plain text in columns, so they are shown as they are written, with the names in them linked.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import workbench

HERE = Path(__file__).parent
DEFAULT = HERE.parents[1] / "build" / "reference"


def modules() -> list[str]:
    """Every module of the package but private ones and `__main__`, the menu first."""
    found = [module.name for module in pkgutil.walk_packages(workbench.__path__, "workbench.")]
    return ["workbench", *(name for name in found if not name.rpartition(".")[2].startswith("_"))]


def build(folder: Path) -> Path:
    """Write the pages to `folder` and return the first one. Imports every module; runs no model."""
    pdoc.render.configure(template_directory=HERE, docformat="markdown", show_source=False, search=True)
    with warnings.catch_warnings():
        # A package without __all__ brings its modules, which are named here as well; an annotation that only type
        # checkers can follow is shown as it is written.
        for message in ("The module specification .* already been added", "Error parsing type annotation"):
            warnings.filterwarnings("ignore", message=message)
        pdoc.pdoc(*modules(), output_directory=folder)
    return folder / "workbench.html"


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT))
