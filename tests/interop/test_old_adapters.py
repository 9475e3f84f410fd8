"""Adapters under other names than today's load exactly, or fail with the reason; made by HF PEFT and then renamed."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from veneer import AdaLoraConfig, AdapterFileError, LoraConfig, PeftModel, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:Could not find a config:UserWarning")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
PREFIX = "base_model.model."

VIT = [
    (r"vit\.layers\.", "vit.encoder.layer."),
    (r"attention\.(q|k|v)_proj", r"attention.attention.\1"),
    (r"attention\.q\b", "attention.query"),
    (r"attention\.k\b", "attention.key"),
    (r"attention\.v\b", "attention.value"),
    (r"o_proj", "output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
]
DINO = [r for r in VIT if "fc" not in r[0] and "layers" not in r[0]]
SWIN = [
    (r"attention\.(q|k|v)_proj", r"attention.self.\1"),
    *[(a.replace("attention", "self"), b.replace("attention", "self")) for a, b in VIT[2:5]],
    *VIT[5:],
]
SEGFORMER = [(r"stages\.(\d+)\.blocks\.", r"encoder.block.\1."), *SWIN[:5], (r"mlp\.fc(\d)", r"mlp.dense\1")]


def vit(**more) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL | more))


def swin() -> nn.Module:
    return hf.SwinForImageClassification(
        hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )


def segformer() -> nn.Module:
    return hf.SegformerForImageClassification(
        hf.SegformerConfig(
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            patch_sizes=[3] * 4,
            strides=[2, 2, 1, 1],
            sr_ratios=[1] * 4,
        )
    )


MODELS = {
    "vit": (vit, VIT),
    "deit": (lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**SMALL)), [(r"deit\.layers\.", "deit.encoder.layer."), *VIT[1:]]),
    "beit": (lambda: hf.BeitForImageClassification(hf.BeitConfig(**SMALL)), [(r"beit\.layers\.", "beit.encoder.layer."), *VIT[1:]]),
    "dinov2": (lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SMALL)), DINO),
    "swin": (swin, SWIN),
    "segformer": (segformer, SEGFORMER),
}
NOW = ["q_proj", "v_proj", "o_proj", "fc2"]
THEN = ["query", "value", "output.dense", "mlp.fc2", "dense2"]

METHODS = {
    "lora": peft.LoraConfig(r=3, target_modules=NOW, modules_to_save=["classifier"]),
    "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=NOW),
    "bias": peft.LoraConfig(r=3, bias="lora_only", target_modules=NOW),
    "loha": peft.LoHaConfig(r=3, target_modules=NOW, modules_to_save=["classifier"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=NOW),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=NOW),
}


def base(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make().eval()


def written(make: Callable[[], nn.Module], config: peft.PeftConfig, directory: Path) -> peft.PeftModel:
    """An adapter of HF PEFT with random numbers, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(make), config)
        torch.manual_seed(4)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(directory)
    return model


def respell(source: Path, target: Path, key: Callable[[str], str], **config) -> Path:
    target.mkdir(exist_ok=True)
    save_file({key(k): t for k, t in load_file(source / "adapter_model.safetensors").items()}, target / "adapter_model.safetensors")
    values = json.loads((source / "adapter_config.json").read_text()) | config
    (target / "adapter_config.json").write_text(json.dumps(values))
    return target


def older(rules: list[tuple[str, str]]) -> Callable[[str], str]:
    def key(k: str) -> str:
        for pattern, new in rules:
            k = re.sub(pattern, new, k)
        return k

    return key


def outputs(make: Callable[[], nn.Module], directory: Path) -> torch.Tensor:
    torch.manual_seed(5)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        return PeftModel.from_pretrained(base(make), directory).eval()(pixel_values=x).logits


@pytest.mark.parametrize("name", MODELS)
def test_adapters_under_older_names_load_exactly(name, tmp_path):
    make, rules = MODELS[name]
    written(make, METHODS["lora"], tmp_path / "now")
    then = respell(tmp_path / "now", tmp_path / "then", older(rules), target_modules=THEN)
    keys = set(load_file(then / "adapter_model.safetensors"))
    assert any(".query." in k for k in keys) and not any("_proj" in k for k in keys)
    plain = base(make)
    torch.manual_seed(5)
    with torch.no_grad():
        without = plain(pixel_values=torch.randn(2, 3, 16, 16)).logits
    now = outputs(make, tmp_path / "now")
    assert torch.equal(outputs(make, then), now) and not torch.allclose(now, without, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_loads_under_older_names(name, tmp_path):
    model = written(vit, METHODS[name], tmp_path / "now")
    then = respell(tmp_path / "now", tmp_path / "then", older(VIT), target_modules=["query", "value", "output.dense"])
    assert torch.equal(outputs(vit, then), outputs(vit, tmp_path / "now"))
    torch.manual_seed(5)
    with torch.no_grad():
        theirs = model.eval()(pixel_values=torch.randn(2, 3, 16, 16)).logits
    torch.testing.assert_close(outputs(vit, then), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("now", "then"),
    [
        (["o_proj"], ["attention.output.dense"]),
        (["fc2"], r".*\.layer\.\d+\.output\.dense"),
        (["o_proj", "fc2"], ["output.dense"]),
        (["o_proj", "fc1", "fc2"], ["dense"]),
    ],
)
def test_ambiguous_old_names_are_resolved_by_path(now, then, tmp_path):
    """`dense` is the name of the pooler's layer today, and was that of three others in every block."""

    def make() -> nn.Module:
        torch.manual_seed(3)
        return nn.ModuleDict({"vit": hf.ViTModel(hf.ViTConfig(**SMALL), add_pooling_layer=then == ["dense"])})

    targets = [*now, "pooler.dense"] if then == ["dense"] else now
    written(make, peft.LoraConfig(r=2, target_modules=targets), tmp_path / "now")
    file = respell(tmp_path / "now", tmp_path / "then", older(VIT), target_modules=then)
    one, two = (PeftModel.from_pretrained(make(), d) for d in (tmp_path / "now", file))
    assert len(one.state_dict()) > 30 and one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(t, two.state_dict()[k]) for k, t in one.state_dict().items())


def test_patterns_layer_numbers_and_exclusions_keep_their_meaning(tmp_path):
    options = {
        "rank_pattern": {r"layers\.1\.attention\.q_proj": 2, "fc2": 5},
        "alpha_pattern": {"fc2": 3},
        "exclude_modules": ["vit.layers.0.attention.v_proj"],
    }
    written(vit, peft.LoraConfig(r=3, target_modules=NOW, **options), tmp_path / "now")
    renamed = {
        "rank_pattern": {r"layer\.1\.attention\.attention\.query": 2, r"layer\.\d+\.output\.dense": 5},
        "alpha_pattern": {r"layer\.\d\.output\.dense": 3},
        "exclude_modules": ["vit.encoder.layer.0.attention.attention.value"],
    }
    then = respell(tmp_path / "now", tmp_path / "then", older(VIT), target_modules=["query", "value", "output.dense"], **renamed)
    assert torch.equal(outputs(vit, then), outputs(vit, tmp_path / "now"))
    written(vit, peft.LoraConfig(r=3, target_modules=["v_proj"], layers_to_transform=[1], layers_pattern="layers"), tmp_path / "one")
    then = respell(tmp_path / "one", tmp_path / "one-then", older(VIT), target_modules=["value"], layers_pattern="layer")
    assert torch.equal(outputs(vit, then), outputs(vit, tmp_path / "one"))


def test_pruned_ranks_keep_their_layers(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "fc2"])
    model = written(vit, config, tmp_path / "full")
    names = [n.removeprefix(PREFIX).removesuffix(".default") for n, _ in model.named_parameters() if ".lora_E" in n]
    pattern = {n: [i % 3 != j % 3 for i in range(4)] for j, n in enumerate(names)}
    tensors = load_file(tmp_path / "full" / "adapter_model.safetensors")
    kept = {k: pattern[k.removeprefix(PREFIX).rpartition(".")[0] + ".lora_E"] for k in tensors}
    (tmp_path / "now").mkdir()
    save_file(
        {k: t[:, kept[k]].contiguous() if k.endswith("lora_B") else t[kept[k]] for k, t in tensors.items()},
        tmp_path / "now" / "adapter_model.safetensors",
    )
    values = json.loads((tmp_path / "full" / "adapter_config.json").read_text()) | {"rank_pattern": pattern}
    (tmp_path / "now" / "adapter_config.json").write_text(json.dumps(values))
    key = older(VIT)
    then = respell(
        tmp_path / "now",
        tmp_path / "then",
        key,
        target_modules=["query", "output.dense"],
        rank_pattern={key(k): v for k, v in pattern.items()},
    )
    (then / "adapter_config.json").write_text(
        (then / "adapter_config.json").read_text().replace('"output.dense"', '"layer.0.output.dense", "layer.1.output.dense"')
    )
    assert torch.equal(outputs(vit, then), outputs(vit, tmp_path / "now"))


SPELLINGS = {
    "no-prefix": lambda k: k.removeprefix(PREFIX),
    "adapter-name": lambda k: re.sub(r"(lora_[AB])\.weight", r"\1.my_name.weight", k),
    "adapter-name-of-vectors": lambda k: re.sub(r"(lora_[AB])\.weight", r"\1.other.weight", k).replace("magnitude_vector", "magnitude_vector.other.weight"),
    "bias-before-base-layer": lambda k: k.replace(".base_layer.bias", ".bias"),
    "no-prefix-then": lambda k: older(VIT)(k).removeprefix(PREFIX),
    "adapter-name-then": lambda k: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", older(VIT)(k)),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_keys_load_exactly(spelling, tmp_path):
    config = METHODS["dora" if "vectors" in spelling else "bias" if "bias" in spelling else "lora"]
    written(vit, config, tmp_path / "now")
    other = respell(tmp_path / "now", tmp_path / "other", SPELLINGS[spelling])
    assert load_file(other / "adapter_model.safetensors").keys() != load_file(tmp_path / "now" / "adapter_model.safetensors").keys()
    assert torch.equal(outputs(vit, other), outputs(vit, tmp_path / "now"))


@pytest.mark.parametrize("name", ["lora", "dora", "bias", "loha", "boft"])
def test_a_state_dict_of_the_wrapped_model_loads(name, tmp_path):
    """Names inside, whole modules beside their frozen originals, and all of the base's own weights."""
    model = written(vit, METHODS[name], tmp_path / "now")
    (tmp_path / "dump").mkdir()
    everything = {k: t.clone() for k, t in model.state_dict().items() if "boft_P" not in k}
    save_file(everything, tmp_path / "dump" / "adapter_model.safetensors")
    (tmp_path / "dump" / "adapter_config.json").write_bytes((tmp_path / "now" / "adapter_config.json").read_bytes())
    assert torch.equal(outputs(vit, tmp_path / "dump"), outputs(vit, tmp_path / "now"))
    everything[next(k for k in everything if k.endswith("fc1.weight"))].add_(1)
    save_file(everything, tmp_path / "dump" / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"unexpected, such as .*fc1.weight"):
        outputs(vit, tmp_path / "dump")


def test_a_configuration_of_the_first_releases(tmp_path):
    written(vit, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]), tmp_path / "now")
    first = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "lora_dropout": 0.05, "target_modules": ["query"], "bias": "none", "task_type": "SEQ_CLS",
             "fan_in_fan_out": False, "merge_weights": False, "enable_lora": None, "modules_to_save": ["classifier", "score"], "inference_mode": True,
             "base_model_name_or_path": "google/vit-base-patch16-224"}  # fmt: skip
    then = respell(tmp_path / "now", tmp_path / "then", older(VIT))
    head = {
        PREFIX + "classifier.weight": base(vit).classifier.weight.detach(),
        PREFIX + "classifier.bias": base(vit).classifier.bias.detach(),
    }
    save_file(load_file(then / "adapter_model.safetensors") | head, then / "adapter_model.safetensors")
    (then / "adapter_config.json").write_text(json.dumps(first))
    assert torch.equal(outputs(vit, then), outputs(vit, tmp_path / "now"))
    (then / "adapter_config.json").write_text(json.dumps(first | {"enable_lora": [True, False, True]}))
    with pytest.raises(ValueError, match="enable_lora=.* is not supported for LORA"):
        outputs(vit, then)


def test_what_does_not_fit_is_named_and_the_model_is_as_it_was(tmp_path):
    written(vit, METHODS["lora"], tmp_path / "now")
    key = older(VIT)
    mixed = respell(tmp_path / "now", tmp_path / "mixed", lambda k: key(k) if ".layers.0." in k else k)
    assert torch.equal(outputs(vit, mixed), outputs(vit, tmp_path / "now"))
    model = base(vit)
    before = dict(model.state_dict())
    other = respell(tmp_path / "now", tmp_path / "other", lambda k: key(k).replace("layer.1.", "layer.7."))
    with pytest.raises(AdapterFileError, match=r"missing, such as .*layers.1.*unexpected, such as .*layer.7"):
        PeftModel.from_pretrained(model, other)
    two = load_file(tmp_path / "now" / "adapter_model.safetensors")
    one = {k.replace("lora_A", "lora_A.one").replace("lora_B", "lora_B.one"): t for k, t in two.items()}
    both = {k.replace("lora_A", "lora_A.two").replace("lora_B", "lora_B.two"): t.clone() for k, t in two.items()}
    save_file(one | both, other / "adapter_model.safetensors")
    with pytest.raises(AdapterFileError, match=r"tensors 16 unexpected, such as .*lora_A.(one|two).weight"):
        PeftModel.from_pretrained(model, other)
    assert model.state_dict().keys() == before.keys() and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_an_adapter_of_older_names_is_saved_under_todays(tmp_path):
    written(vit, METHODS["lora"], tmp_path / "now")
    then = respell(tmp_path / "now", tmp_path / "then", older(VIT), target_modules=["query", "value", "output.dense"])
    model = PeftModel.from_pretrained(base(vit), then)
    model.save_pretrained(tmp_path / "again")
    assert LoraConfig.from_pretrained(tmp_path / "again").target_modules == ["fc2", "o_proj", "q_proj", "v_proj"]
    assert (
        load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "now" / "adapter_model.safetensors").keys()
    )


def test_an_adapter_of_older_names_loads_beside_and_over_others(tmp_path):
    written(vit, METHODS["lora"], tmp_path / "now")
    then = respell(tmp_path / "now", tmp_path / "then", older(VIT), target_modules=["query", "value", "output.dense"])
    model = get_peft_model(base(vit), LoraConfig(r=2, target_modules=["fc1"]))
    model.load_adapter(then, "second")
    model.load_adapter(tmp_path / "now", "third")
    model.load_adapter(then, "third")
    state = model.state_dict()
    assert sum(".second." in k for k in state) > 8
    assert all(torch.equal(t, state[k.replace(".second.", ".third.")]) for k, t in state.items() if ".second." in k)


def test_what_a_schedule_has_learnt_is_found_again(tmp_path):
    model = get_peft_model(base(vit), AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "fc2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "now")
    then = respell(
        tmp_path / "now", tmp_path / "then", older(VIT), target_modules=["query", "layer.0.output.dense", "layer.1.output.dense"]
    )
    states = load_file(tmp_path / "now" / "schedule.safetensors")
    save_file({older(VIT)(k): t for k, t in states.items()}, then / "schedule.safetensors")
    one, two = (PeftModel.from_pretrained(base(vit), d, is_trainable=True).state_dict() for d in (tmp_path / "now", then))
    assert states and one.keys() == two.keys() and all(torch.equal(t, two[k]) for k, t in one.items())
