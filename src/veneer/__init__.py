"""Veneer: parameter-efficient fine-tuning with thin trainable layers on a frozen model.

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapting import inject_adapter_in_model
    from .auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .config import PeftConfig, TaskType, get_peft_config
    from .converting import Conversion, convert
    from .engine import strategy
    from .errors import AdapterFileError, ConfigError, DataError, StateError, TargetError, VeneerError, VeneerWarning
    from .explaining import Explanation, explain
    from .hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from .integrations.combinations import Combination, combine
    from .integrations.diagnosis import Diagnosis
    from .integrations.doctor import diagnose
    from .integrations.exporting import Rewritten, export, rewrite
    from .integrations.measuring import Measured, measure
    from .integrations.merged_models import SavedModel, save_merged
    from .integrations.peft import as_peft
    from .kbit import cast_mixed_precision_params, prepare_model_for_kbit_training
    from .lycoris import load_lycoris, save_lycoris
    from .merging import MergeReport
    from .model import PeftModel
    from .peft_type import PeftType
    from .planning import Plan, plan
    from .probing import Probe, check_parts
    from .state_dicts import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        load_peft_weights,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
    from .tasks import (
        PeftMixedModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from .vocabulary import TargetNames, target_names

__version__ = "0.1.0"

_NAMES_OF = {
    "adapting": "inject_adapter_in_model",
    "auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM "
    "AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification",
    "config": "PeftConfig TaskType get_peft_config",
    "converting": "Conversion convert",
    "engine": "strategy",
    "errors": "AdapterFileError ConfigError DataError StateError TargetError VeneerError VeneerWarning",
    "explaining": "Explanation explain",
    "hotswap": "hotswap_adapter prepare_model_for_compiled_hotswap",
    "integrations.combinations": "Combination combine",
    "integrations.diagnosis": "Diagnosis",
    "integrations.doctor": "diagnose",
    "integrations.exporting": "Rewritten export rewrite",
    "integrations.measuring": "Measured measure",
    "integrations.merged_models": "SavedModel save_merged",
    "integrations.peft": "as_peft",
    "kbit": "cast_mixed_precision_params prepare_model_for_kbit_training",
    "lycoris": "load_lycoris save_lycoris",
    "merging": "MergeReport",
    "model": "PeftModel",
    "peft_type": "PeftType",
    "planning": "Plan plan",
    "probing": "Probe check_parts",
    "state_dicts": "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict set_peft_model_state_dict",
    "status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "tasks": "PeftMixedModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification get_peft_model",
    "vocabulary": "TargetNames target_names",
}
_HOME = {name: home for home, names in _NAMES_OF.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        value = sorted([*_HOME, *_configs()])
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        value = _config_class(name)
    if _HOME.get(name) in ("auto", "model", "tasks"):
        from . import tasks  # which gives each task its class
        from .integrations import install

        install()
    globals()[name] = value
    return value


def _configs() -> dict[str, Any]:
    """Every method's configuration class, such as `LoraConfig`, by its name; found by the methods' files, not listed here."""
    from .config import config_classes

    return {c.__name__: c for c in config_classes().values()}


def _config_class(name: str) -> Any:
    # The file that is called as the method first: reading one costs a tenth of reading all.
    file = f"{__name__}.methods.{name.removesuffix('Config').lower()}"
    own = getattr(import_module(file), name, None) if name.endswith("Config") and find_spec(file) else None
    if own is not None:
        return own
    found = _configs() if name.endswith("Config") else {}
    if name not in found:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    return found[name]
