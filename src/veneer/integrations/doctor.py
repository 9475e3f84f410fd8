"""What an adapter is, from its files alone, and whether and how it loads on a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import files
from ..config import CONFIG_NAME, OF_PARTS, PREFIX, PeftConfig, config_classes
from ..disk import locate
from ..errors import VeneerError
from ..form import Form
from ..inject import record
from ..model import PeftModel
from ..translation import fitted, todays
from .diagnosis import Diagnosis
from .skeletons import skeletons

_FORMS = (Form(64, 64), Form(64, 64, lookup=True), Form(64, 576, kernel=(3, 3)))


def diagnose(adapter: str | os.PathLike[str], model: nn.Module | str | None = None, **hub: Any) -> Diagnosis:
    """Say what an adapter is and, for a model, whether and how it loads there today.

    Args:
        adapter: a directory, or `owner/name` on the hub.
        model: a model, which is left as it is; or a folder or name of one, which is built without its weights.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        AdapterFileError: no adapter there at all.
        ConfigError: no such model.
    """
    directory = locate(adapter, **hub)
    found = Diagnosis(str(adapter))
    config = _read_config(directory, found)
    tensors = _read_tensors(directory, found)
    _look_at(tensors, config, found)
    found.labels = _labels(tensors, found)
    if model is not None:
        local = {"local_files_only": True} if hub.get("local_files_only") else {}
        made = [model] if isinstance(model, nn.Module) else skeletons(model, classes=_classes(directory), labels=found.labels, **local)
        _try(made, directory, config, tensors, found)
    return found


def _raw(directory: Path) -> dict[str, Any]:
    values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _classes(directory: Path) -> list[str]:
    return [str(name) for name in [(_raw(directory).get("auto_mapping") or {}).get("base_model_class")] if name]


def _read_config(directory: Path, found: Diagnosis) -> PeftConfig | None:
    config: PeftConfig | None = None
    try:
        config = PeftConfig.read(directory)
    except VeneerError as e:
        if not (directory / CONFIG_NAME).is_file() or not _is_json(directory):
            raise
        found.problems.append(str(e))
    raw = _raw(directory)
    found.method, found.base = raw.get("peft_type"), raw.get("base_model_name_or_path")
    if str(found.method).endswith(OF_PARTS):
        found.method = str(found.method).removesuffix(OF_PARTS)
        found.spelling.append("it adapts parts of fused layers, for which other readers have no words; `veneer export` writes it for them")
    found.written_for, found.targets = raw.get("peft_version"), raw.get("target_modules") or raw.get("target_parameters")
    default = vars(config_classes()[found.method]()) if found.method in config_classes() else {}
    own = {k: v for k, v in raw.items() if k in default and k not in vars(PeftConfig())}
    found.options = {k: v for k, v in own.items() if (type(v) in (int, float) and v) or (v != default[k] and v)}
    missing = [k for k in default if k not in raw and k not in vars(PeftConfig())]
    if missing and config is not None:
        found.spelling.append(f"{len(missing)} fields of the configuration are missing and take their defaults, such as {missing[0]}")
    return config


def _is_json(directory: Path) -> bool:
    try:
        return bool(_raw(directory))
    except ValueError:
        return False


def _read_tensors(directory: Path, found: Diagnosis) -> dict[str, Tensor]:
    try:
        tensors = files.read_tensors(directory)
    except VeneerError as e:
        found.problems.append(str(e))
        return {}
    found.tensors, found.parameters = len(tensors), sum(t.numel() for t in tensors.values())
    found.types = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    for name in _raw(directory).get("modules_to_save") or []:
        own = [t for k, t in tensors.items() if f".{name}." in f".{k}" and ".original_module." not in k]
        if own:
            found.whole[name] = sum(t.numel() for t in own)
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not files.finite(t)]
    if bad:
        found.problems.append(f"{len(bad)} tensors hold NaN or infinite numbers, such as {bad[0]}; use an earlier checkpoint")
    return tensors


def _look_at(tensors: dict[str, Tensor], config: PeftConfig | None, found: Diagnosis) -> None:
    """Notes on how the tensors are called."""
    if tensors and not any(k.startswith("base_model.") for k in tensors):
        found.spelling.append(f"the keys have no {PREFIX} in front")
    for part, text in (
        ("base_layer", "of wrapped layers"),
        ("modules_to_save", "of wrapped modules"),
        ("original_module", "of wrapped modules"),
    ):
        inside = [k for k in tensors if f".{part}." in k]
        if inside:
            found.spelling.append(f"{len(inside)} keys hold the name {part}, {text}, such as {inside[0]}")
    names = sorted({name for k in tensors for name in _adapter_names(k, _endings(config))})
    if names:
        found.spelling.append(f"keys hold an adapter's name: {', '.join(names)}")
    if len(names) > 1:
        found.problems.append(f"the file holds {len(names)} adapters, {', '.join(names)}; save each into a directory of its own")


def _endings(config: PeftConfig | None) -> set[str]:
    """How the method's tensors are called at the end of their keys."""
    if config is None:
        return set()
    method = config.method("")
    return {p.key for form in _FORMS if method.why_not(form) is None for p in method.all_parameters(form) if p.key}


def _adapter_names(key: str, endings: set[str]) -> Iterator[str]:
    parts = key.split(".")
    if any(key.endswith("." + e) for e in endings):
        return
    for i in range(len(parts) - 1, max(len(parts) - 3, 0), -1):
        rest = ".".join(parts[:i] + parts[i + 1 :])
        if any(rest.endswith(("." + e, f".{e}.weight")) for e in endings) and parts[i] != "weight":
            yield parts[i]
            return


def _labels(tensors: dict[str, Tensor], found: Diagnosis) -> int | None:
    """The number of classes of a head inside, which the base model's configuration need not have."""
    rows = [t.shape[0] for k, t in tensors.items() if t.dim() == 2 and any(f".{name}." in f".{k}" for name in found.whole)]
    return min(rows, default=None)


def _try(models: Iterable[nn.Module], directory: Path, config: PeftConfig | None, tensors: dict[str, Tensor], found: Diagnosis) -> None:
    """Load it on the first of the models that takes it."""
    for model in models:
        name = type(model).__name__
        try:
            if config is None or not tensors:
                raise VeneerError(found.problems[0])
            final, layers = _load(model, directory, config, tensors)
        except VeneerError as e:
            found.loads, found.model, found.reason = "no", found.model or name, found.reason or str(e)
            continue
        found.renamed, found.layers = {old: new for old, new in final.items() if old != new}, layers
        found.loads, found.model, found.reason = "by translation" if found.renamed else "as it is", name, None
        if len(final) < len(tensors):
            found.spelling.append(
                f"{len(tensors) - len(final)} tensors are not the adapter's, but copies or the base model's own, and are left out"
            )
        return


def _load(model: nn.Module, directory: Path, config: PeftConfig, tensors: dict[str, Tensor]) -> tuple[dict[str, str], int]:
    """{key in the file: key in the model} of an adapter that loads, and the number of layers."""
    loaded = PeftModel.from_pretrained(model, directory)
    try:
        expected = files.entries(model, "default", shared=config.writes_shared)
        final = fitted(todays(model, config, tensors)[1], expected, dict(model.named_parameters(remove_duplicate=False)).get)
        before = {id(t): k for k, t in tensors.items()}
        return {before[id(t)]: k for k, t in final.items()}, len(record(model).plans["default"].sites)
    finally:
        loaded.unload()
