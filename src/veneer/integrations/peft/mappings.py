"""The tables by which code of the field goes from a method's or a task's name to its class."""

from __future__ import annotations

from ...config import PeftConfig, config_classes
from ...model import PeftModel

__all__ = ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING"]

PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, type[PeftConfig]] = config_classes()
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = PeftModel.OF_TASK
