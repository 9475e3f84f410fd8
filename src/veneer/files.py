"""The adapter's format on disk: keys, strict reading, whole writing.

Reading is all or nothing: the tensors of the file and those that the model expects must be the same set, of the same shapes and finite, or an
error names the first that is not and the model stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .config import CONFIG_NAME
from .errors import AdapterFileError
from .inject import adapted_layers, record, saved_modules

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's directory, on the CPU.

    Raises:
        AdapterFileError: no safetensors file, or one that is damaged. A pickled `.bin` is never opened.
    """
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise AdapterFileError(
                f"{directory} holds adapter_model.bin only. A pickle can run code when it is opened, so Veneer does not; convert it where you trust it: "
                "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')\""
            )
        raise AdapterFileError(f"{directory} has no {WEIGHTS_NAME}; an adapter's directory holds it beside {CONFIG_NAME}")
    try:
        return load_file(path)
    except SafetensorError as e:
        raise AdapterFileError(f"{path} is damaged ({e}); copy or download it again") from None


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    """Hold a file's tensors against the parameters they are for.

    Raises:
        AdapterFileError: a missing, unexpected, misshapen or non-finite tensor, by name.
    """
    missing = [k for k in expected if k not in found]
    unexpected = [k for k in found if k not in expected]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing, such as {missing[0]}")
        if unexpected:
            parts.append(f"{len(unexpected)} unexpected, such as {unexpected[0]}")
        raise AdapterFileError(
            f"{origin} does not fit this model: tensors {' and '.join(parts)}. Load it on the model it was trained on ({_hint(expected)})"
        )
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise AdapterFileError(
                f"{origin}: {key} has shape {tuple(tensor.shape)}, the model needs {tuple(expected[key].shape)}; it was trained on a model of another size, label set or rank"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise AdapterFileError(f"{origin}: {key} holds NaN or infinite numbers; use an earlier checkpoint")


def _hint(expected: Mapping[str, Tensor]) -> str:
    return f"here adapters have keys such as {next(iter(expected))}" if expected else "no layer here has an adapter"


def entries(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one attached adapter by their key in the file: parameters, whole modules with their buffers, trained biases."""
    found: dict[str, Tensor] = {}
    sites = set()
    for path, layer in adapted_layers(model):
        if name in layer.veneer:
            sites.add(path)
            found |= {f"{PREFIX}{path}.{key}": p for key, p in layer.veneer[name].keys(layer).items()}  # type: ignore[operator]  # an Adapter
    for path, module in saved_modules(model):
        if name in module.veneer:
            found |= {f"{PREFIX}{path}.{key}": t for key, t in module.veneer[name].state_dict(keep_vars=True).items()}
    for bias in record(model).plans[name].biases:
        path = bias.rpartition(".")[0]
        found[f"{PREFIX}{path}.base_layer.bias" if path in sites else PREFIX + bias] = model.get_parameter(bias)
    return found


def serialise(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file, the same for the same tensors."""
    return save({k: t.detach().cpu().contiguous() for k, t in sorted(tensors.items())}, metadata={"format": "pt"})


def _without_copies(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors without the second copies that the format's other writer adds for whole modules when `bias="all"`."""
    doubles = {f"{PREFIX}{path}.{part}." for path, _ in saved_modules(model) for part in ("modules_to_save", "original_module")}
    return {k: t for k, t in tensors.items() if not any(k.startswith(d) for d in doubles)}


@torch.no_grad()
def load(model: nn.Module, name: str, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy a file's tensors into an attached adapter, after all of them were checked.

    Raises:
        AdapterFileError: as `check_tensors`; nothing was copied.
    """
    expected = entries(model, name)
    tensors = _without_copies(tensors, model)
    check_tensors(tensors, expected, origin)
    for key, target in expected.items():
        target.copy_(tensors[key])
