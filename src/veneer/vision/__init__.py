"""Image classification, from a folder of pictures to an adapter that has proved itself.

Names are resolved on first use: `import veneer.vision` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import ImageData, load_data
    from .evaluation import Evaluation, evaluate
    from .models import demo_model_path
    from .prediction import Prediction, predict
    from .settings import TrainSettings
    from .training import RunResult, train

_HOME = {
    "Evaluation": "evaluation",
    "ImageData": "data",
    "Prediction": "prediction",
    "RunResult": "training",
    "TrainSettings": "settings",
    "demo_model_path": "models",
    "evaluate": "evaluation",
    "load_data": "data",
    "predict": "prediction",
    "train": "training",
}

__all__ = [
    "Evaluation",
    "ImageData",
    "Prediction",
    "RunResult",
    "TrainSettings",
    "demo_model_path",
    "evaluate",
    "load_data",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer.vision' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
