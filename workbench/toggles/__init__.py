"""Toggles: reversible changes of a model. One file is one family."""

from workbench.toggles.steer import Clamp, ProjectOut, Steer

__all__ = ["Clamp", "ProjectOut", "Steer"]
