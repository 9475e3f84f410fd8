"""`load_lycoris` and `save_lycoris`: adapters as one file with the keys of LyCORIS and of kohya's scripts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .errors import StateError
from .foreign import Foreign, read_foreign, save_foreign
from .inject import record

if TYPE_CHECKING:
    from .conversion import Factored
    from .model import PeftModel


def load_lycoris(
    model: PeftModel,
    file: str | os.PathLike[str],
    adapter_name: str,
    *,
    prefix: str | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> Foreign:
    """Attach the adapter of a LyCORIS or kohya file, inactive; `PeftModel.from_pretrained(model, file)` starts with one.

    Args:
        model: the model with adapters.
        file: a `.safetensors` file whose keys are such as `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`.
        adapter_name: a new one.
        prefix: which part of a pipeline the model is, such as "lora_unet", where the file is for several.
        rank, tolerance: make it LoRA, as for `convert`; needed for what is neither a method here nor of low rank.
        is_trainable: go on training it.
        autocast_adapter_dtype: keep its parameters in float32 where the layers' own are in half precision.

    Returns:
        What was read, and as what.

    Raises:
        AdapterFileError: the file is none of such, or does not fit the model, which is as it was.
        StateError: the name is taken, or the change has no low rank where neither rank nor tolerance was given.
    """
    if adapter_name in model.peft_config:
        raise StateError(f"an adapter called {adapter_name!r} is attached already; load {file} under another name")
    found = read_foreign(model.get_base_model(), file, prefix=prefix, rank=rank, tolerance=tolerance)
    model._take_in(adapter_name, found.config, found.tensors, Path(file), is_trainable, autocast_adapter_dtype)
    return found


def save_lycoris(
    model: nn.Module,
    file: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    prefix: str = "lycoris",
    rank: int | None = None,
    tolerance: float | None = None,
) -> dict[str, Factored]:
    """Write an attached adapter as one file with LyCORIS's keys: LoRA, DoRA, LoHa and LoKr as they are, every other method as LoRA.

    Args:
        model: a model with adapters.
        file: ends with `.safetensors`; replaced whole or not at all.
        adapter_name: the first active one if None.
        prefix: in front of each module's path: "lycoris", or "lora_unet", "lora_te" … for the parts of a pipeline.
        rank, tolerance: make it LoRA, as for `convert`.

    Returns:
        The change of each layer as factors, where it was made LoRA; empty where the file says the same tensors.

    Raises:
        StateError: what such files have no word for (biases, whole modules, embeddings), or a change of no low rank where neither rank nor tolerance was
            given; nothing was written.

    >>> import os, tempfile, torch, veneer
    >>> model = veneer.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), veneer.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "lora.safetensors")
    ...     veneer.save_lycoris(model, file)
    ...     veneer.load_lycoris(model, file, "again").title
    {}
    'LoRA'
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # a PeftModel's
    note = record(base)
    name = adapter_name or (note.active[0] if note.active else next(iter(note.plans)))
    return save_foreign(base, file, name, prefix=prefix, rank=rank, tolerance=tolerance)
