"""Keys pressed in a desk are the desk's: without this, JupyterLab takes them for shortcuts of the notebook.

On a menu or a button an arrow key would go to the next cell, and an x would cut the cell around. Source: own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget


class OwnKeys(anywidget.AnyWidget):
    """Shows nothing; while it is on the page, JupyterLab's shortcuts rest wherever a desk has the focus."""

    _esm = Path(__file__).with_suffix(".js")

    def __init__(self, **settings: Any) -> None:
        super().__init__(layout={"display": "none"}, **settings)
