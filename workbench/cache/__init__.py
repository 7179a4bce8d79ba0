"""Key/value caches that keep fewer tokens, or hold them in fewer bits, and really give the memory back.

A toggle names a stage (project, select, store); every cache layer runs the stages in this order on its own tokens.
"""

from workbench.cache.held import accounts, cache_bytes
from workbench.cache.layer import KVLayer, View
from workbench.cache.stages import Selector, Stages, Store, use_stage

__all__ = ["KVLayer", "Selector", "Stages", "Store", "View", "accounts", "cache_bytes", "use_stage"]
