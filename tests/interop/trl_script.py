"""Run by test_trl with HF PEFT and with Veneer: three steps of supervised fine-tuning of a tiny Llama, from the same first values."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

out, name = Path(sys.argv[1]), sys.argv[2]
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(40))]
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(WORDS),
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip

words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
base, first = out / "base", out / "first.pt"
if not base.exists():
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(base)

arguments = SFTConfig(
    output_dir=str(out / name), max_steps=3, per_device_train_batch_size=4, learning_rate=0.5, logging_steps=1, save_steps=3, seed=3, max_length=16,
    report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
)  # fmt: skip
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base),
    args=arguments,
    train_dataset=Dataset.from_list([{"text": " ".join(f"w{(i * j) % 40}" for j in range(8))} for i in range(24)]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
)
if first.exists():
    result = set_peft_model_state_dict(trainer.model, torch.load(first))
    assert not result.unexpected_keys, result.unexpected_keys
else:
    torch.save(get_peft_model_state_dict(trainer.model), first)
trainer.train()

checkpoint, words = out / name / "checkpoint-3", torch.arange(3, 13)[None]
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint).eval()
through_transformers = AutoModelForCausalLM.from_pretrained(checkpoint)
with torch.no_grad():
    outputs = [m(input_ids=words).logits for m in (trainer.model.eval(), again, through_transformers)]
found = {
    "class": type(again).__name__,
    "is a PeftModel": isinstance(trainer.model, PeftModel),
    "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
    "files": sorted(p.name for p in checkpoint.iterdir()),
    "reloaded differs by": max((o - outputs[0]).abs().max().item() for o in outputs[1:]),
    "logits": outputs[0][0, -1, :8].tolist(),
}
(out / f"{name}.json").write_text(json.dumps(found))
