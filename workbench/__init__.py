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
    from workbench.probe import Probe
    from workbench.probes.answer_rates import AnswerRates
    from workbench.probes.bit_search import BitSearch, search_bits
    from workbench.probes.cache_loss import CacheFrontier, CacheLoss, frontier
    from workbench.probes.cost import Cost
    from workbench.probes.counterfactual import Counterfactual
    from workbench.probes.deactivation import Deactivation
    from workbench.probes.direction_search import DirectionSearch
    from workbench.probes.hftp import HFTP
    from workbench.probes.latent_language import LatentLanguage
    from workbench.probes.logit_lens import LogitLens
    from workbench.probes.neuron_tokens import NeuronTokens
    from workbench.probes.relation_neurons import RelationNeurons
    from workbench.probes.snmf import SNMF
    from workbench.probes.steering_map import SteeringMap, steering_map
    from workbench.probes.token_attribution import TokenAttribution
    from workbench.result import Result
    from workbench.run import Run
    from workbench.site import Site, sites
    from workbench.strength import strength_for_kl
    from workbench.subject import Subject
    from workbench.toggle import Toggle
    from workbench.toggles.clustered import ClusteredSteer
    from workbench.toggles.conditional import Condition, ConditionalSteer
    from workbench.toggles.evict import EvictKV
    from workbench.toggles.lowrank import LowRankKV
    from workbench.toggles.pyramid import PyramidInfer
    from workbench.toggles.quantize import QuantizeKV
    from workbench.toggles.steer import Clamp, ProjectOut, Steer
    from workbench.toggles.weighted import WeightedSteer
    from workbench.widgets.explore import explore

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
}

__all__ = [
    "HFTP",
    "SNMF",
    "AnswerRates",
    "BitPlan",
    "BitSearch",
    "CacheFrontier",
    "CacheLoss",
    "Clamp",
    "ClusteredSteer",
    "Condition",
    "ConditionalSteer",
    "Contrast",
    "Cost",
    "Counterfactual",
    "Deactivation",
    "Dice",
    "Direction",
    "DirectionSearch",
    "Edit",
    "EvictKV",
    "LatentLanguage",
    "LogitLens",
    "LowRankKV",
    "NeuronTokens",
    "Probe",
    "ProjectOut",
    "PyramidInfer",
    "QuantizeKV",
    "RelationNeurons",
    "Result",
    "RetainingHeads",
    "Run",
    "Site",
    "Steer",
    "SteeringMap",
    "Subject",
    "Target",
    "Toggle",
    "TokenAttribution",
    "WeightedSteer",
    "agreement",
    "contrastive_pairs",
    "difference_in_means",
    "explore",
    "frontier",
    "grains_direction",
    "principal_direction",
    "random_direction",
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
