"""Image classification, from a folder of pictures to an adapter that has proved itself.

Names are resolved on first use: `import veneer.vision` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import ImageData, load_data
    from .evaluate import Evaluation, evaluate
    from .models import demo_model_path
    from .predict import Prediction, predict
    from .settings import TrainSettings
    from .train import RunResult, train

_HOME = {
    "Evaluation": "evaluate",
    "ImageData": "data",
    "Prediction": "predict",
    "RunResult": "train",
    "TrainSettings": "settings",
    "demo_model_path": "models",
    "evaluate": "evaluate",
    "load_data": "data",
    "predict": "predict",
    "train": "train",
}

__all__ = ["Evaluation", "ImageData", "Prediction", "RunResult", "TrainSettings", "demo_model_path", "evaluate", "load_data", "predict", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'veneer.vision' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
