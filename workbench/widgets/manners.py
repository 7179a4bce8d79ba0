"""How a desk behaves on a page: keys pressed in it are its own, and its figure is as wide as it is.

Without this JupyterLab takes keys for shortcuts of the notebook: on a menu an arrow key would go to the next cell, and
an x would cut the cell around. And a figure would keep the width that it had before it came onto the page. Source: own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget


class Manners(anywidget.AnyWidget):
    """Shows nothing; while it is on the page, JupyterLab's shortcuts rest in desks, and figures follow their width."""

    _esm = Path(__file__).with_suffix(".js")

    def __init__(self, **settings: Any) -> None:
        super().__init__(layout={"display": "none"}, **settings)
