"""How such files spell a tensor: a prefix for the part of the pipeline, the module's path with underscores, and the tensor's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..errors import AdapterFileError, suggest
from ..layers import places
from ..oldnames import old_names
from ..targets import base_modules
from .algorithms import PARTS

PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lora_transformer", "lora_prior", "lycoris")
"""What a part of a pipeline is called in front of its modules' paths."""


def grouped(tensors: Mapping[str, Tensor], origin: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module, by the module's name in the file.

    Raises:
        AdapterFileError: tensors that no algorithm of such files has.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        part = next((p for p in PARTS if key.endswith("." + p)), None)
        if part is None:
            unknown.append(key)
        else:
            found.setdefault(key[: -len(part) - 1], {})[part] = tensor
    if unknown or not found:
        ours = any(".lora_A." in k or k.startswith("base_model.") for k in unknown)
        hint = " These are of HF PEFT's format; give the folder that holds them beside adapter_config.json" if ours else ""
        raise AdapterFileError(
            f"{origin}: {len(unknown)} tensors are none of LyCORIS's or kohya's, such as {next(iter(unknown), 'none')}.{hint}"
        )
    return found


def of_prefix(names: Iterable[str], prefix: str | None, origin: str) -> dict[str, str]:
    """The names that belong to one part of a pipeline → the flattened path of their module.

    Raises:
        AdapterFileError: no such part, or several and none was chosen.
    """
    names = list(names)
    by_prefix: dict[str, dict[str, str]] = {}
    for name in names:
        own = next((p for p in sorted(PREFIXES, key=len, reverse=True) if name.startswith((p + "_", p + "."))), "")
        by_prefix.setdefault(own, {})[name] = name[len(own) + 1 if own else 0 :].replace(".", "_")
    if prefix is None and len(by_prefix) == 1:
        return next(iter(by_prefix.values()))
    if prefix is not None and prefix not in by_prefix:
        matching = {n: n[len(prefix) :].lstrip("_.").replace(".", "_") for n in names if n.startswith((prefix + "_", prefix + "."))}
        if matching:
            return matching
        raise AdapterFileError(f"{origin} has nothing called {prefix}_…; there is {', '.join(by_prefix)}.{suggest(prefix, by_prefix)}")
    if prefix is None:
        counts = ", ".join(f"{p or 'no prefix'} ({len(found)} modules)" for p, found in sorted(by_prefix.items()))
        raise AdapterFileError(
            f"{origin} is for several models: {counts}; say by prefix= (of load_lycoris; --prefix on the command line) which of them this one is"
        )
    return by_prefix[prefix]


def resolved(model: nn.Module, flat: Mapping[str, str], origin: str) -> dict[str, str]:
    """Name in the file → path of the module that it means.

    Raises:
        AdapterFileError: names that mean no layer of the model, or several.
    """
    today = {path: path for path, m in base_modules(model) if path and places(m)}
    tables = [today, *({path: then for path, then in table.items() if path in today} for table in old_names(model))]
    best: tuple[dict[str, list[str]], int] = {}, -1
    for table in tables:
        index: dict[str, list[str]] = {}
        for path, called in table.items():
            index.setdefault(called.replace(".", "_"), []).append(path)
        hits = sum(f in index for f in flat.values())
        best = (index, hits) if hits > best[1] else best
    index = best[0]
    unknown = [name for name, f in flat.items() if f not in index]
    if unknown:
        near = suggest(flat[unknown[0]], index)
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise AdapterFileError(
            f"{origin}: {', '.join(unknown[:3])}{more} mean no layer of this {type(model).__name__}.{near} Load it on the model it was trained on"
        )
    several = {name: index[f] for name, f in flat.items() if len(index[f]) > 1}
    if several:
        name, paths = next(iter(several.items()))
        raise AdapterFileError(f"{origin}: {name} may mean {' or '.join(paths)}, which are the same with underscores; nothing was loaded")
    return {name: index[f][0] for name, f in flat.items()}
