"""Where each public name of HF PEFT 0.21 is found in Veneer, and what to say of those that Veneer does not have."""

from __future__ import annotations

import veneer

# Every public name of the top module. What `veneer` itself has under the same name is that; the rest is absent.
_PUBLIC = """
MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig
AdaptionPromptModel ArrowConfig AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering
AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification BOFTConfig BOFTModel BdLoraConfig
BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig
DeloraModel EvaConfig FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig GraloraModel HRAConfig
HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel LilyConfig LilyModel LoHaConfig LoHaModel
LoKrConfig LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig MissConfig MissModel MontecloraConfig
MultitaskPromptTuningConfig MultitaskPromptTuningInit NoMatchingPeftModuleError OFTConfig OFTModel OSFConfig OSFModel PeanutConfig
PeanutModel PeftConfig PeftError PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification PeftType PeftWarning PolyConfig PolyModel
PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType
PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel PveraConfig PveraModel RandLoraConfig RandLoraModel
RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig SupertuningModel TaskType TinyLoraConfig
TinyLoraModel TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel VeloraConfig VeraConfig
VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel bloom_model_postprocess_past_key_value cast_mixed_precision_params
compose_cartridge_adapters convert_to_lora create_arrow_model find_kappa_target_modules get_base_model_state_dict get_eva_state_dict
get_layer_status get_model_status get_peft_config get_peft_model get_peft_model_state_dict initialize_kv_prefix_from_past_key_values
initialize_kv_prefix_from_text initialize_lora_eva_weights inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training
preprocess_loraga prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora set_base_model_state_dict
set_peft_model_state_dict shift_tokens_right
"""
PUBLIC = set(_PUBLIC.split())

_OWN: list[str] = getattr(veneer, "__all__")  # noqa: B009  # made on first use
_HERE = __package__
_LAYERS, _ERRORS, _TRANSFORMERS = f"{_HERE}.layers:", "veneer.errors:", f"{_HERE}.transformers:"


def _of_veneer(*names: str) -> dict[str, str]:
    return {name: f"veneer:{name}" for name in names}


_ERROR_NAMES = {
    "NoMatchingPeftModuleError": f"{_ERRORS}TargetError",
    "PeftError": f"{_ERRORS}VeneerError",
    "PeftWarning": f"{_ERRORS}VeneerWarning",
}
_PROMPTS = {name: _LAYERS + name for name in ("PrefixTuningConfig", "PromptLearningConfig")}
_MAPPINGS = {name: f"{_HERE}.mappings:{name}" for name in ("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING")}
_CONFIGS = _of_veneer(*(n for n in _OWN if n in PUBLIC and n.endswith("Config") and n != "PeftConfig"))
_STATE = _of_veneer(
    "get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights", "set_base_model_state_dict", "set_peft_model_state_dict"
)
_INJECT = _of_veneer("inject_adapter_in_model")
_OTHER = {"ModulesToSaveWrapper": f"{_LAYERS}ModulesToSaveWrapper", "AuxiliaryTrainingWrapper": f"{_LAYERS}AuxiliaryTrainingWrapper"}
_OTHER |= {"_get_submodules": f"{_LAYERS}get_submodules"} | _of_veneer("prepare_model_for_kbit_training", "cast_mixed_precision_params")
_FILES = {"CONFIG_NAME": "veneer.config:", "SAFETENSORS_WEIGHTS_NAME": "veneer.files:WEIGHTS_NAME"}
_ON_MODELS = {name: _LAYERS + name for name in ("delete_adapter", "set_adapter", "set_requires_grad")}
_CONVERSION = {name: f"{_HERE}.conversion:{name}" for name in ("convert_to_lora", "save_as_lora")}
_TUNER_LAYER = {"BaseTunerLayer": f"{_LAYERS}BaseTunerLayer"}


def _tuner(config: str, layer: str, **more: str) -> dict[str, str]:
    return _of_veneer(config) | {layer: _LAYERS + layer} | more


_LORA = _tuner("LoraConfig", "LoraLayer")
_LOHA = _tuner("LoHaConfig", "LoHaLayer")
_LOKR = _tuner("LoKrConfig", "LoKrLayer", factorization=f"{_LAYERS}factorization")

# The module below `peft` → its names → "module:attribute", the attribute being of the same name where it is left out.
MODULES: dict[str, dict[str, str]] = {
    "": {**_of_veneer(*(n for n in _OWN if n in PUBLIC)), **_ERROR_NAMES, **_PROMPTS, **_MAPPINGS, **_CONVERSION},
    "auto": _of_veneer(*(n for n in _OWN if n.startswith("AutoPeftModel"))),
    "config": _of_veneer("PeftConfig") | {"PeftConfigMixin": "veneer:PeftConfig", **_PROMPTS},
    "functional": _STATE | _INJECT | _ON_MODELS,
    "helpers": {"disable_input_dtype_casting": f"{_LAYERS}disable_input_dtype_casting"},
    "mapping": _INJECT | _of_veneer("get_peft_config") | {"PEFT_TYPE_TO_CONFIG_MAPPING": _MAPPINGS["PEFT_TYPE_TO_CONFIG_MAPPING"]},
    "mapping_func": _of_veneer("get_peft_model") | {"MODEL_TYPE_TO_PEFT_MODEL_MAPPING": _MAPPINGS["MODEL_TYPE_TO_PEFT_MODEL_MAPPING"]},
    "mixed_model": _of_veneer("PeftMixedModel"),
    "peft_model": _of_veneer(*(n for n in _OWN if n.startswith("PeftModel")), "get_layer_status", "get_model_status"),
    "tuners": {**_CONFIGS, "LoraLayer": f"{_LAYERS}LoraLayer"},
    "tuners.loha": _LOHA,
    "tuners.loha.config": _of_veneer("LoHaConfig"),
    "tuners.loha.layer": _LOHA,
    "tuners.lokr": _LOKR,
    "tuners.lokr.config": _of_veneer("LoKrConfig"),
    "tuners.lokr.layer": _LOKR,
    "tuners.lora": _LORA | _CONVERSION,
    "tuners.lora.conversion": _CONVERSION,
    "tuners.lora.config": _of_veneer("LoraConfig"),
    "tuners.lora.layer": _LORA,
    "tuners.tuners_utils": _TUNER_LAYER | _ON_MODELS,
    "utils": {**_STATE, **_OTHER, **_FILES, **_ERROR_NAMES, **_of_veneer("PeftType", "TaskType")},
    "utils.constants": _FILES,
    "utils.hotswap": _of_veneer("hotswap_adapter", "prepare_model_for_compiled_hotswap"),
    "utils.error": {n: _ERROR_NAMES[n] for n in ("NoMatchingPeftModuleError", "PeftError")},
    "utils.other": _OTHER | _FILES,
    "utils.peft_types": _of_veneer("PeftType", "TaskType"),
    "utils.save_and_load": _STATE,
    "utils.transformers_weight_conversion": {"build_peft_weight_mapping": f"{_TRANSFORMERS}build_peft_weight_mapping"},
    "utils.warning": {"PeftWarning": _ERROR_NAMES["PeftWarning"]},
}

_ONE_CLASS = "Veneer has no class for each method; isinstance(model, PeftModel), and model.peft_config[name].peft_type tells the method"
_INSTEAD = {
    "fsdp_auto_wrap_policy": "Veneer works with FSDP2 (fully_shard, fsdp_version 2), which needs no policy",
    "hotswap_adapter_from_state_dict": "use hotswap_adapter(model, directory, name)",
    "check_hotswap_configs_compatible": "hotswap_adapter checks it, before anything is changed",
    "TrainableTokensConfig": "name the embedding in modules_to_save",
    "replace_lora_weights_loftq": 'use init_lora_weights="pissa" over weights that are not packed',
    "LoraRuntimeConfig": "Veneer's adapters have no options at run time",
    "shift_tokens_right": "transformers' models have it",
}


def absent(below: str, name: str) -> bool:
    """Whether HF PEFT has this name, and Veneer does not."""
    return (
        name in _INSTEAD
        or (not below and name in PUBLIC and name not in MODULES[""])
        or (below != "" and below in MODULES and name[:1].isupper())
    )


def why_absent(below: str, name: str) -> str:
    """What to say of a name that the module does not have."""
    where = f"peft.{below}" if below else "peft"
    if not absent(below, name):
        return f"module {where!r}, which Veneer stands in for, has no attribute {name!r}."
    why = _INSTEAD.get(name)
    if why is None and name.endswith("Model") and f"{name.removesuffix('Model')}Config" in _CONFIGS:
        why = _ONE_CLASS
    if why is None:
        why = f"Veneer has the methods of {', '.join(sorted(_CONFIGS))}; for anything else use HF PEFT without veneer.as_peft()"
    return f"{where}.{name} is not part of Veneer: {why}"
