"""Smaller models: which weights belong to which unit, plans of what is kept, how they are carried out and written."""

from workbench.pruned.exported import Export, export, load_pruned, plan_now
from workbench.pruned.plan import LayerPlan, Plan, Shape
from workbench.pruned.weights import Weights

__all__ = ["Export", "LayerPlan", "Plan", "Shape", "Weights", "export", "load_pruned", "plan_now"]
