"""Layer kinds and storages: how an (out × in) map acts in a layer of a given class, and how its weight lies in memory."""

from .adapted import AdaptedLayer, AdaptedModule, AdaptedParameters, Adapter, Shared, adapt, restore
from .base import LayerKind
from .frozen import Frozen
from .kinds import Place, is_linear, parameter_place, places, why_not
from .layouts import Fused, Layout, fused_weights
from .saved import SavedModule, save_module
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
    "Shared",
    "Swapped",
    "adapt",
    "fused_weights",
    "is_linear",
    "parameter_place",
    "places",
    "restore",
    "save_module",
    "why_not",
]
