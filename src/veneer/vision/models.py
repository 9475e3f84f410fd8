"""Pretrained image classifiers and their image processors: from the hub, a folder, or the package itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .network import hub_reachable

if TYPE_CHECKING:
    import torch

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
    except (OSError, ValueError, ImportError) as e:
        first = " ".join(str(e).strip().splitlines()[0].split()) if str(e).strip() else type(e).__name__
        raise ConfigError(
            f"model {name!r} cannot be loaded: {first} Give a folder that holds a saved model, the name of an image model on the hub (owner/name) "
            "with a network connection, or 'demo' for the bundled one."
        ) from e


def image_size(processor: Any) -> tuple[int, int]:
    """(height, width) of the pictures that a processor makes.

    Raises:
        ConfigError: a processor whose pictures have no fixed size.
    """
    size: Any = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = dict(size or getattr(processor, "size", None) or {})
    edge = size.get("shortest_edge") or size.get("longest_edge")
    height, width = size.get("height") or edge, size.get("width") or edge
    if not height or not width:
        raise ConfigError(
            f"model: its image processor ({type(processor).__name__}) makes pictures of no fixed size, which training here needs; use another model"
        )
    return int(height), int(width)


def device_named(name: str | None) -> torch.device:
    """The device of that name; by default the accelerator of this machine, or its CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    if name is None:
        return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ConfigError(f"device: {name!r} cannot be used here ({str(e).splitlines()[0][:160]}); use cpu, or leave it out") from None
    return device
