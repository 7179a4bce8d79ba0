"""Smaller models: which weights belong to which unit, plans of what is kept, and how a plan is carried out."""

from workbench.pruned.plan import LayerPlan, Plan, Shape
from workbench.pruned.weights import Weights

__all__ = ["LayerPlan", "Plan", "Shape", "Weights"]
