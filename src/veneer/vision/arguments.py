"""Settings as `transformers.TrainingArguments`, and what the machine decides: the number type, and how many processes read pictures."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .processes import processes
from .runs import Run
from .settings import Resolved


def training_arguments(run: Run, resolved: Resolved, pictures: int) -> Any:
    """Trainer's arguments for a run on so many training pictures."""
    from transformers import TrainingArguments

    s = resolved.settings
    precision = choose_precision(s.precision)
    return TrainingArguments(
        output_dir=str(run.checkpoints.resolve()),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.eval_batch_size,
        gradient_accumulation_steps=s.accumulate,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        warmup_steps=s.warmup,  # below 1, a share of the steps
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
        restore_callback_states_from_checkpoint=True,  # the patience that is left
        report_to=s.trackers or "none",
        run_name=run.directory.name,
        dataloader_num_workers=choose_workers(s.workers, pictures),
        use_cpu=not torch.accelerator.is_available(),
        ddp_backend="gloo" if processes() > 1 and not torch.accelerator.is_available() else None,
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


def choose_workers(wanted: int | None, pictures: int) -> int:
    """How many processes read pictures: by default some where there are many pictures, cores for it, and the shared memory that batches pass through."""
    if wanted is not None:
        return wanted
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2**30
    return min(4, (os.cpu_count() or 1) // 2) if roomy and pictures >= 500 else 0
