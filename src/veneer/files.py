"""The adapter's format on disk: keys, strict reading, whole writing.

Reading is all or nothing: the tensors of the file and those that the model expects must be the same set, of the same shapes and finite, or an
error names the first that is not and the model stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .config import CONFIG_NAME, PREFIX, PeftConfig
from .errors import AdapterFileError, StateError
from .inject import adapter_of, record
from .labels import LABELS_NAME, checked, chosen, label_tensors, written
from .labels import read as read_labels
from .layers import SavedModule, set_outputs, takes_outputs
from .methods.transfer import difference
from .planning import Plan
from .shelving import keep_to_budget, unpack

WEIGHTS_NAME = "adapter_model.safetensors"
STATE_NAME = "schedule.safetensors"
"""What a schedule has learnt, beside the adapter; only what goes on training reads it."""


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
        raise AdapterFileError(
            f"{directory} has no {WEIGHTS_NAME}; an adapter's directory holds it beside {CONFIG_NAME} (a .bin in its place is not read: a pickle can run code)"
        )
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU.

    Raises:
        AdapterFileError: no such file, or one that is damaged.
    """
    if not path.is_file():
        raise AdapterFileError(f"there is no file {path}")
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
        if tensor.is_floating_point() and not finite(tensor):
            raise AdapterFileError(f"{origin}: {key} holds NaN or infinite numbers; use an earlier checkpoint")


def finite(t: Tensor) -> bool:
    """Whether every number is finite."""
    # One pass without a copy; a sum can also overflow, so only it says yes.
    return isfinite(t.sum().item()) or bool(t.isfinite().all())


def _hint(expected: Mapping[str, Tensor]) -> str:
    return f"here adapters have keys such as {next(iter(expected))}" if expected else "no layer here has an adapter"


def entries(model: nn.Module, name: str, *, shared: bool = True) -> dict[str, Tensor]:
    """The tensors of one attached adapter by their key in the file: parameters, whole modules with their buffers, trained biases.

    Args:
        shared: with the constants that all its layers share.
    """
    found: dict[str, Tensor] = {}
    note = record(model)
    plan = note.plans[name]
    for site in plan.sites:
        found |= {site.file_key(key): t for key, t in adapter_of(model, site, name).file_tensors().items()}
    if shared and name in note.shared:
        found |= {f"base_model.{key}": t for key, t in note.shared[name].named_buffers()}
    for path in plan.saved:
        module = model.get_submodule(path)
        own = module.copy_of(name) if isinstance(module, SavedModule) else None
        if own is not None:
            found |= {f"{PREFIX}{path}.{key}": t for key, t in own.state_dict(keep_vars=True).items()}
    wrapped = {s.path for s in plan.sites} | {s.module for s in plan.sites}
    for bias in plan.biases:
        found[PREFIX + through(wrapped, bias)] = model.get_parameter(bias)
    return found


def through(wrapped: set[str], name: str) -> str:
    """A parameter's name with `base_layer` behind every module that the format wraps."""
    parts, out = name.split("."), []
    for i, part in enumerate(parts):
        out.append(part)
        if ".".join(parts[: i + 1]) in wrapped:
            out.append("base_layer")
    return ".".join(out)


def states(model: nn.Module, name: str, *, always: bool = False) -> dict[str, Tensor]:
    """What a schedule has learnt about one attached adapter, beside its parameters; empty for most methods, and before the first step."""
    found: dict[str, Tensor] = {}
    for site in record(model).plans[name].sites:
        found |= {f"{site.module}.{site.kind.slot}.{key}": t for key, t in adapter_of(model, site, name).state().items()}
    return found if always or any(bool(t.any()) for t in found.values()) else {}


def serialise(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file, the same for the same tensors."""
    return save({k: t.detach().cpu().contiguous() for k, t in sorted(tensors.items())}, metadata={"format": "pt"})


def _base(model: nn.Module) -> Callable[[str], Tensor | None]:
    """The base model's own parameter of a name, or None."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return own.get


@torch.no_grad()
def load(
    model: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    directory: Path,
    *,
    shared: bool = True,
    labels: Mapping[int, str] | None = None,
    config: PeftConfig | None = None,
) -> None:
    """Copy an adapter's tensors into an attached adapter, after all of them were checked, and what a schedule left beside them.

    Args:
        directory: where they come from.
        shared: whether the file holds the constants that all layers share.
        labels: the names of its head's labels; those in the directory if None.
        config: that of the file, where the adapter was attached by another one, with which its numbers must mean the same.

    Raises:
        AdapterFileError: as `check_tensors`; nothing was copied.
        StateError: the file's equation or its scale is another; nothing was copied.
    """
    from .translation import fitted, todays_states

    unpack(model, [name])
    expected = entries(model, name, shared=shared)
    tensors = fitted(tensors, expected, _base(model))
    heads = _heads(model, name)
    resized = _resized(heads, tensors, expected)
    check_tensors(tensors, expected | {k: torch.empty(tensors[k].shape, device="meta") for k in expected if k in resized}, str(directory))
    if config is not None:
        _refuse_other_equation(model, name, config, directory)
    names = label_names(model, record(model).plans[name], tensors, directory, labels or record(model).labels.get(name), read=labels is None)
    known = states(model, name, always=True)
    state = todays_states(model, read_safetensors(directory / STATE_NAME)) if known and (directory / STATE_NAME).is_file() else {}
    if state:
        check_tensors(state, known, str(directory / STATE_NAME))
    for layer, n in dict(resized.values()).items():
        set_outputs(layer, n)
    expected = entries(model, name, shared=shared) if resized else expected
    for key, target in expected.items():
        target.copy_(tensors[key])
    for key, value in state.items():
        known[key].copy_(value)
    if names is not None:
        record(model).naming.give(model, name, names)
    keep_to_budget(model)


def _refuse_other_equation(model: nn.Module, name: str, config: PeftConfig, origin: Path) -> None:
    for site in record(model).plans[name].sites:
        if config.method(site.path) == site.method:
            continue
        methods = [config.method(called) for called in (site.path, site.weight)]
        reasons = [difference(site.method, other) for other in methods]
        if None not in reasons:
            raise StateError(
                f"{origin} cannot be read into the attached adapter {name!r}: at {site.weight} {reasons[0]}, with which these numbers mean something else; "
                "load it under a name of its own"
            )
        if site.method.scale not in [m.scale for m in methods]:
            raise StateError(
                f"{origin} has the scale {methods[0].scale} at {site.weight}, and the attached adapter {name!r} has {site.method.scale}, with which these "
                "numbers mean something else; load it with hotswap=True, which takes that into account, or under a name of its own"
            )


def label_names(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    directory: Path,
    before: Mapping[int, str] | None = None,
    *,
    read: bool = True,
) -> Mapping[int, str] | None:
    """The label names of the head in an adapter's directory; None where it has no head that tells labels apart.

    Args:
        before: those of the adapter that it comes from or replaces, which stay where the directory has none.
        read: whether the directory may have names.

    Raises:
        AdapterFileError: as many names as the head has outputs were expected.
    """
    base = record(model).naming.of_base(model)
    found = label_tensors(model, plan.saved, base)
    if base is None or not found:
        return None
    outputs = tensors[PREFIX + found[-1]].shape[0]
    own = checked(read_labels(directory) if read else None, outputs, directory)
    return before if own is None and before is not None and len(before) == outputs else chosen(base, outputs, own)


def _heads(model: nn.Module, name: str) -> dict[nn.Module, list[str]]:
    """The layers of an adapter's own head that have one output for each label → the keys of their tensors, in the head's order."""
    note = record(model)
    found: dict[nn.Module, list[str]] = {}
    for parameter in label_tensors(model, note.plans[name].saved, note.naming.of_base(model)):
        path = next(p for p in note.plans[name].saved if parameter.startswith(p + "."))
        module = model.get_submodule(path)
        assert isinstance(module, SavedModule)
        own = module.copy_of(name)
        assert own is not None
        found.setdefault(own.get_submodule(parameter.removeprefix(path + ".").rpartition(".")[0]), []).append(PREFIX + parameter)
    return found


def _resized(
    heads: Mapping[nn.Module, list[str]], tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Module, int]]:
    """The keys of the layers in an adapter's head that have another number of labels in its file → the layer and that number."""
    found: dict[str, tuple[nn.Module, int]] = {}
    for layer, keys in heads.items():
        if not takes_outputs(layer) or any(k not in tensors or tensors[k].shape[1:] != expected[k].shape[1:] for k in keys):
            continue
        counts = {tensors[k].shape[0] for k in keys}
        if len(counts) == 1 and counts != {expected[keys[0]].shape[0]}:
            found |= {k: (layer, next(iter(counts))) for k in keys}
    return found


def names_to_write(model: nn.Module, name: str) -> dict[str, bytes | None]:
    """The file of an adapter's label names; None where there must be none."""
    note = record(model)
    note.naming.note(model)
    if name not in note.labels:
        return {}
    return {LABELS_NAME: None} | written(note.labels[name])
