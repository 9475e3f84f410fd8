"""An unmodified Trainer: adapter-only checkpoints, exact resume, exact load-best, also under two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from veneer import AdaLoraConfig, AdapterFileError, LoraConfig, PeftModel, get_peft_model

CONFIG = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8, num_labels=3
)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, n: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 3, (n,), generator=generator)
        self.pixels = torch.randn(n, 3, 16, 16, generator=generator) + self.labels[:, None, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    ViTForImageClassification(CONFIG).save_pretrained(path)
    return path


def adapted(checkpoint: Path, **options) -> PeftModel:
    torch.manual_seed(5)
    base = ViTForImageClassification.from_pretrained(checkpoint)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], **options))


def arguments(directory: Path, **options) -> TrainingArguments:
    defaults = {
        "output_dir": str(directory), "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-2, "eval_strategy": "steps", "save_strategy": "steps",
        "eval_steps": 2, "save_steps": 2, "report_to": "none", "disable_tqdm": True, "seed": 3, "use_cpu": True, "logging_steps": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**defaults | options)


def trainer(model: PeftModel, directory: Path, **options) -> Trainer:
    return Trainer(model, arguments(directory, **options), train_dataset=Pictures(48), eval_dataset=Pictures(16, 1))


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Remember(TrainerCallback):
    """Keeps the weights of every evaluated step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.at[state.global_step] = trained(model)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_checkpoints_hold_the_adapter_and_no_base_weights(checkpoint, tmp_path):
    model = adapted(checkpoint)
    trainer(model, tmp_path).train()
    saved = tmp_path / "checkpoint-6"
    names = {p.name for p in saved.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= names
    assert not {"model.safetensors", "pytorch_model.bin", "config.json"} & names
    assert (saved / "adapter_model.safetensors").stat().st_size < 16_000
    again = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(checkpoint), saved).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(pixel_values=x).logits, model.eval()(pixel_values=x).logits)


def test_the_evaluation_sees_the_labels(checkpoint, tmp_path):
    metrics = trainer(adapted(checkpoint), tmp_path).evaluate()
    assert "eval_loss" in metrics


def test_columns_are_read_off_the_base_model(checkpoint, tmp_path):
    t = trainer(adapted(checkpoint), tmp_path)
    t._set_signature_columns_if_needed()
    assert {"pixel_values", "labels"} <= set(t._signature_columns)


def test_the_best_weights_come_back_bit_for_bit(checkpoint, tmp_path):
    model, remember = adapted(checkpoint), Remember()
    t = trainer(model, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=0.5)
    t.add_callback(remember)
    t.train()
    best = int(t.state.best_model_checkpoint.rpartition("-")[2])
    losses = {e["step"]: e["eval_loss"] for e in t.state.log_history if "eval_loss" in e}
    assert losses[best] == max(losses.values())
    assert equal(trained(model), remember.at[best])
    assert sum(equal(trained(model), values) for values in remember.at.values()) == 1


def test_resuming_equals_an_uninterrupted_run(checkpoint, tmp_path):
    whole = adapted(checkpoint, lora_dropout=0.2)
    trainer(whole, tmp_path / "whole").train()
    other = adapted(checkpoint, lora_dropout=0.2)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(1.0)
    trainer(other, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert equal(trained(whole), trained(other))


def test_adalora_takes_its_steps_from_trainer_and_resumes_exactly(checkpoint, tmp_path):
    def model() -> PeftModel:
        torch.manual_seed(5)
        base = ViTForImageClassification.from_pretrained(checkpoint)
        config = AdaLoraConfig(init_r=4, target_r=1, tinit=1, tfinal=1, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return get_peft_model(base, config)

    whole, other = model(), model()
    trainer(whole, tmp_path / "whole", gradient_accumulation_steps=2).train()
    assert whole.peft_config["default"].total_step == 6
    assert (tmp_path / "whole" / "checkpoint-4" / "schedule.safetensors").is_file()
    kept = sum(int((p != 0).sum()) for n, p in whole.named_parameters() if n.endswith("lora_E"))
    assert kept == 4
    trainer(other, tmp_path / "other", gradient_accumulation_steps=2).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert equal(trained(whole), trained(other))


def test_a_checkpoint_of_another_shape_is_an_error(checkpoint, tmp_path):
    trainer(adapted(checkpoint), tmp_path / "a").train()
    torch.manual_seed(5)
    base = ViTForImageClassification.from_pretrained(checkpoint)
    wider = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    before = trained(wider)
    with pytest.raises(AdapterFileError, match=r"lora_A\.weight has shape"):
        trainer(wider, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert equal(before, trained(wider))


def test_a_plain_model_is_left_to_trainer(checkpoint, tmp_path):
    model = ViTForImageClassification.from_pretrained(checkpoint)
    trainer(model, tmp_path, max_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_gradient_checkpointing_of_both_kinds_gives_equal_weights(checkpoint, tmp_path):
    results = []
    for i, options in enumerate([{}, {"use_reentrant": False}, {"use_reentrant": True}]):
        model = adapted(checkpoint)
        trainer(
            model, tmp_path / str(i), activation_checkpointing=bool(options), activation_checkpointing_kwargs=options or None, max_steps=2
        ).train()
        results.append(trained(model))
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_the_doors_also_serve_a_trainer_imported_later():
    script = (
        "import sys; from veneer import get_peft_model; assert 'transformers.trainer' not in sys.modules; from transformers import Trainer"
    )
    script += "; print(type(Trainer._save).__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("FunctionWrapper")


def test_two_processes_equal_one(checkpoint, tmp_path):
    script = Path(__file__).with_name("trainer_script.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for processes, directory in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--master_port=0",
            "--standalone",
            script,
            checkpoint,
            directory,
        ]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / d / "result.json").read_text()) for d in ("one", "two"))
    assert one["best"] == two["best"] and two["processes"] == 2
    assert max(abs(a - b) for a, b in zip(one["values"], two["values"], strict=True)) < 1e-5
