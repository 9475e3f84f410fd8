"""How transformers' own `load_adapter` finds the model's parameters for the tensors of an adapter's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...config import PeftConfig


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[Any]:
    """The renamings that transformers applies to a file's names, before those that each module with adapters gives (`adapter_state_dict_load_map`).

    Args:
        weight_conversions: the model's own; its renamings hold for adapters that were trained under older names, its conversions of values do not.
        adapter_name, peft_config: of the adapter that is loaded; the modules know the rest.
    """
    from transformers.core_model_loading import WeightRenaming

    renamings = [c for c in weight_conversions or [] if isinstance(c, WeightRenaming)]
    return [WeightRenaming("base_model.model.", ""), *renamings]
