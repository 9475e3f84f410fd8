"""Run under torchrun by test_trainer: train a few steps, resume, load the best, write down the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from veneer import LoraConfig, get_peft_model


class Pictures(torch.utils.data.Dataset):
    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 3, (n,), generator=generator)
        self.pixels = torch.randn(n, 3, 16, 16, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def main(checkpoint: str, directory: Path) -> None:
    torch.manual_seed(5)
    base = ViTForImageClassification.from_pretrained(checkpoint)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    processes = int(__import__("os").environ["WORLD_SIZE"])
    args = TrainingArguments(
        output_dir=str(directory), max_steps=4, per_device_train_batch_size=8 // processes, learning_rate=1e-2, eval_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True, report_to="none", disable_tqdm=True, use_cpu=True, ddp_backend="gloo", seed=3, dataloader_pin_memory=False,
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Pictures(32), eval_dataset=Pictures(16))
    trainer.train()
    if trainer.is_world_process_zero():
        values = [v for n, p in model.named_parameters() if p.requires_grad for v in p.detach().flatten().tolist()]
        best = Path(trainer.state.best_model_checkpoint).name
        (directory / "result.json").write_text(json.dumps({"best": best, "processes": processes, "values": values}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
