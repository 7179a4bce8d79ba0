"""The organism: a small trained model that ships with the project, so that the truth behind every probe is known.

Law: weights = train(recipe); everything in `weights/` is what `python -m workbench.organism.train` writes.
Source: this project; "model organism" as in Hubinger et al., 2023. Loading: `Subject.organism()`, or `FOLDER` by hand.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"  # a plain Hugging Face folder
TWIN_FOLDER = Path(__file__).parent / "twin_weights"  # another, which `python -m workbench.organism.twin` writes

__all__ = ["FOLDER", "TWIN_FOLDER"]
