"""Prepare a model for training in mixed precision or over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layers.storages import KEEP_SMALL_TYPES, is_packed


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze a model, bring what is in half precision to float32, and checkpoint activations where the weights are packed; the same model is returned.

    Args:
        model: a transformers model, before an adapter is attached.
        use_gradient_checkpointing: checkpoint activations of a model with packed weights.
        gradient_checkpointing_kwargs: for the model's `activation_checkpointing_enable`; with `use_reentrant` the inputs are made to require grad.
        auto_clear_cache: give memory that the half-precision copies held back to the GPU.
    """
    options = gradient_checkpointing_kwargs or {}
    method = str(getattr(model, "quantization_method", None) or "").rpartition(".")[2].lower()
    keeps = method in KEEP_SMALL_TYPES or bool(getattr(model, "hqq_quantized", False))
    packed = keeps or bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))
    host: Any = model
    for p in model.parameters():
        p.requires_grad_(False)
        if not keeps and p.dtype in (torch.float16, torch.bfloat16) and not is_packed(p):
            p.data = p.data.float()
    if not keeps and auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if packed and use_gradient_checkpointing:
        if options.get("use_reentrant", True):
            host.enable_input_require_grads()
        enable = getattr(host, "activation_checkpointing_enable", None) or host.gradient_checkpointing_enable
        enable(options or None)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to `dtype` and what trains to float32.

    Args:
        dtype: `torch.float16` or `torch.bfloat16`, as the training's autocast has it.

    >>> import torch
    >>> from veneer import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
    >>> cast_mixed_precision_params(model, torch.bfloat16)
    >>> sorted({(p.requires_grad, p.dtype) for p in model.parameters()}, key=str)
    [(False, torch.bfloat16), (True, torch.float32)]
    """
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
