"""`veneer info ADAPTER`: how large an adapter's change is, in how many directions, and how orthogonal its rotations are."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.cli import main
from veneer.integrations.measuring import measure

CONFIGS = {
    "lora": veneer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dora": veneer.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "loha": veneer.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False),
    "lokr": veneer.LoKrConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False),
    "oft": veneer.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["q_proj", "down_proj"], init_weights=False),
    "series": veneer.OFTConfig(oft_block_size=8, use_cayley_neumann=True, target_modules=["q_proj"], init_weights=False),
    "boft": veneer.BOFTConfig(boft_block_size=4, target_modules=["q_proj"], init_weights=False),
    "hra": veneer.HRAConfig(r=4, target_modules=["q_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "llama"
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    folder, changes = tmp_path_factory.mktemp("adapters"), {}
    for name, config in CONFIGS.items():
        torch.manual_seed(2)
        model = veneer.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(folder / name)
        layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
        changes[name] = layer.get_delta_weight("default").double(), layer.weight.detach().double()
    return folder, changes


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_are_those_of_dense_matrices(saved, name):
    folder, changes = saved
    M, W = changes[name]
    found = measure(folder / name)
    row = found.layers["model.layers.1.self_attn.q_proj"]
    s = torch.linalg.svdvals(M)
    p = s[s > 1e-9 * s[0]] / s.sum()
    assert row.norm == pytest.approx(float(M.norm()), rel=1e-3) and row.ratio == pytest.approx(float(M.norm() / W.norm()), rel=1e-3)
    assert row.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-2)
    rotates = name in ("oft", "series", "boft", "hra")
    assert (row.orthogonality_error is not None) == rotates
    if rotates:
        # Of W' = W R, R is found by solving for it, as W is square.
        R = torch.linalg.solve(W, W + M)
        error = float((R.mT @ R - torch.eye(len(R))).norm())
        if name == "boft":
            assert row.orthogonality_error < 1e-4
        else:
            assert row.orthogonality_error == pytest.approx(error, rel=0.05, abs=1e-2)
        assert (row.orthogonality_error > 0.1) == (name == "series")
    assert found.parameters == sum(r.parameters for r in found.layers.values())


def test_the_table_groups_layers_and_json_holds_all(saved, base, capsys):
    folder, _ = saved
    assert main(["info", str(folder / "oft")]) == 0
    out = capsys.readouterr().out
    assert "model.layers.{0..2}.self_attn.q_proj" in out and "‖RᵀR − I‖" in out and "OFT" in out and len(out.splitlines()) < 12
    assert main(["info", str(folder / "lora"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 6 and told["model"] == "LlamaForCausalLM" and told["method"] == "LoRA" and told["options"]["r"] == 4
    assert main(["info", str(folder / "lora")]) == 0
    assert "‖RᵀR" not in capsys.readouterr().out


def test_files_alone_say_what_needs_no_weights(saved, base, tmp_path, capsys):
    folder, changes = saved
    for name in CONFIGS:
        place = tmp_path / name
        veneer.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder / name).save_pretrained(place)
        config = json.loads((place / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
        (place / "adapter_config.json").write_text(json.dumps(config))
        found = measure(place)
        assert found.model is None and "gone" in str(found.why_not)
        row = found.layers["model.layers.1.self_attn.q_proj"]
        assert row.parameters > 0 and sum(r.parameters for r in found.layers.values()) == found.parameters
        if name in ("lora", "loha", "lokr"):
            assert row.norm == pytest.approx(float(changes[name][0].norm()), rel=1e-3) and row.ratio is None
    assert main(["info", str(tmp_path / "lora")]) == 0
    assert "not at hand" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "lora"), "--model", str(base)]) == 0
    assert "‖ΔW‖/‖W‖" in capsys.readouterr().out


def test_one_file_of_lycoris(saved, base, tmp_path, capsys):
    folder, changes = saved
    file = tmp_path / "f.safetensors"
    veneer.rewrite(folder / "loha", file, to="lycoris")
    assert main(["info", str(file)]) == 0
    assert "LoHa" in capsys.readouterr().out
    assert main(["info", str(file), "--model", str(base), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers"]["model.layers.1.self_attn.q_proj"]["norm"] == pytest.approx(float(changes["loha"][0].norm()), rel=1e-3)
    assert main(["info", str(tmp_path / "nothing.safetensors"), "--model", str(base)]) != 0
    assert "nothing.safetensors" in capsys.readouterr().err
