"""An adapter on its base model, for work that is done once and leaves both as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..auto import grow
from ..config import PeftConfig
from ..disk import locate
from ..errors import AdapterFileError, ConfigError
from ..foreign import Foreign, is_foreign, read_foreign
from ..inject import RECORD, detach
from ..model import PeftModel
from .diagnosis import Diagnosis
from .doctor import diagnose


@dataclass(frozen=True)
class Held:
    """An adapter that is attached to its base model.

    Args:
        model: with the adapter, called `default`.
        base: the base model's folder or name; None where a model was given.
        directory: of the adapter; None for one file of LyCORIS's or kohya's.
        read: what such a file was read as.
    """

    model: PeftModel
    base: str | None
    directory: Path | None
    read: Foreign | None = None


@contextmanager
def held(
    adapter: str | os.PathLike[str],
    model: nn.Module | str | None = None,
    *,
    prefix: str | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    dtype: str | None = None,
    device: Any = None,
    **hub: Any,
) -> Iterator[Held]:
    """The adapter on its base model inside the block; a model that was given is as it was afterwards.

    Args:
        adapter: a directory, `owner/name` on the hub, or one file of LyCORIS's or kohya's.
        model: the base model, or its folder or name; None for the one that the adapter names.
        prefix, rank, tolerance: for such a file, as for `load_lycoris`.
        dtype: of a model that is loaded here, such as "bfloat16"; the checkpoint's own if None.
        device: where a model that is loaded here goes.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        AdapterFileError: no adapter there, or one that does not fit the model.
        ConfigError: no base model is known.
    """
    foreign = is_foreign(adapter)
    if prefix is not None and not foreign:
        raise ConfigError(f"prefix is of files of LyCORIS's or kohya's, and {adapter} is none; leave it out")
    directory = None if foreign else locate(adapter, **hub)
    config = None if directory is None else PeftConfig.read(directory)
    base = model if model is not None else None if config is None else config.base_model_name_or_path
    if base is None:
        raise ConfigError(f"{adapter} does not say which model it is for; give the model")
    if isinstance(base, nn.Module):
        name, network = None, base
    else:
        name, network = base, _loaded(adapter, directory, base, dtype, hub)
        if device is not None:
            network.to(device)
        if directory is not None:
            grow(network, directory)
    try:
        if directory is None:
            read = read_foreign(network, adapter, prefix=prefix, rank=rank, tolerance=tolerance)
            yield Held(PeftModel._holding(network, "default", read.config, read.tensors, Path(adapter)), name, None, read)
        else:
            yield Held(PeftModel.from_pretrained(network, directory), name, directory)
    finally:
        if RECORD in network.__dict__:
            detach(network)


def _loaded(adapter: str | os.PathLike[str], directory: Path | None, name: str, dtype: str | None, hub: dict[str, Any]) -> nn.Module:
    """The base model with its weights, of the class that the adapter fits."""
    options: dict[str, Any] = {"dtype": dtype or "auto", "local_files_only": bool(hub.get("local_files_only"))}
    of_diffusers = _class_of_diffusers(name)
    if of_diffusers is not None:
        import torch

        options["torch_dtype"] = None if dtype is None else getattr(torch, dtype)
        del options["dtype"]
        network: nn.Module = of_diffusers.from_pretrained(name, **options).eval()
        return network
    import transformers

    if directory is None:
        from .skeletons import skeleton

        cls = type(skeleton(name, local_files_only=options["local_files_only"]))
    else:
        found: Diagnosis = diagnose(directory, name, **{k: v for k, v in hub.items() if k == "local_files_only"})
        if not found.ok:
            raise AdapterFileError(f"{adapter} does not load on {name}: {found.reason or '; '.join(found.problems)}")
        if found.labels is not None:
            options |= {"num_labels": found.labels, "ignore_mismatched_sizes": True}
        cls = getattr(transformers, str(found.model))
    made: nn.Module = cls.from_pretrained(name, **options).eval()  # type: ignore[attr-defined]  # a model of transformers
    return made


def _class_of_diffusers(name: str) -> Any:
    """The class of a saved model of diffusers in a folder; None where it is none."""
    path = Path(name) / "config.json"
    called = json.loads(path.read_text(encoding="utf-8")).get("_class_name") if path.is_file() else None
    if called is None:
        return None
    try:
        import diffusers
    except ImportError:
        raise ConfigError(f"model {name} is a {called} of diffusers, which is not installed; pip install diffusers") from None
    found = getattr(diffusers, called, None)
    if found is None:
        raise ConfigError(f"model {name} is a {called}, which diffusers {diffusers.__version__} does not have")
    return found
