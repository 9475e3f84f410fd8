"""`veneer combine`: adapters added, scaled and taken away, from their folders to one."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import veneer
from veneer.cli import main
from veneer.cli.combine import weighted

IDS = torch.arange(1, 9)[None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out is set to False:UserWarning"
)


@pytest.fixture
def saved(tmp_path):
    """A small language model on disk."""
    torch.manual_seed(1)
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def base(saved):
    return GPT2LMHeadModel.from_pretrained(saved).eval()


def make(saved, to, config):
    model = veneer.get_peft_model(base(saved), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(to)
    return str(to)


def lora(**options):
    return veneer.LoraConfig(**{"r": 2, "target_modules": ["c_fc", "c_proj"]} | options)


def weights(saved, directory):
    """The model's weights with an adapter in them."""
    model = veneer.PeftModel.from_pretrained(base(saved), directory).merge_and_unload()
    return {n: p.detach().double() for n, p in model.named_parameters()}


def expect_sum(saved, out, terms, tolerance=1e-5):
    plain = {n: p.detach().double() for n, p in base(saved).named_parameters()}
    own = {a: weights(saved, a) for a in terms}
    found = weights(saved, out)
    for name, W in plain.items():
        wanted = W + sum(w * (own[a][name] - W) for a, w in terms.items())
        torch.testing.assert_close(found[name], wanted, rtol=tolerance, atol=tolerance)


def test_adapters_are_added_and_taken_away(saved, tmp_path, capsys):
    a, b = make(saved, tmp_path / "a", lora(lora_alpha=3)), make(saved, tmp_path / "b", lora(r=4, use_rslora=True, target_modules=["c_fc"]))
    c = make(saved, tmp_path / "c", veneer.LoHaConfig(r=2, target_modules=["c_attn"]))
    out = tmp_path / "deep" / "out"
    assert main(["combine", str(out), f"{a}:1.0", f"{b}:0.5", f"{c}:-1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [t["weight"] for t in said["adapters"]] == [1.0, 0.5, -1.0] and said["method"] == "LoRA" and said["base"] == str(saved)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    expect_sum(saved, out, {a: 1.0, b: 0.5, c: -1.0})
    theirs = peft.PeftModel.from_pretrained(base(saved), out).eval()
    ours = veneer.PeftModel.from_pretrained(base(saved), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-5, atol=1e-5)
    assert main(["combine", str(tmp_path / "svd"), a, f"{b}:-2", "--type", "svd", "--rank", "6"]) == 0
    text = capsys.readouterr().out
    assert "LoRA of rank 6" in text and f"1 · {a} - 2 · {b} (svd), for {saved}" in text
    expect_sum(saved, tmp_path / "svd", {a: 1.0, b: -2.0})


def test_full_rank_changes_and_pruning(saved, tmp_path, capsys):
    a, b = (
        make(saved, tmp_path / "a", lora(use_dora=True)),
        make(saved, tmp_path / "b", veneer.OFTConfig(oft_block_size=4, target_modules=["c_fc"])),
    )
    assert main(["combine", str(tmp_path / "out"), a, b]) == 1
    assert "has no low rank" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["combine", str(tmp_path / "out"), a, b, "--type", "svd", "--rank", "16"]) == 0
    expect_sum(saved, tmp_path / "out", {a: 1.0, b: 1.0})
    for seed, name in [("1", "one"), ("1", "same"), ("2", "other")]:
        arguments = ["--type", "dare_ties_svd", "--density", "0.5", "--majority", "frequency", "--rank", "4", "--seed", seed]
        assert main(["combine", str(tmp_path / name), a, b, *arguments]) == 0
    one, same, other = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "same", "other"))
    assert one == same != other


def test_one_alone_is_copied(saved, tmp_path, capsys):
    a = make(saved, tmp_path / "a", veneer.BOFTConfig(boft_block_size=4, target_modules=["c_fc"]))
    assert main(["combine", str(tmp_path / "out"), a]) == 0
    assert "BOFT of 2 weights" in capsys.readouterr().out
    x, y = (torch.cat([w.flatten() for w in weights(saved, d).values()]) for d in (a, tmp_path / "out"))
    assert torch.equal(x, y)


def test_a_head_comes_along(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8)
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    made = []
    for name, head in [("plain", None), ("head", ["classifier"])]:
        model = ViTForImageClassification.from_pretrained(tmp_path / "model")
        adapted = veneer.get_peft_model(model, veneer.LoraConfig(target_modules=["q_proj"], modules_to_save=head, init_lora_weights=False))
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.1)
        adapted.save_pretrained(tmp_path / name)
        made.append(adapted)
    veneer.combine({tmp_path / "plain": 1, tmp_path / "head": -1}, tmp_path / "out")
    back = veneer.PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(tmp_path / "model"), tmp_path / "out").eval()
    copy = back.base_model.model.classifier.veneer["default"]
    assert torch.equal(copy.weight, made[1].base_model.model.classifier.veneer["default"].weight)


def test_a_model_that_is_given_is_left_as_it_was(saved, tmp_path):
    a, b = make(saved, tmp_path / "a", lora()), make(saved, tmp_path / "b", lora())
    model = base(saved)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    done = veneer.combine([(a, 1.0), (b, 1.0)], tmp_path / "out", model)
    assert done.layers == 6 and done.rank == 4
    assert (
        all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    )


def test_what_is_refused_writes_nothing(saved, tmp_path, capsys):
    a, b = make(saved, tmp_path / "a", lora()), make(saved, tmp_path / "b", lora(bias="all"))
    other = tmp_path / "other"
    base(saved).save_pretrained(other)
    c = make(other, tmp_path / "c", lora())
    out = str(tmp_path / "out")
    for arguments, code, text in [
        ([out, a, c], 2, "the adapters are for different base models"),
        ([out, a, b], 2, "trains the base's own biases"),
        ([a, a, c], 2, "is one of the adapters"),
        ([out, f"{a}:much"], 2, "'much' is no weight"),
        ([out, f"{a}:0"], 2, "all are 0"),
        ([out, a, "--type", "ties"], 2, "give density"),
        ([out, a, "--rank", "2", "--type", "cat"], 2, "cat takes no svd_rank"),
        ([out, str(tmp_path / "nothing")], 1, "nothing"),
        ([out, a, "--densty", "1"], 2, 'Did you mean "--density"'),
    ]:
        assert main(["combine", *arguments]) == code, arguments
        assert text in capsys.readouterr().err, arguments
    assert not (tmp_path / "out").exists()
    assert main(["combine", out, f"{a}:0.5", f"{c}:0.5", "--model", str(saved), "--json"]) == 0
    expect_sum(saved, out, {a: 0.5, c: 0.5})


def test_weights_are_read_off_the_end(tmp_path):
    assert weighted("owner/name:-1e-1") == ("owner/name", -0.1)
    (tmp_path / "a:1").mkdir()
    assert weighted(str(tmp_path / "a:1")) == (str(tmp_path / "a:1"), 1.0)
