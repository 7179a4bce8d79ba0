"""Toggles: reversible changes of a model. One file is one family."""

from workbench.toggles.carve_moe import CarveMoE
from workbench.toggles.clustered import ClusteredSteer
from workbench.toggles.conditional import Condition, ConditionalSteer
from workbench.toggles.drop_blocks import DropBlocks
from workbench.toggles.evict import EvictKV
from workbench.toggles.fuse_blocks import FuseBlocks
from workbench.toggles.lora import LoRA
from workbench.toggles.lowrank import LowRankKV
from workbench.toggles.prune import Prune
from workbench.toggles.pyramid import PyramidInfer
from workbench.toggles.quantize import QuantizeKV
from workbench.toggles.skip_ffn import SkipFFN
from workbench.toggles.sparsify import Sparsify
from workbench.toggles.steer import Clamp, ProjectOut, Steer
from workbench.toggles.weighted import WeightedSteer

__all__ = [
    "CarveMoE",
    "Clamp",
    "ClusteredSteer",
    "Condition",
    "ConditionalSteer",
    "DropBlocks",
    "EvictKV",
    "FuseBlocks",
    "LoRA",
    "LowRankKV",
    "ProjectOut",
    "Prune",
    "PyramidInfer",
    "QuantizeKV",
    "SkipFFN",
    "Sparsify",
    "Steer",
    "WeightedSteer",
]
