"""The public functions of HF PEFT, and the names that code of the field reads on models and layers, against the installed HF PEFT where both can be asked."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import veneer
from veneer import ConfigError, LoHaConfig, LoraConfig, PeftModel, PeftType, StateError, get_peft_model, inject_adapter_in_model
from veneer.layers import Swapped

LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 43, "num_labels": 3,
}  # fmt: skip


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def wrapped(**options) -> PeftModel:
    return get_peft_model(small(), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False, **options))


FUNCTIONS = [
    "inject_adapter_in_model", "get_peft_model", "get_peft_model_state_dict", "set_peft_model_state_dict", "load_peft_weights", "get_peft_config",
    "prepare_model_for_kbit_training", "cast_mixed_precision_params", "get_layer_status", "get_model_status",
]  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_the_arguments_of_hf_peft_in_its_order(name):
    ours, theirs = (inspect.signature(getattr(library, name)).parameters for library in (veneer, peft))
    left_out = {"low_cpu_mem_usage"} if name == "get_peft_model" else set()
    assert [p for p in theirs if p not in {*left_out, "hf_hub_download_kwargs"}] == [p for p in ours if p != "hub"]


@pytest.mark.parametrize("name", ["TunerLayerStatus", "TunerModelStatus"])
def test_statuses_have_the_fields_of_hf_peft(name):
    theirs = getattr(peft.peft_model, name)
    assert [f.name for f in dataclasses.fields(getattr(veneer, name))] == [f.name for f in dataclasses.fields(theirs)]


def test_statuses_say_what_those_of_hf_peft_say():
    def both(library):
        model = library.get_peft_model(small(), library.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["0"]))
        return [dataclasses.asdict(s) for s in library.get_layer_status(model)], dataclasses.asdict(library.get_model_status(model))

    (ours, our_model), (theirs, their_model) = both(veneer), both(peft)
    assert [s | {"module_type": ""} for s in ours[:1]] == [s | {"module_type": ""} for s in theirs[:1]]
    assert ours[0]["module_type"] == theirs[0]["module_type"] == "lora.Linear"
    for field in (
        "base_model_type",
        "peft_types",
        "num_adapter_layers",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "available_adapters",
        "devices",
    ):
        assert our_model[field] == their_model[field], field
    model = wrapped()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"] and model.get_layer_status()[0].merged_adapters == ["default"]
    model.base_model.model[0].unmerge()
    assert model.get_model_status().merged_adapters == "irregular"


def test_tensors_of_a_layer_are_the_adapters_own():
    model = wrapped(use_dora=True)
    layer, x = model.base_model.model[0], torch.randn(5, 4)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert isinstance(A, nn.Parameter) and A.shape == (2, 4) and B.shape == (6, 2)
    assert {id(A), id(B), id(layer.lora_magnitude_vector["default"].weight)} <= {id(p) for p in model.parameters()}
    before = model(x)
    with torch.no_grad():
        B.mul_(2)
    assert not torch.allclose(model(x), before)
    assert layer.r == {"default": 2} and layer.lora_alpha == {"default": 6} and dict(layer.scaling) == {"default": 3.0}
    assert layer.adapter_layer_names == ("lora_A", "lora_B", "lora_magnitude_vector") and layer.active_adapters == ["default"]
    loha = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["0"]), small())[0]
    assert isinstance(loha.hada_w1_a["default"], nn.Parameter) and not hasattr(loha, "lora_A") and not hasattr(small()[0], "r")


def test_scales_multiply_the_change_and_come_back():
    model, x = wrapped(), torch.randn(5, 4)
    layer, whole, frozen = model.base_model.model[2], model(x), model.get_base_model()
    with model.disable_adapter():
        hidden = frozen[:2](x)
    with torch.no_grad():
        half = layer.scaling["default"] * 0.5 * layer.get_delta_weight("default") / 3.0
        layer.scale_layer(0.5)
        assert torch.allclose(layer(hidden), nn.functional.linear(hidden, layer.weight + half, layer.bias), atol=1e-6)
    assert layer.scaling["default"] == 1.5
    layer.unscale_layer(0.5)
    assert torch.equal(model(x), whole)
    layer.set_scale("default", 2.0)
    layer.scaling["default"] = 3.0
    assert torch.equal(model(x), whole)
    rotated = inject_adapter_in_model(veneer.OFTConfig(oft_block_size=2, r=0, target_modules=["0"]), small())[0]
    with pytest.raises(StateError, match="has no scale"):
        rotated.scale_layer(0.5)


def test_a_name_of_the_modules_own_is_never_taken():
    class Scaled(nn.Linear):
        scaling = 7.0

        def merge(self) -> str:
            return "own"

    layer = Scaled(4, 4)
    layer.r = 5
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(layer))
    assert (layer.scaling, layer.merge(), layer.r) == (7.0, "own", 5) and layer.lora_A["default"].weight.shape == (2, 4)


def test_switches_of_one_layer_turn_the_whole_models_record():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), small(), "a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "b")
    x, layer = torch.randn(3, 4), model[0]
    assert list(model.peft_config) == ["a", "b"] and layer.active_adapters == model[2].active_adapters == ["b"]
    for module in (model[0], model[2]):
        module.set_adapter("a")
    assert layer.lora_A["a"].weight.requires_grad and not layer.lora_A["b"].weight.requires_grad
    y = model(x)
    layer.enable_adapters(False)
    assert layer.disable_adapters and not torch.allclose(model(x), y)
    layer.enable_adapters(True)
    assert torch.equal(model(x), y)
    with pytest.raises(StateError, match="no adapter is called 'c'"):
        layer.set_adapter("c")
    for module in (model[0], model[2]):
        module.delete_adapter("b")
    assert list(model.peft_config) == ["a"] and torch.equal(model(x), y)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied[0].set_adapter([])
        assert model[0].active_adapters == ["a"] and copied[2].active_adapters == []


def test_merging_one_layer_adds_up_and_is_undone_bit_for_bit():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), small(), "a")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "b")
    layer, x, weight = model[0], torch.randn(3, 4), model[0].weight
    first = weight.detach().clone()
    layer.set_adapter(["a", "b"])
    y = layer(x)
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"], safe_merge=True)
    assert layer.merged and layer.merged_adapters == ["a", "b"] and torch.allclose(layer(x), y, atol=1e-6)
    plain = layer.get_base_layer()
    assert type(plain) is nn.Linear and torch.allclose(plain(x), y, atol=1e-6)
    layer.unmerge()
    assert layer.weight is weight and torch.equal(weight, first) and torch.equal(layer(x), y)
    assert torch.equal(layer.base_layer(x), nn.functional.linear(x, first, layer.bias))


def test_state_dicts_go_out_and_in_and_say_what_is_left():
    model = wrapped()
    tensors = veneer.get_peft_model_state_dict(model)
    other = wrapped()
    with torch.no_grad():
        other.base_model.model[0].lora_A["default"].weight.add_(1)
    assert next(iter(tensors)) == "base_model.model.0.lora_A.weight" and all(not t.requires_grad for t in tensors.values())
    result = veneer.set_peft_model_state_dict(other, tensors)
    x = torch.randn(2, 4)
    assert result == ([], [], []) and torch.equal(model(x), other(x))
    gathered = {k: t + 1 for k, t in model.state_dict().items()}
    moved = veneer.get_peft_model_state_dict(model, gathered)
    assert all(torch.equal(moved[k], t + 1) for k, t in tensors.items())
    injected = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]), small(), "x")
    with_name = {k.replace("base_model.model.", "").replace(".weight", ".x.weight"): t for k, t in tensors.items()}
    missing = with_name.pop("2.lora_B.x.weight")
    result = veneer.set_peft_model_state_dict(injected, with_name | {"9.lora_A.weight": missing}, "x")
    assert result.missing_keys == ["2.lora_B.x.weight"] and result.unexpected_keys == ["9.lora_A.weight"]
    assert torch.equal(injected[0].lora_A["x"].weight, tensors["base_model.model.0.lora_A.weight"])
    wrong = {"0.lora_A.weight": torch.zeros(3, 4), "0.lora_B.weight": torch.ones(6, 2)}
    before = injected[0].lora_B["x"].weight.clone()
    with pytest.raises(ValueError, match=r"has shape \(3, 4\), the model needs \(2, 4\)"):
        veneer.set_peft_model_state_dict(injected, wrong, "x")
    assert torch.equal(before, injected[0].lora_B["x"].weight)
    assert len(veneer.set_peft_model_state_dict(injected, wrong, "x", ignore_mismatched_sizes=True).mismatched_keys) == 1
    assert bool((injected[0].lora_B["x"].weight == 1).all())
    with pytest.raises(ConfigError, match="modules_to_save"):
        veneer.get_peft_model_state_dict(model, save_embedding_layers=True)


def test_base_state_dicts_have_the_base_models_names():
    model, base = wrapped(modules_to_save=None), small()
    own = veneer.get_base_model_state_dict(model)
    assert own.keys() == base.state_dict().keys()
    assert veneer.set_base_model_state_dict(model, base.state_dict()) == ([], [], [])
    assert all(torch.equal(t, base.state_dict()[k]) for k, t in veneer.get_base_model_state_dict(model).items())
    with pytest.raises(ValueError, match="1 missing tensors, such as 0.weight"):
        veneer.set_base_model_state_dict(model, {k: t for k, t in own.items() if k != "0.weight"})


def test_an_injected_adapter_can_follow_a_files_tensors():
    tensors = {"2.lora_A.weight": torch.randn(2, 6), "2.lora_B.weight": torch.randn(3, 2)}
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), small(), state_dict=tensors, low_cpu_mem_usage=True)
    assert not hasattr(model[0], "lora_A") and not model[2].lora_A["default"].weight.any()
    assert veneer.set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True) == ([], [], [])
    assert model[2].lora_A["default"].weight.data_ptr() == tensors["2.lora_A.weight"].data_ptr()
    with pytest.raises(ConfigError, match="use its add_adapter"):
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), wrapped())
    with pytest.raises(ConfigError, match="a PeftModel holds"):
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), wrapped().get_base_model(), "x")


def test_configurations_are_built_from_all_fields_of_the_format():
    fields = peft.LoraConfig(r=3, target_modules=["q"]).to_dict()
    config = LoraConfig(**fields)
    assert config.r == 3 and config.peft_type is not None and config.peft_type.value == "LORA" and veneer.get_peft_config(fields).r == 3
    with pytest.raises(ConfigError, match="layer_replication.*not part of Veneer"):
        LoraConfig(layer_replication=[[0, 2]])
    with pytest.raises(ConfigError, match="peft_type"):
        LoraConfig(peft_type="LOHA")
    with pytest.raises(TypeError, match="lora_alhpa"):
        LoraConfig(lora_alhpa=3)
    assert {t.value for t in PeftType} >= {t.value for t in peft.PeftType} and PeftType.LORA == peft.PeftType.LORA and "LORA" in PeftType
    with pytest.raises(ValueError, match='Did you mean "LORA"'):
        PeftType("LORRA")
    with pytest.raises(AttributeError, match='Did you mean "LORA"'):
        PeftType.LORRA  # noqa: B018


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    path = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(path / "causal")
    return path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # HF PEFT asks for the old name
def test_classes_follow_the_task_and_survive_copies(bases, tmp_path):
    def adapted(**options):
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(bases / "causal"), config)

    words = torch.arange(6)[None]
    model, plain = adapted(task_type="CAUSAL_LM").eval(), adapted().eval()
    assert (
        isinstance(model, veneer.PeftModelForCausalLM)
        and type(model).__name__ == "PeftModelForCausalLM"
        and type(plain).__name__ == "PeftModel"
    )
    assert {peft.PeftModelForCausalLM.__name__, *(c.__name__ for c in PeftModel.OF_TASK.values())} == {
        c.__name__ for c in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()
    }
    assert isinstance(get_peft_model(small(), LoraConfig(target_modules=["0"]), mixed=True), veneer.PeftMixedModel)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(again, veneer.PeftModelForCausalLM) and torch.equal(again(words).logits, model(words).logits)
    model.save_pretrained(tmp_path / "task")
    plain.save_pretrained(tmp_path / "plain")
    base = AutoModelForCausalLM.from_pretrained(bases / "causal")
    assert isinstance(PeftModel.from_pretrained(base, tmp_path / "task"), veneer.PeftModelForCausalLM)
    auto = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "task").eval()
    assert isinstance(auto, veneer.PeftModelForCausalLM) and torch.equal(auto(words).logits, model(words).logits)
    assert torch.equal(veneer.AutoPeftModel.from_pretrained(tmp_path / "plain").eval()(words).logits, plain(words).logits)
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "plain").eval()
    assert torch.allclose(theirs(words).logits, plain(words).logits, atol=1e-5)
    with pytest.raises(ConfigError, match="use AutoPeftModelForCausalLM"):
        veneer.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "task")
    file = tmp_path / "plain" / "adapter_config.json"
    file.write_text(file.read_text().replace("transformers.models.llama.modeling_llama", "antigravity"))
    with pytest.raises(ConfigError, match="'antigravity', which would be imported"):
        veneer.AutoPeftModel.from_pretrained(tmp_path / "plain")
    with pytest.raises(StateError, match="from_pretrained"):
        veneer.AutoPeftModelForCausalLM()


def test_a_longer_tokenizer_makes_the_embeddings_grow(bases, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    base = AutoModelForCausalLM.from_pretrained(bases / "causal")
    base.resize_token_embeddings(50)
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(bases / "causal"))
    )
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}))).save_pretrained(tmp_path)
    auto = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert auto.get_input_embeddings().weight.shape[0] == 50


def test_training_over_packed_weights_is_prepared(bases):
    base = AutoModelForCausalLM.from_pretrained(bases / "causal", dtype=torch.bfloat16)
    base.is_loaded_in_4bit = True
    model = veneer.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model is base and {p.dtype for p in base.parameters()} == {torch.float32} and not any(p.requires_grad for p in base.parameters())
    assert base.model.layers[0].gradient_checkpointing
    kept = AutoModelForCausalLM.from_pretrained(bases / "causal", dtype=torch.bfloat16)
    kept.quantization_method = "torchao"
    veneer.prepare_model_for_kbit_training(kept, use_gradient_checkpointing=False)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16} and not kept.model.layers[0].gradient_checkpointing


class Several(nn.Module):
    """Layers of several kinds, and weights that are read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.convolved, self.attn, self.head = (
            nn.Embedding(9, 8),
            nn.Conv2d(3, 8, 3),
            nn.MultiheadAttention(8, 2),
            nn.Linear(8, 3),
        )
        self.block = nn.ModuleDict({"qkv": nn.Linear(8, 24), "last": nn.Linear(8, 8)})
        self.experts = nn.Module()
        self.experts.up, self.experts.down = nn.Parameter(torch.randn(2, 6, 8)), nn.Parameter(torch.randn(2, 8, 6))


@pytest.mark.parametrize(
    "targets", [["words", "convolved", "attn", "block.last"], ["qkv.q", "qkv.v"]], ids=["whole layers", "parts of a layer"]
)
def test_modules_say_where_each_tensor_of_a_file_belongs(targets):
    parameters = (
        {"target_parameters": ["experts.up", "experts.down"]} if "words" in targets else {"fused_layouts": {"qkv": ["q", "k", "v"]}}
    )
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["head"], **parameters)
    model = inject_adapter_in_model(config, Several(), "x")
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Swapped):
            found |= {f"{path}.{k}": f"{path}.{n}" for k, n in module.adapter_state_dict_load_map("x").items()}
    own = dict(model.named_parameters())
    tensors = veneer.get_peft_model_state_dict(model, adapter_name="x")
    assert len(tensors) >= 6 and all(own[found[key]].data_ptr() == t.data_ptr() for key, t in tensors.items())
