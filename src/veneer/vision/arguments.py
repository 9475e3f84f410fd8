"""Settings as `transformers.TrainingArguments`, and the number type that suits the device."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from .runs import Run
from .settings import Resolved


def training_arguments(run: Run, resolved: Resolved, pictures: int) -> Any:
    """Trainer's arguments for a run on so many training pictures."""
    from transformers import TrainingArguments

    s = resolved.settings
    precision = choose_precision(s.precision)
    steps = max(1, -(-pictures // (s.batch_size * s.accumulate))) * s.epochs
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.eval_batch_size,
        gradient_accumulation_steps=s.accumulate,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        warmup_steps=int(s.warmup * steps),
        label_smoothing_factor=s.label_smoothing,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=s.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        report_to=s.trackers or "none",
        run_name=run.directory.name,
        dataloader_num_workers=s.workers,
        use_cpu=not torch.accelerator.is_available(),
        ddp_backend=None if torch.accelerator.is_available() else "gloo",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def choose_precision(wanted: str) -> str:
    """ "fp32", "bf16" or "fp16" for this device; "auto" takes bf16 where the hardware multiplies it fast."""
    if wanted != "auto":
        if wanted == "fp16" and not torch.cuda.is_available():
            raise ConfigError("precision: fp16 needs a GPU; use auto, fp32 or bf16")
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
