"""Veneer: parameter-efficient fine-tuning with thin trainable layers on a frozen model.

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PeftConfig, TaskType
    from .engine import strategy
    from .errors import AdapterFileError, ConfigError, DataError, StateError, TargetError, VeneerError
    from .explaining import Explanation, explain
    from .integrations.diagnosis import Diagnosis
    from .integrations.doctor import diagnose
    from .model import PeftModel, get_peft_model
    from .planning import Plan, plan
    from .probing import Probe, check_parts
    from .vocabulary import TargetNames, target_names

__version__ = "0.1.0"

_HOME = {
    "AdapterFileError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Diagnosis": "integrations.diagnosis",
    "Explanation": "explaining",
    "PeftConfig": "config",
    "PeftModel": "model",
    "Plan": "planning",
    "Probe": "probing",
    "StateError": "errors",
    "TargetError": "errors",
    "TargetNames": "vocabulary",
    "TaskType": "config",
    "VeneerError": "errors",
    "check_parts": "probing",
    "diagnose": "integrations.doctor",
    "explain": "explaining",
    "get_peft_model": "model",
    "plan": "planning",
    "strategy": "engine",
    "target_names": "vocabulary",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        value = sorted([*_HOME, *_configs()])
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        value = _config_class(name)
    if name in ("PeftModel", "get_peft_model"):
        from .integrations import install

        install()
    globals()[name] = value
    return value


def _configs() -> dict[str, Any]:
    """Every method's configuration class, such as `LoraConfig`, by its name; found by the methods' files, not listed here."""
    from .config import config_classes

    return {c.__name__: c for c in config_classes().values()}


def _config_class(name: str) -> Any:
    found = _configs() if name.endswith("Config") else {}
    if name not in found:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return found[name]
