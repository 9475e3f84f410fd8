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
    from .methods.lora import LoraConfig
    from .model import PeftModel, get_peft_model
    from .planning import Plan, plan

__version__ = "0.1.0"

_HOME = {
    "AdapterFileError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "PeftConfig": "config",
    "PeftModel": "model",
    "Plan": "planning",
    "StateError": "errors",
    "TargetError": "errors",
    "TaskType": "config",
    "VeneerError": "errors",
    "get_peft_model": "model",
    "plan": "planning",
    "strategy": "engine",
}

__all__ = [
    "AdapterFileError", "ConfigError", "DataError", "LoraConfig", "PeftConfig", "PeftModel", "Plan", "StateError", "TargetError", "TaskType",
    "VeneerError", "get_peft_model", "plan", "strategy",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        value = _config_class(name)
    if name in ("PeftModel", "get_peft_model"):
        from .integrations import install

        install()
    globals()[name] = value
    return value


def _config_class(name: str) -> Any:
    """A method's configuration class, such as `LoraConfig`: found by the method's file, not listed here."""
    if name.endswith("Config"):
        from .config import config_classes

        for cls in config_classes().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'veneer' has no attribute {name!r}")
