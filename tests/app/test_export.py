"""`veneer export`: adapters written for other programs."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import veneer
from veneer.cli import main


@pytest.fixture
def saved(tmp_path):
    """A small language model on disk."""
    config = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=16, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def base(saved):
    return GPT2LMHeadModel.from_pretrained(saved).eval()


IDS = torch.arange(1, 9)[None]


def make(saved, to, config):
    model = veneer.get_peft_model(base(saved), config).eval()
    model.save_pretrained(to)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out is set to False:UserWarning")
def test_parts_become_a_lora_that_hf_peft_loads_with_equal_outputs(saved, tmp_path, capsys):
    config = veneer.LoraConfig(r=2, target_modules=["c_attn.q", "c_attn.v", "c_fc"], init_lora_weights=False)
    y = make(saved, tmp_path / "adapter", config)
    with pytest.raises(KeyError, match="PARTS"):
        peft.PeftModel.from_pretrained(base(saved), tmp_path / "adapter")
    assert main(["doctor", str(tmp_path / "adapter")]) == 0
    assert "parts of fused layers" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "adapter"), "--format", "peft", "--output", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["how"] == "as LoRA"
    theirs = peft.PeftModel.from_pretrained(base(saved), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, y, rtol=1e-5, atol=1e-5)


def test_whole_layers_stay_what_they_are(saved, tmp_path):
    y = make(saved, tmp_path / "adapter", veneer.LoHaConfig(r=2, target_modules=["c_fc"], init_weights=False))
    assert veneer.export(tmp_path / "adapter", tmp_path / "out", base(saved)) == "as it is"
    with torch.no_grad():
        assert torch.equal(veneer.PeftModel.from_pretrained(base(saved), tmp_path / "out").eval()(IDS).logits, y)
    model = base(saved)
    before = [type(m) for m in model.modules()]
    veneer.export(tmp_path / "adapter", tmp_path / "out", model)
    assert [type(m) for m in model.modules()] == before


def test_what_has_no_words_elsewhere_is_refused(saved, tmp_path, capsys):
    make(saved, tmp_path / "adapter", veneer.LoraConfig(r=2, use_dora=True, target_modules=["c_attn.q"], init_lora_weights=False))
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 1
    assert "no change of low rank there" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "adapter")]) == 2
    assert "is the adapter itself" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), "--output", str(tmp_path / "out")]) == 1
