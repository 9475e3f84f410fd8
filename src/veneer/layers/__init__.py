"""Layer kinds and storages: how an (out × in) map acts in a layer of a given class, and how its weight lies in memory."""

from .adapted import AdaptedLayer, AdaptedModule, AdaptedParameters, adapt, restore
from .adapter import Adapter, Share, Shared
from .base import LayerKind
from .frozen import Frozen
from .kinds import Place, is_linear, parameter_place, places, why_not
from .layouts import Fused, Layout, fused_weights
from .per_sample import every_tensor, sequence_first
from .saved import SavedModule, save_module, set_outputs, takes_outputs
from .swap import Swapped

__all__ = [
    "AdaptedLayer",
    "AdaptedModule",
    "AdaptedParameters",
    "Adapter",
    "Frozen",
    "Fused",
    "LayerKind",
    "Layout",
    "Place",
    "SavedModule",
    "Share",
    "Shared",
    "Swapped",
    "adapt",
    "every_tensor",
    "fused_weights",
    "is_linear",
    "parameter_place",
    "places",
    "restore",
    "save_module",
    "sequence_first",
    "set_outputs",
    "takes_outputs",
    "why_not",
]
