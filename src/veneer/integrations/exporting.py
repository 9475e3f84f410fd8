"""An adapter's directory, written anew for every other reader of the format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..disk import locate
from ..errors import AdapterFileError, ConfigError
from ..inject import record
from ..model import PeftModel
from .doctor import diagnose


def export(adapter: str | os.PathLike[str], output: str | os.PathLike[str], model: nn.Module | str | None = None, **hub: Any) -> str:
    """Write an adapter as other readers of the format load it: by today's module names, and parts of fused layers as one equal LoRA of the whole layer.

    Args:
        adapter: a directory, or `owner/name` on the hub.
        output: a directory, made if needed; not the adapter's own.
        model: the base model, which is left as it is; or its folder or name; None for the one that the adapter names.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        What was done: "as it is" or "as LoRA".

    Raises:
        AdapterFileError: no adapter there, or one that does not fit the model.
        ConfigError: no base model is known.
        StateError: parts whose change has no low rank, so that no other reader has words for them; nothing was written.
    """
    directory = locate(adapter, **hub)
    if Path(output).exists() and Path(output).resolve() == directory.resolve():
        raise ConfigError(f"output: {output} is the adapter itself; give another directory")
    config = PeftConfig.read(directory)
    base = model if model is not None else config.base_model_name_or_path
    if base is None:
        raise ConfigError(f"{adapter} does not say which model it is for; give the model")
    if not isinstance(base, nn.Module):
        base = loaded(adapter, directory, base, hub)
    held = PeftModel.from_pretrained(base, directory)
    try:
        of_parts = any(s.is_part for s in record(base).plans["default"].sites)
        (held.save_as_lora if of_parts else held.save_pretrained)(output)
    finally:
        held.unload()
    return "as LoRA" if of_parts else "as it is"


def loaded(adapter: str | os.PathLike[str], directory: Path, name: str, hub: dict[str, Any]) -> nn.Module:
    """The base model with its weights, of the class that the adapter fits."""
    import transformers

    found = diagnose(directory, name, **{k: v for k, v in hub.items() if k == "local_files_only"})
    if not found.ok:
        raise AdapterFileError(f"{adapter} does not load on {name}: {found.reason or '; '.join(found.problems)}")
    options: dict[str, Any] = {} if found.labels is None else {"num_labels": found.labels, "ignore_mismatched_sizes": True}
    cls = getattr(transformers, str(found.model))
    made: nn.Module = cls.from_pretrained(name, local_files_only=bool(hub.get("local_files_only")), **options)
    return made
