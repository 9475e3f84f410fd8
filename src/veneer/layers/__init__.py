"""Layer kinds and storages: how an (out × in) map acts in a layer of a given class, and how its weight lies in memory."""

from .adapted import AdaptedLayer, Adapter, adapt, restore
from .base import LayerKind
from .kinds import kind_of, why_not
from .saved import SavedModule, save_module
from .swap import Swapped

__all__ = ["AdaptedLayer", "Adapter", "LayerKind", "SavedModule", "Swapped", "adapt", "kind_of", "restore", "save_module", "why_not"]
