"""An adapter's directory or file, written anew for other readers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..conversion import checked
from ..converting import Conversion, convert, layers_of, notes_of, title_of
from ..errors import ConfigError, suggest
from ..foreign import is_foreign
from ..inject import record
from ..lycoris import save_lycoris
from .bases import Held, held
from .formats import FORMATS

_PREFIX = {"lycoris": "lycoris", "kohya": "lora_unet"}


@dataclass(frozen=True)
class Rewritten:
    """What was written.

    Args:
        output: where.
        how: "as it is" or "as LoRA".
        conversion: ranks and errors, where it became LoRA.
    """

    output: str
    how: str
    conversion: Conversion | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"output": self.output, "how": self.how, "conversion": None if self.conversion is None else self.conversion.to_dict()}

    def __str__(self) -> str:
        return "\n".join([*([str(self.conversion)] if self.conversion else []), f"{self.output}: {self.how}"])


def rewrite(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: nn.Module | str | None = None,
    *,
    to: str | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    prefix: str | None = None,
    uniform: bool = False,
    progress: bool = False,
    **hub: Any,
) -> Rewritten:
    """Write an adapter anew in another format: as plain LoRA, in the public format, or as one file of LyCORIS's or kohya's.

    Args:
        adapter: a directory, `owner/name` on the hub, or one `.safetensors` file of LyCORIS's or kohya's.
        output: a directory, or for the formats of one file its name, ending with `.safetensors`.
        model: the base model, which is left as it is; or its folder or name; None for the one that the adapter names.
        to: "lora", "peft", "lycoris" or "kohya"; "peft" for one file, "lora" for every other adapter, if None.
        rank, tolerance, uniform: as for `convert`.
        prefix: which model of a pipeline it is of, as for `load_lycoris` and `save_lycoris`.
        progress: show a bar, if it takes more than two seconds.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        AdapterFileError: no adapter there, or one that does not fit the model.
        ConfigError: no base model is known, or a wrong choice.
        StateError: a change that the format cannot say, and neither rank nor tolerance was given; nothing was written.
    """
    checked(rank, tolerance)
    to = to or ("peft" if is_foreign(adapter) else "lora")
    if to not in FORMATS:
        raise ConfigError(f"to: {to!r} is not one of {', '.join(FORMATS)}.{suggest(to, FORMATS)}")
    if Path(output).exists() and Path(adapter).exists() and Path(output).resolve() == Path(adapter).resolve():
        raise ConfigError(f"output: {output} is the adapter itself; give another name")
    if to == "peft" and not is_foreign(adapter) and (rank is not None or tolerance is not None):
        raise ConfigError("rank and tolerance make it LoRA; write it to lora, lycoris or kohya")
    if uniform and _DIRECTORIES.get(to) is not _as_lora:
        raise ConfigError(f"uniform is of plain LoRA's directory, which to={to!r} does not write; leave it out, or use to='lora'")
    if prefix is not None and to not in _PREFIX and not is_foreign(adapter):
        raise ConfigError("prefix is of files of LyCORIS's or kohya's, and none is read or written; leave it out")
    of_file: dict[str, Any] = {"prefix": prefix, "rank": rank, "tolerance": tolerance} if is_foreign(adapter) else {}
    with held(adapter, model, **of_file, **hub) as it:
        if it.read is not None and it.read.factors:
            rank = tolerance = None  # it is LoRA already, as near as was asked for
        if to in _PREFIX:
            return _as_one_file(it, output, prefix or _PREFIX[to], rank, tolerance)
        how = partial(convert, it.model, "default", rank, tolerance, save_directory=output, uniform=uniform, progress=progress)
        return _DIRECTORIES[to](it, output, how)


def _as_lora(it: Held, output: str | os.PathLike[str], write: Callable[[], Conversion]) -> Rewritten:
    done = write()
    return Rewritten(str(output), "as LoRA", _read_as(it) or done)


def _as_it_is(it: Held, output: str | os.PathLike[str], write: Callable[[], Conversion]) -> Rewritten:
    """In the public format; where it has no words for parts of fused layers, as LoRA."""
    if any(s.is_part for s in record(it.model.get_base_model()).plans["default"].sites):
        return _as_lora(it, output, write)
    it.model.save_pretrained(output)
    return Rewritten(str(output), "as LoRA" if _read_as(it) else "as it is", _read_as(it))


_DIRECTORIES = {"lora": _as_lora, "peft": _as_it_is}


def _read_as(it: Held) -> Conversion | None:
    """The report of a file that became LoRA when it was read."""
    read = it.read
    return (
        Conversion(read.title, layers_of(read.factors), read.config, read.tensors, notes_of(read.config, read.tensors))
        if read and read.factors
        else None
    )


def _as_one_file(it: Held, output: str | os.PathLike[str], prefix: str, rank: int | None, tolerance: float | None) -> Rewritten:
    factors = save_lycoris(it.model, output, "default", prefix=prefix, rank=rank, tolerance=tolerance)
    if not factors:
        return Rewritten(str(output), "as LoRA" if _read_as(it) else "as it is", _read_as(it))
    config = it.model.peft_config["default"]
    return Rewritten(str(output), "as LoRA", Conversion(title_of(config), layers_of(factors), config, {}))


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
        StateError: parts whose change has no low rank, so that no other reader has words for them; nothing was written. `rewrite` writes the
            nearest LoRA.
    """
    return rewrite(adapter, output, model, to="peft", **hub).how
