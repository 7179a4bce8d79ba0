"""workbench: look inside language models, change them reversibly, and see what happens to the mechanisms.

subject = Subject.organism(); with subject.under(toggle): result = probe.run(subject, data); result.plot()
The names below load on first use: `import workbench` itself computes nothing and imports no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.directions import Direction, difference_in_means, random_direction
    from workbench.probe import Probe
    from workbench.probes.cost import Cost
    from workbench.probes.hftp import HFTP
    from workbench.result import Result
    from workbench.run import Run
    from workbench.site import Site, sites
    from workbench.subject import Subject
    from workbench.toggle import Toggle
    from workbench.toggles.steer import Clamp, ProjectOut, Steer
    from workbench.widgets.explore import explore

_HOME = {
    "Site": "site",
    "sites": "site",
    "Subject": "subject",
    "Toggle": "toggle",
    "Probe": "probe",
    "Result": "result",
    "Run": "run",
    "Direction": "directions",
    "difference_in_means": "directions",
    "random_direction": "directions",
    "Steer": "toggles.steer",
    "ProjectOut": "toggles.steer",
    "Clamp": "toggles.steer",
    "HFTP": "probes.hftp",
    "Cost": "probes.cost",
    "explore": "widgets.explore",
}

__all__ = [
    "HFTP",
    "Clamp",
    "Cost",
    "Direction",
    "Probe",
    "ProjectOut",
    "Result",
    "Run",
    "Site",
    "Steer",
    "Subject",
    "Toggle",
    "difference_in_means",
    "explore",
    "random_direction",
    "sites",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}; it offers {', '.join(__all__)}.")
    value = getattr(import_module(f"workbench.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
