"""`veneer convert` and `veneer merge`: adapters in other formats, and models with an adapter in their weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import veneer
from veneer.cli import main

X = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved classifier of two classes, with its image processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "vit"
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def load(folder, **options):
    return ViTForImageClassification.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """Saved adapters, and what their models answer."""
    torch.manual_seed(1)
    made = {}
    for name, config in {
        "loha": veneer.LoHaConfig(r=2, target_modules=["q_proj", "fc2"], init_weights=False),
        "oft": veneer.OFTConfig(oft_block_size=4, target_modules=["q_proj", "fc2"], init_weights=False),
        "lora": veneer.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["classifier"]),
    }.items():
        model = veneer.get_peft_model(load(base), config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
            folder = tmp_path_factory.mktemp("adapters") / name
            model.save_pretrained(folder)
            made[name] = folder, model(X).logits
    return made


def answers(model):
    with torch.no_grad():
        return model.eval()(X).logits


def test_convert_writes_lora_and_says_what_was_lost(base, saved, tmp_path, capsys):
    adapter, y = saved["loha"]
    assert main(["convert", str(adapter), str(tmp_path / "exact")]) == 0
    assert "exact" in capsys.readouterr().out
    torch.testing.assert_close(answers(veneer.PeftModel.from_pretrained(load(base), tmp_path / "exact")), y, rtol=1e-4, atol=1e-5)
    adapter, y = saved["oft"]
    assert main(["convert", str(adapter), str(tmp_path / "oft")]) == 1
    assert "give a rank or a tolerance" in capsys.readouterr().err and not (tmp_path / "oft").exists()
    assert main(["convert", str(adapter), str(tmp_path / "oft"), "--rank", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["how"] == "as LoRA" and told["conversion"]["rank"] == 3 and 0 < told["conversion"]["error"] < 1
    assert main(["convert", str(adapter), str(tmp_path / "near"), "--tolerance", "1e-6"]) == 0
    torch.testing.assert_close(answers(veneer.PeftModel.from_pretrained(load(base), tmp_path / "near")), y, rtol=1e-3, atol=1e-4)


def test_convert_to_one_file_and_back(base, saved, tmp_path, capsys):
    adapter = saved["loha"][0]
    file = tmp_path / "file.safetensors"
    assert main(["convert", str(adapter), str(file), "--to", "lycoris"]) == 0
    assert "as it is" in capsys.readouterr().out and any(k.startswith("lycoris_vit_layers_0_") for k in load_file(file))
    assert main(["convert", str(file), str(tmp_path / "back")]) == 2
    assert "give the model" in capsys.readouterr().err
    assert main(["convert", str(file), str(tmp_path / "back"), "--model", str(base)]) == 0
    before, after = (load_file(d / "adapter_model.safetensors") for d in (adapter, tmp_path / "back"))
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    assert (
        main(["convert", str(saved["oft"][0]), str(tmp_path / "k.safetensors"), "--to", "kohya", "--rank", "2", "--prefix", "lora_te"]) == 0
    )
    assert {k.rpartition(".lora_")[0][:8] for k in load_file(tmp_path / "k.safetensors") if "lora_up" in k} == {"lora_te_"}
    assert main(["convert", str(adapter), str(tmp_path / "x.safetensors"), "--to", "lycoris", "--rank", "0"]) == 2
    assert "rank" in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()
    assert main(["convert", str(saved["lora"][0]), str(tmp_path / "x.safetensors"), "--to", "lycoris"]) == 1
    assert "also saves" in capsys.readouterr().err


def test_a_model_that_is_given_stays_as_it_is(base, saved, tmp_path):
    model = load(base)
    before = [type(m) for m in model.modules()]
    done = veneer.rewrite(saved["oft"][0], tmp_path / "out", model, rank=2)
    assert done.conversion is not None and done.conversion.rank == 2
    with pytest.raises(veneer.ConfigError, match='Did you mean "lycoris"'):
        veneer.rewrite(saved["oft"][0], tmp_path / "out", model, to="lycorsi")
    for options, match in [
        ({"to": "lycoris", "uniform": True}, "uniform is of plain LoRA"),
        ({"prefix": "lora_unet"}, "none is read or written"),
        ({"to": "peft", "rank": 2}, "make it LoRA"),
    ]:
        with pytest.raises(veneer.ConfigError, match=match):
            veneer.rewrite(saved["oft"][0], tmp_path / "refused", model, **options)
    with pytest.raises(veneer.ConfigError, match="leave it out"):
        veneer.save_merged(saved["oft"][0], tmp_path / "refused", prefix="lora_unet")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(veneer.ConfigError, match="is the adapter itself"):
        veneer.rewrite(saved["oft"][0], saved["oft"][0], model, rank=2)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("name", ["loha", "oft", "lora"])
def test_merge_writes_a_plain_model(base, saved, tmp_path, capsys, name):
    adapter, y = saved[name]
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "ViTForImageClassification" and told["dtype"] == "float32" and "preprocessor_config.json" in told["files"]
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert type(merged) is ViTForImageClassification
    torch.testing.assert_close(answers(merged), y, rtol=1e-4, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 16
    assert not any("adapter" in f or "veneer" in f for f in told["files"])


def test_merge_takes_a_type_and_refuses_what_is_taken(base, saved, tmp_path, capsys):
    adapter, y = saved["loha"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert main(["merge", str(adapter), "--out", str(tmp_path / "taken")]) == 1
    assert "not empty" in capsys.readouterr().err and (tmp_path / "taken" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (
        main(["merge", str(adapter), "--model", str(base), "--out", str(tmp_path / "empty"), "--dtype", "bfloat16", "--device", "cpu"]) == 0
    )
    assert "in bfloat16, 4 layers changed" in capsys.readouterr().out
    half = load(tmp_path / "empty", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert float((answers(half.float()) - y).norm() / y.norm()) < 0.05
    assert main(["merge", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    file = tmp_path / "file.safetensors"
    veneer.rewrite(adapter, file, to="lycoris")
    assert main(["merge", str(file), "--model", str(base), "--out", str(tmp_path / "from_file")]) == 0
    torch.testing.assert_close(answers(load(tmp_path / "from_file")), y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_an_image_generator_is_merged_into_it(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    q, conv = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "down_blocks.0.resnets.0.conv1"
    shapes = {q: (8, 8), conv: (8, 8, 3, 3)}
    tensors, wanted = {}, {}
    for path, (out, in_, *k) in shapes.items():
        B, A = torch.randn(out, 2, *(1 for _ in k)), torch.randn(2, in_, *k)
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {f"{name}.lora_up.weight": B, f"{name}.lora_down.weight": A, f"{name}.alpha": torch.tensor(1.0)}
        wanted[path] = unet.get_submodule(path).weight.detach() + 0.5 * torch.einsum("or,ri...->oi...", B.flatten(1), A)
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.randn(4, 2)
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.randn(2, 4)
    save_file(tensors, tmp_path / "file.safetensors")
    arguments = ["merge", str(tmp_path / "file.safetensors"), "--model", str(tmp_path / "unet"), "--out", str(tmp_path / "merged")]
    assert main(arguments) == 1
    assert "--prefix" in capsys.readouterr().err
    assert main([*arguments, "--prefix", "lora_unet"]) == 0
    merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    for path, W in wanted.items():
        torch.testing.assert_close(merged.get_submodule(path).weight, W, rtol=1e-5, atol=1e-6)
    assert main(["info", str(tmp_path / "file.safetensors"), "--model", str(tmp_path / "unet"), "--prefix", "lora_unet"]) == 0
    assert "UNet2DConditionModel" in capsys.readouterr().out
