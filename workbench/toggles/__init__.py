"""Toggles: reversible changes of a model. One file is one family."""

from workbench.toggles.clustered import ClusteredSteer
from workbench.toggles.conditional import Condition, ConditionalSteer
from workbench.toggles.steer import Clamp, ProjectOut, Steer
from workbench.toggles.weighted import WeightedSteer

__all__ = ["Clamp", "ClusteredSteer", "Condition", "ConditionalSteer", "ProjectOut", "Steer", "WeightedSteer"]
