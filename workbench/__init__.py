"""workbench: look inside language models, change them reversibly, and see what happens to the mechanisms.

subject = Subject.organism(); with subject.under(toggle): result = probe.run(subject, data); result.plot()
The names below load on first use: `import workbench` itself computes nothing and imports no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.dice import Dice
    from workbench.directions import Direction, difference_in_means, random_direction
    from workbench.methods.cache.bits import BitPlan
    from workbench.methods.cache.retaining import RetainingHeads
    from workbench.methods.cache.retaining_training import train_retaining_heads
    from workbench.methods.counterfactual.edits import Edit
    from workbench.methods.neurons.label_agreement import agreement
    from workbench.methods.steering.contrast import Contrast
    from workbench.methods.steering.grains import grains_direction
    from workbench.methods.steering.pairs import contrastive_pairs, principal_direction, single_pair
    from workbench.methods.steering.target import Target
    from workbench.prefix import PrefixStates
    from workbench.probe import Probe
    from workbench.probes.answer_rates import AnswerRates
    from workbench.probes.bit_search import BitSearch, search_bits
    from workbench.probes.block_influence import BlockInfluence
    from workbench.probes.cache_loss import CacheFrontier, CacheLoss, frontier
    from workbench.probes.co_firing import CoFiring
    from workbench.probes.cost import Cost
    from workbench.probes.counterfactual import Counterfactual
    from workbench.probes.deactivation import Deactivation
    from workbench.probes.direction_search import DirectionSearch
    from workbench.probes.ffn_saturation import FFNSaturation
    from workbench.probes.hftp import HFTP
    from workbench.probes.latent_language import LatentLanguage
    from workbench.probes.layer_menu import LayerMenu
    from workbench.probes.logit_lens import LogitLens
    from workbench.probes.neuron_tokens import NeuronTokens
    from workbench.probes.pruning_curve import PruningCurve
    from workbench.probes.pruning_scores import PruningScores
    from workbench.probes.recovery import Recovery
    from workbench.probes.relation_neurons import RelationNeurons
    from workbench.probes.snmf import SNMF
    from workbench.probes.sparsity import SparsityLoss
    from workbench.probes.steering_map import SteeringMap, steering_map
    from workbench.probes.token_attribution import TokenAttribution
    from workbench.pruned.bitmap import load_bitmap, save_bitmap
    from workbench.pruned.exported import export, load_pruned, plan_now
    from workbench.pruned.plan import LayerPlan, Plan
    from workbench.pruned.weights import Weights
    from workbench.result import Result
    from workbench.run import Run
    from workbench.runs.runs import Runs
    from workbench.site import Site, sites
    from workbench.strength import strength_for_kl
    from workbench.studies.cross import CrossStudy
    from workbench.studies.crossed import CrossResult, gathered
    from workbench.subject import Subject
    from workbench.toggle import Toggle
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
    from workbench.warm import WarmKernels
    from workbench.widgets.cache import CacheDesk
    from workbench.widgets.compose import ComposeDesk
    from workbench.widgets.dice import DiceDesk
    from workbench.widgets.explore import explore
    from workbench.widgets.lens import LensDesk
    from workbench.widgets.neuron import NeuronDesk
    from workbench.widgets.pruning import PruningDesk
    from workbench.widgets.steering import SteeringDesk
    from workbench.widgets.strip import Strip, StripRow, TokenStrip

_HOME = {
    "Site": "site",
    "sites": "site",
    "Subject": "subject",
    "Toggle": "toggle",
    "Probe": "probe",
    "Result": "result",
    "Run": "run",
    "Dice": "dice",
    "Direction": "directions",
    "difference_in_means": "directions",
    "random_direction": "directions",
    "Steer": "toggles.steer",
    "ProjectOut": "toggles.steer",
    "Clamp": "toggles.steer",
    "ConditionalSteer": "toggles.conditional",
    "WeightedSteer": "toggles.weighted",
    "ClusteredSteer": "toggles.clustered",
    "EvictKV": "toggles.evict",
    "QuantizeKV": "toggles.quantize",
    "LowRankKV": "toggles.lowrank",
    "PyramidInfer": "toggles.pyramid",
    "CacheLoss": "probes.cache_loss",
    "CacheFrontier": "probes.cache_loss",
    "frontier": "probes.cache_loss",
    "BitSearch": "probes.bit_search",
    "search_bits": "probes.bit_search",
    "BitPlan": "methods.cache.bits",
    "RetainingHeads": "methods.cache.retaining",
    "train_retaining_heads": "methods.cache.retaining_training",
    "HFTP": "probes.hftp",
    "Cost": "probes.cost",
    "RelationNeurons": "probes.relation_neurons",
    "Deactivation": "probes.deactivation",
    "SNMF": "probes.snmf",
    "NeuronTokens": "probes.neuron_tokens",
    "LogitLens": "probes.logit_lens",
    "LatentLanguage": "probes.latent_language",
    "Counterfactual": "probes.counterfactual",
    "Edit": "methods.counterfactual.edits",
    "TokenAttribution": "probes.token_attribution",
    "grains_direction": "methods.steering.grains",
    "DirectionSearch": "probes.direction_search",
    "SteeringMap": "probes.steering_map",
    "steering_map": "probes.steering_map",
    "AnswerRates": "probes.answer_rates",
    "Contrast": "methods.steering.contrast",
    "Target": "methods.steering.target",
    "Condition": "toggles.conditional",
    "contrastive_pairs": "methods.steering.pairs",
    "single_pair": "methods.steering.pairs",
    "principal_direction": "methods.steering.pairs",
    "strength_for_kl": "strength",
    "agreement": "methods.neurons.label_agreement",
    "explore": "widgets.explore",
    "Runs": "runs.runs",
    "WarmKernels": "warm",
    "Prune": "toggles.prune",
    "Plan": "pruned.plan",
    "LayerPlan": "pruned.plan",
    "export": "pruned.exported",
    "load_pruned": "pruned.exported",
    "plan_now": "pruned.exported",
    "Weights": "pruned.weights",
    "LoRA": "toggles.lora",
    "Recovery": "probes.recovery",
    "LayerMenu": "probes.layer_menu",
    "PruningScores": "probes.pruning_scores",
    "PruningCurve": "probes.pruning_curve",
    "DropBlocks": "toggles.drop_blocks",
    "FuseBlocks": "toggles.fuse_blocks",
    "BlockInfluence": "probes.block_influence",
    "SkipFFN": "toggles.skip_ffn",
    "CarveMoE": "toggles.carve_moe",
    "FFNSaturation": "probes.ffn_saturation",
    "CoFiring": "probes.co_firing",
    "Sparsify": "toggles.sparsify",
    "SparsityLoss": "probes.sparsity",
    "save_bitmap": "pruned.bitmap",
    "load_bitmap": "pruned.bitmap",
    "SteeringDesk": "widgets.steering",
    "Strip": "widgets.strip",
    "StripRow": "widgets.strip",
    "TokenStrip": "widgets.strip",
    "ComposeDesk": "widgets.compose",
    "CrossStudy": "studies.cross",
    "CrossResult": "studies.crossed",
    "gathered": "studies.crossed",
    "PrefixStates": "prefix",
    "CacheDesk": "widgets.cache",
    "PruningDesk": "widgets.pruning",
    "DiceDesk": "widgets.dice",
    "NeuronDesk": "widgets.neuron",
    "LensDesk": "widgets.lens",
}

__all__ = [
    "HFTP",
    "SNMF",
    "AnswerRates",
    "BitPlan",
    "BitSearch",
    "BlockInfluence",
    "CacheDesk",
    "CacheFrontier",
    "CacheLoss",
    "CarveMoE",
    "Clamp",
    "ClusteredSteer",
    "CoFiring",
    "ComposeDesk",
    "Condition",
    "ConditionalSteer",
    "Contrast",
    "Cost",
    "Counterfactual",
    "CrossResult",
    "CrossStudy",
    "Deactivation",
    "Dice",
    "DiceDesk",
    "Direction",
    "DirectionSearch",
    "DropBlocks",
    "Edit",
    "EvictKV",
    "FFNSaturation",
    "FuseBlocks",
    "LatentLanguage",
    "LayerMenu",
    "LayerPlan",
    "LensDesk",
    "LoRA",
    "LogitLens",
    "LowRankKV",
    "NeuronDesk",
    "NeuronTokens",
    "Plan",
    "PrefixStates",
    "Probe",
    "ProjectOut",
    "Prune",
    "PruningCurve",
    "PruningDesk",
    "PruningScores",
    "PyramidInfer",
    "QuantizeKV",
    "Recovery",
    "RelationNeurons",
    "Result",
    "RetainingHeads",
    "Run",
    "Runs",
    "Site",
    "SkipFFN",
    "Sparsify",
    "SparsityLoss",
    "Steer",
    "SteeringDesk",
    "SteeringMap",
    "Strip",
    "StripRow",
    "Subject",
    "Target",
    "Toggle",
    "TokenAttribution",
    "TokenStrip",
    "WarmKernels",
    "WeightedSteer",
    "Weights",
    "agreement",
    "contrastive_pairs",
    "difference_in_means",
    "explore",
    "export",
    "frontier",
    "gathered",
    "grains_direction",
    "load_bitmap",
    "load_pruned",
    "plan_now",
    "principal_direction",
    "random_direction",
    "save_bitmap",
    "search_bits",
    "single_pair",
    "sites",
    "steering_map",
    "strength_for_kl",
    "train_retaining_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}; it offers {', '.join(__all__)}.")
    value = getattr(import_module(f"workbench.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
