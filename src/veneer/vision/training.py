"""Fine-tune an image classifier on one's own pictures: data → model → adapter → Trainer → report → proof.

The work is `transformers.Trainer`'s, unchanged, so accelerate, torchrun, mixed precision, accumulation, checkpoints, resume and trackers come with it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..disk import write_atomically
from ..errors import StateError, VeneerError
from ..heads import head_modules, new_heads
from ..integrations import install
from ..labels import LABELS_NAME
from ..model import PeftModel
from ..tasks import get_peft_model
from .arguments import training_arguments
from .augment import Augment
from .batches import PictureSet
from .data import ImageData, load_data
from .evaluation import Evaluation, evaluate_split
from .models import image_size, load_model, load_processor
from .prediction import Classifier
from .processes import is_main_process, on_main_process
from .proof import prove
from .report import write_report
from .runs import METRICS_NAME, Run, create, reopen
from .settings import Resolved, resolve

logger = logging.getLogger("veneer")


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        directory: its folder.
        metrics: what `metrics.json` holds.
        labels: class names.
        evaluation: on the test part if there is one, else on the validation part.
    """

    directory: Path
    metrics: dict[str, Any]
    labels: list[str]
    evaluation: Evaluation

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        return Run(self.directory).adapter


def train(data: str | Path, *, config: str | Path | None = None, quiet: bool = False, **settings: Any) -> RunResult:
    """Fine-tune an image classifier.

    Args:
        data: a folder of class folders, of train/val/test folders, a CSV or Parquet table, a data set's name or folder.
        config: a YAML file of settings.
        quiet: say nothing while training.
        settings: fields of `TrainSettings` and of the method's configuration, such as `method="lora", r=16, epochs=5`.

    Raises:
        DataError: pictures or labels that cannot be trained on.
        ConfigError: an unknown setting, a bad value, or a model that cannot be loaded.
        StateError: the run did not prove itself; its folder says so.
    """
    resolved = resolve(settings, file=config, given_from="argument")
    return start(str(data), resolved, quiet=quiet)


def start(data: str, resolved: Resolved, *, quiet: bool = False) -> RunResult:
    """Begin a new run with resolved settings."""
    # Absolute, so that the run can be continued from anywhere.
    data = str(Path(data).resolve()) if Path(data).exists() else data
    pictures = _load(data, resolved)
    model = load_model(resolved.settings.model, pictures.labels)
    return _carry_out(lambda: create(resolved, data), resolved, pictures, model, quiet=quiet)


def resume(directory: str | Path, *, quiet: bool = False) -> RunResult:
    """Continue an interrupted run from its last checkpoint, with its own settings."""
    run, data, resolved = reopen(Path(directory))
    pictures = _load(data, resolved)
    model = load_model(resolved.settings.model, pictures.labels)
    return _carry_out(lambda: _reopened(run), resolved, pictures, model, quiet=quiet)


def _reopened(run: Run) -> Run:
    run.set_status("running", resumed=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    return run


def _load(data: str, resolved: Resolved) -> ImageData:
    from transformers import set_seed

    s = resolved.settings
    set_seed(s.seed)
    return load_data(data, seed=s.seed, val_fraction=s.val_fraction, image_column=s.image_column, label_column=s.label_column)


def _carry_out(open_run: Any, resolved: Resolved, data: ImageData, base: Any, *, quiet: bool) -> RunResult:
    install()
    s = resolved.settings
    processor = load_processor(s.model)
    torch.manual_seed(s.seed)
    config = resolved.adapter_config()
    config.base_model_name_or_path = s.model if s.model == "demo" or not Path(s.model).exists() else str(Path(s.model).resolve())
    if config.modules_to_save is None:
        # The core finds new heads. One that fits by chance, from a checkpoint with as many classes of its own, has to learn these too.
        config.modules_to_save = [h for h in head_modules(base) if h not in new_heads(base)[0]] or None
    model = get_peft_model(base, config)
    run = on_main_process(open_run)
    try:
        return _train(run, resolved, data, model, processor, quiet=quiet)
    except KeyboardInterrupt:
        how = f"veneer train --resume {run.directory}"
        if is_main_process():
            run.set_status("interrupted", resume=how)
        raise KeyboardInterrupt(f"`{how}` goes on with the run") from None
    except Exception as e:
        if is_main_process():
            run.set_status("failed", reason=str(e) if isinstance(e, VeneerError) else repr(e))
        if isinstance(e, torch.OutOfMemoryError):
            raise StateError(_too_large(s.batch_size, s.accumulate)) from e
        raise


def _too_large(batch_size: int, accumulate: int) -> str:
    smaller = f"batch_size {max(1, batch_size // 2)} with accumulate {2 * accumulate} makes the same steps"
    return f"the device's memory is too small for {batch_size} pictures at a time; {smaller}"


def scores(predictions: Any) -> dict[str, float]:
    """Accuracy, and the score that picks the best epoch: accuracy, with the likelihood of the true classes deciding between equals.

    Few validation pictures make many epochs equal in accuracy, and the first of them is seldom the best.
    """
    logits = torch.from_numpy(np.asarray(predictions.predictions)).double()
    labels = torch.from_numpy(np.asarray(predictions.label_ids))
    accuracy = float((logits.argmax(-1) == labels).double().mean())
    likelihood = float(logits.softmax(-1).gather(1, labels[:, None]).mean())  # in 0 … 1
    return {"accuracy": accuracy, "score": accuracy + likelihood / (2 * len(labels))}


def _train(run: Run, resolved: Resolved, data: ImageData, model: PeftModel, processor: Any, *, quiet: bool) -> RunResult:
    from transformers import EarlyStoppingCallback, Trainer

    from .progress import Progress

    s = resolved.settings
    trainable, total = model.get_nb_trainable_parameters()
    if is_main_process():
        _note_data(run, data)
        if not quiet:
            _announce(run, resolved, data, trainable, total)
    progress = Progress(run, quiet=quiet)
    callbacks: list[Any] = [progress]
    if s.patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=s.patience))
    trainer = Trainer(
        model,
        training_arguments(run, resolved, len(data.train)),
        train_dataset=PictureSet(data.train, processor, Augment(s.augment, image_size(processor))),
        eval_dataset=PictureSet(data.val, processor),
        compute_metrics=scores,
        callbacks=callbacks,
    )
    trainer.remove_callback(_printer())
    began = time.perf_counter()
    last = run.last_checkpoint()
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        progress.close()
    seconds = time.perf_counter() - began
    return _finish(run, data, trainer, model, processor, {"seconds": seconds, "trainable": trainable, "parameters": total}, quiet=quiet)


def _note_data(run: Run, data: ImageData) -> None:
    run.event("data", origin=data.origin, train=len(data.train), val=len(data.val), test=len(data.test or []), classes=len(data.labels))
    run.write_json("skipped.json", [{"source": x.source, "reason": x.reason} for x in data.skipped])


def _announce(run: Run, resolved: Resolved, data: ImageData, trainable: int, total: int) -> None:
    s = resolved.settings
    test = f", {len(data.test)} to test" if data.test else ""
    print(
        f"{data.origin}: {len(data.labels)} classes, {len(data.train)} pictures to train, {len(data.val)} to validate{test}",
        file=sys.stderr,
    )
    if data.skipped:
        first = data.skipped[0]
        print(
            f"{len(data.skipped)} files left out, such as {first.source} ({first.reason}); {run.directory / 'skipped.json'} lists them",
            file=sys.stderr,
        )
    print(
        f"{s.method} on {s.model}: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %); run {run.directory}",
        file=sys.stderr,
        flush=True,
    )


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def _finish(run: Run, data: ImageData, trainer: Any, model: PeftModel, processor: Any, facts: dict[str, Any], *, quiet: bool) -> RunResult:
    """Write adapter, metrics and report of the best weights, and let the run prove itself."""
    if trainer.is_world_process_zero():
        model.save_pretrained(run.adapter)
        processor.save_pretrained(run.adapter)
        write_atomically(run.adapter, {LABELS_NAME: (json.dumps(data.labels, indent=2, ensure_ascii=False) + "\n").encode()})
    classifier = Classifier(model.eval(), processor, data.labels, trainer.args.per_device_eval_batch_size)
    parts = {"val": evaluate_split(classifier, data.val)}
    if data.test is not None:
        parts["test"] = evaluate_split(classifier, data.test)
    metrics = {f"{name}_{key}": value for name, e in parts.items() for key, value in e.metrics().items()} | facts
    metrics |= {
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "best_checkpoint": Path(trainer.state.best_model_checkpoint or "").name,
    }
    shown = parts.get("test", parts["val"])
    if trainer.is_world_process_zero():
        run.write_json(METRICS_NAME, metrics)
        write_report(shown, run.directory)
        _prove(run, model, processor, data, quiet=quiet)
    return RunResult(run.directory, metrics, data.labels, shown)


def _prove(run: Run, model: PeftModel, processor: Any, data: ImageData, *, quiet: bool) -> None:
    proved, sentence = prove(model, processor, run.adapter, data.val)
    run.event("proved" if proved else "not proved", sentence=sentence)
    if not proved:
        raise StateError(f"{run.directory} is not finished: {sentence}. Its checkpoints are kept; please report this")
    run.set_status("finished", proof=sentence)
    if not quiet:
        print(sentence, file=sys.stderr, flush=True)
