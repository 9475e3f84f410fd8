"""Pretrained image classifiers and their image processors: from the hub, a folder, or the package itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .network import hub_reachable

DEMO = "demo"


def demo_model_path() -> Path:
    """The folder of the small vision transformer that is bundled with the package."""
    return Path(__file__).parent / "demo_model"


def source(name: str) -> str:
    """Where a model named `name` is loaded from."""
    return str(demo_model_path()) if name == DEMO else name


def load_model(name: str, labels: Sequence[str]) -> Any:
    """An image classifier for these labels; a head of another label set starts anew.

    Raises:
        ConfigError: no such model here or on the hub, or not an image classifier.
    """
    from transformers import AutoModelForImageClassification

    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return _from_pretrained(AutoModelForImageClassification, name, num_labels=len(labels), ignore_mismatched_sizes=True, **names)


def load_processor(name: str | Path) -> Any:
    """The image processor of a model, in its PIL form."""
    from transformers import AutoImageProcessor

    return _from_pretrained(AutoImageProcessor, str(name), backend="pil")


def _from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    place = source(name)
    if not Path(place).is_dir() and not hub_reachable():
        options["local_files_only"] = True
    try:
        return cls.from_pretrained(place, **options)
    except (OSError, ValueError) as e:
        first = " ".join(str(e).strip().splitlines()[0].split()) if str(e).strip() else type(e).__name__
        raise ConfigError(
            f"model {name!r} cannot be loaded: {first} Give a folder that holds a saved model, the name of an image model on the hub (owner/name) "
            "with a network connection, or 'demo' for the bundled one."
        ) from e


def image_size(processor: Any) -> tuple[int, int]:
    """(height, width) of the pictures that a processor makes."""
    size: Any = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = dict(size or processor.size)
    edge = size.get("shortest_edge") or size.get("longest_edge")
    return int(size.get("height") or edge), int(size.get("width") or edge)
