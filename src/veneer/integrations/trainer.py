"""An unmodified `transformers.Trainer` saves, resumes and reloads a Veneer model's adapter, and nothing else.

Trainer knows one foreign model class by `isinstance` and treats every other model as whole: it would write all the weights, and reload them with
`strict=False`. Three of its methods are the only doors to model files, two are on the way to the hub, and one knows how long the training will be.
Each is wrapped once, when transformers' trainer module is imported, and passes every model that is not Veneer's through untouched, as does the question
whether a packed model may train. A subclass of Trainer would need every user's script to change.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from ..config import CONFIG_NAME
from ..disk import write_atomically
from ..errors import AdapterFileError, StateError
from ..files import WEIGHTS_NAME
from ..layers.storages import unknown_packing
from ..model import PeftModel

logger = logging.getLogger("veneer")


def install(module: ModuleType) -> None:
    """Wrap the doors of `module.Trainer`."""
    doors = {
        "_save": _save,
        "_load_from_checkpoint": _load_from_checkpoint,
        "_load_best_model": _load_best_model,
        "_push_from_checkpoint": _push_from_checkpoint,
        "create_model_card": _create_model_card,
        "create_scheduler": _create_scheduler,
    }
    for name, wrapper in doors.items():
        wrapt.wrap_function_wrapper(module.Trainer, name, wrapper)
    if hasattr(module, "validate_quantization_for_training"):
        wrapt.wrap_function_wrapper(module, "validate_quantization_for_training", _validate_quantization)


def held(trainer: Any) -> PeftModel | None:
    """The Veneer model that a trainer trains, freed of torch.compile's and the distributed wrappers."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model if isinstance(model, PeftModel) else None


def _validate_quantization(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let a packed model train through its adapters; transformers lets none but its own adapters' and the packings that it lists."""
    model = args[0] if args else kwargs["model"]
    if not isinstance(model, PeftModel) or not getattr(model, "is_quantized", False):
        return wrapped(*args, **kwargs)
    unknown = unknown_packing(model)
    if unknown is not None and not model.hf_quantizer.is_trainable:
        raise StateError(
            f"{unknown}; neither Veneer nor transformers knows that a gradient comes back through it, so the model cannot be trained"
        )
    return None


def _save(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = held(trainer)
    if model is None:
        return wrapped(*args, **kwargs)
    return _write(trainer, model, *args, **kwargs)


def _write(trainer: Any, model: PeftModel, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
    import torch

    if not trainer.args.should_save:
        return
    directory = Path(output_dir if output_dir is not None else trainer.args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    logger.info("saving adapter to %s", directory)
    model.save_pretrained(directory, state_dict=state_dict)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(directory)
    elif getattr(trainer.data_collator, "tokenizer", None) is not None:
        trainer.data_collator.tokenizer.save_pretrained(directory)
    torch.save(trainer.args, directory / "training_args.bin")


def _load_from_checkpoint(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = held(trainer)
    if model is None:
        return wrapped(*args, **kwargs)
    return _read(model, *args, **kwargs)


def _read(model: PeftModel, resume_from_checkpoint: str, _: Any = None, **__: Any) -> None:
    directory = Path(resume_from_checkpoint)
    for name in model.peft_config:
        source = directory if name == "default" else directory / name
        if not (source / CONFIG_NAME).is_file() or not (source / WEIGHTS_NAME).is_file():
            raise AdapterFileError(f"{source} is not a checkpoint of adapter {name!r}: it needs {CONFIG_NAME} and {WEIGHTS_NAME}")
        model.load_adapter(source, name)


def _load_best_model(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = held(trainer)
    if model is None:
        return wrapped(*args, **kwargs)
    logger.info("loading the best adapter from %s (score: %s)", trainer.state.best_model_checkpoint, trainer.state.best_metric)
    _read(model, trainer.state.best_model_checkpoint)
    return None


def _push_from_checkpoint(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = held(trainer)
    if model is not None and trainer.is_world_process_zero():
        # Trainer copies the files of a whole model, and of the adapter format only where another library of it is installed.
        checkpoint = Path(args[0] if args else kwargs["checkpoint_folder"])
        for name in model.peft_config:
            folder = "" if name == "default" else name
            target = Path(trainer.args.output_dir) / folder
            write_atomically(target, {file: (checkpoint / folder / file).read_bytes() for file in (CONFIG_NAME, WEIGHTS_NAME)})
    return wrapped(*args, **kwargs)


def _create_model_card(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wrapped(*args, **kwargs)
    model = held(trainer)
    if model is not None and trainer.is_world_process_zero():
        model.create_or_update_model_card(trainer.args.output_dir, repo_id=trainer.hub_model_id)


def _create_scheduler(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = held(trainer)
    if model is not None:
        steps = kwargs["num_training_steps"] if "num_training_steps" in kwargs else args[0]
        for config in model.peft_config.values():
            config.set_total_steps(steps)
    return wrapped(*args, **kwargs)
