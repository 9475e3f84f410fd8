"""Run by test_transformers_peft with HF PEFT and with Veneer: transformers' own adapter methods, its Trainer and pipelines, from the same first values."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

out, name = Path(sys.argv[1]), sys.argv[2]
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(40))]
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(WORDS),
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "num_labels": 3, "attention_bias": True,
}  # fmt: skip
TARGETS = ["q_proj", "v_proj"]
words = torch.arange(3, 15).view(2, 6)


def filled(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in sorted(tensors.items())}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=words).logits


def adapters(base: Path) -> dict[str, object]:
    """add_adapter, set_adapter, disable, enable, delete, save_pretrained, load_adapter, from_pretrained of an adapter's directory."""
    model, seen = AutoModelForCausalLM.from_pretrained(base), {}
    seen["frozen"] = logits(model)
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=[*TARGETS, "down_proj"]), "first")
    model.add_adapter(LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS), "second")
    seen["active"] = model.active_adapters()
    for seed, adapter in enumerate(["first", "second"]):
        set_peft_model_state_dict(model, filled(get_peft_model_state_dict(model, adapter_name=adapter), seed), adapter)
    seen["second"] = logits(model)
    model.set_adapter("first")
    seen["first"] = logits(model)
    model.set_adapter(["first", "second"])
    seen["both"] = logits(model)
    model.disable_adapters()
    seen["disabled"] = logits(model)
    model.enable_adapters()
    seen["enabled"] = logits(model)
    seen["keys"] = sorted(model.get_adapter_state_dict("second"))
    for adapter in ("first", "second"):
        model.set_adapter(adapter)
        model.save_pretrained(out / name / adapter)
    model.delete_adapter("first")
    seen["first is deleted"] = (logits(model), model.active_adapters())
    again = AutoModelForCausalLM.from_pretrained(out / name / "first")
    seen["first, reloaded"] = (logits(again), type(again).__name__)
    report = again.load_adapter(str(out / name / "second"), "other")
    seen["second, reloaded"] = (logits(again), [sorted(report.missing_keys), sorted(report.unexpected_keys)], again.active_adapters())
    for kind, config in {
        "biases": LoraConfig(r=2, target_modules=TARGETS, bias="lora_only"),
        "loha": LoHaConfig(r=2, target_modules=TARGETS),
    }.items():
        other = AutoModelForCausalLM.from_pretrained(base)
        other.add_adapter(config)
        set_peft_model_state_dict(other, filled(get_peft_model_state_dict(other), 4))
        other.save_pretrained(out / name / kind)
        seen[kind] = logits(other)
        seen[f"{kind}, reloaded"] = logits(AutoModelForCausalLM.from_pretrained(out / name / kind))
        seen[f"{kind}, from hf"] = logits(AutoModelForCausalLM.from_pretrained(out / "hf" / kind))
    return seen


class Sentences(torch.utils.data.Dataset):
    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 3, (n,), generator=generator)
        self.words = torch.randint(3, 43, (n, 6), generator=generator)
        self.words[:, 2] = 3 + self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.words[i], "labels": self.labels[i]}


def adapted(base: Path) -> PeftModel:
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base),
        LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS", lora_dropout=0.0),
    )
    set_peft_model_state_dict(model, filled(get_peft_model_state_dict(model), 5))
    return model


def trained(base: Path) -> dict[str, object]:
    """Trainer: losses, adapter-only checkpoints, the best one at the end, and resuming."""
    options = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 0.05, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "seed": 3, "use_cpu": True, "load_best_model_at_end": True,
    }  # fmt: skip

    def trainer(model: PeftModel, directory: str) -> Trainer:
        arguments = TrainingArguments(output_dir=str(out / name / directory), **options)
        return Trainer(model, arguments, train_dataset=Sentences(48, 0), eval_dataset=Sentences(16, 1))

    model = adapted(base)
    t = trainer(model, "whole")
    t.train()
    best = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), t.state.best_model_checkpoint)
    resumed = adapted(base)
    trainer(resumed, "resumed").train(resume_from_checkpoint=str(out / name / "whole" / "checkpoint-4"))
    last, first = (
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), out / name / d / "checkpoint-6")
        for d in ("whole", "resumed")
    )
    return {
        "losses": [round(float(e["loss"]), 4) for e in t.state.log_history if "loss" in e],
        "evaluated": [e["eval_loss"] for e in t.state.log_history if "eval_loss" in e],
        "best": (t.state.best_model_checkpoint.rpartition("-")[2], (logits(best) - logits(model)).abs().max()),
        "resumed": (logits(last) - logits(first)).abs().max(),
        "class": type(model).__name__,
        "files": sorted(p.name for p in (out / name / "whole" / "checkpoint-6").iterdir()),
    }


def served(base: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Pipelines on an adapter's directory and on a PeftModel, and an AutoPeftModel."""
    writer = pipeline("text-generation", model=str(out / name / "first"), tokenizer=tokenizer)
    model = adapted(base)
    model.save_pretrained(out / name / "classes")
    auto = AutoPeftModelForSequenceClassification.from_pretrained(out / name / "classes")
    return {
        "text": writer("w1 w2 w3", max_new_tokens=5, do_sample=False)[0]["generated_text"],
        "labels": [
            (a["label"], round(a["score"], 4)) for a in pipeline("text-classification", model=model, tokenizer=tokenizer)(["w1 w2", "w9"])
        ],
        "auto": (type(auto).__name__, (logits(auto) - logits(model)).abs().max()),
    }


vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
bases = {"causal": LlamaForCausalLM, "classes": LlamaForSequenceClassification}
for directory, cls in bases.items():
    if not (out / directory).exists():
        torch.manual_seed(0)
        cls(LlamaConfig(**LLAMA)).save_pretrained(out / directory)
found = {
    "adapters": adapters(out / "causal"),
    "trained": trained(out / "classes"),
    "served": served(
        out / "classes", PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    ),
}
torch.save(found, out / f"{name}.pt")
