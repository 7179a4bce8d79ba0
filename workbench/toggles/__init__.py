"""Toggles: reversible changes of a model. One file is one family."""

from workbench.toggles.clustered import ClusteredSteer
from workbench.toggles.conditional import Condition, ConditionalSteer
from workbench.toggles.evict import EvictKV
from workbench.toggles.lowrank import LowRankKV
from workbench.toggles.pyramid import PyramidInfer
from workbench.toggles.quantize import QuantizeKV
from workbench.toggles.steer import Clamp, ProjectOut, Steer
from workbench.toggles.weighted import WeightedSteer

__all__ = [
    "Clamp",
    "ClusteredSteer",
    "Condition",
    "ConditionalSteer",
    "EvictKV",
    "LowRankKV",
    "ProjectOut",
    "PyramidInfer",
    "QuantizeKV",
    "Steer",
    "WeightedSteer",
]
