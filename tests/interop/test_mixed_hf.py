"""A mixed batch of LoRA adapters equals HF PEFT's own, from the same files."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LoraConfig, PeftModel, get_peft_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

NAMES = ["b", "__base__", "a", "c", "b"]


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, pad_token_id=0, eos_token_id=39
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def both(tmp_path):
    options = {"a": {"r": 2}, "b": {"r": 4, "use_rslora": True}, "c": {"r": 2, "lora_alpha": 3}}
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **options["a"]), "a")
    for name in "bc":
        model.add_adapter(name, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **options[name]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".veneer." in n:
                p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(llama(), tmp_path / "a", "a")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a", "a")
    for name in "bc":
        ours.load_adapter(tmp_path / name, name)
        theirs.load_adapter(tmp_path / name, name)
    return ours.eval(), theirs.eval()


def test_outputs_and_generated_texts_are_equal(both):
    ids = torch.randint(2, 38, (len(NAMES), 6))
    with torch.no_grad():
        found, expected = (m(input_ids=ids, adapter_names=NAMES).logits for m in both)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(*(m.generate(input_ids=ids, adapter_names=NAMES, **options) for m in both))
