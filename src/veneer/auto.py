"""`AutoPeftModel…`: an adapter together with the base model that its configuration names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from .config import PeftConfig
from .disk import HUB_ARGUMENTS, locate
from .errors import ConfigError, StateError
from .model import PeftModel
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

# The libraries whose model classes a file may name; any other could run code of its choice by being imported.
TRUSTED = ("transformers", "diffusers")


class AutoPeftModel:
    """An adapter and its base model, whose class the adapter's configuration names.

    Raises:
        StateError: it was called; use `from_pretrained`.
    """

    AUTO: ClassVar[str | None] = None
    """The class of transformers that loads the base model."""
    WRAPS: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *_: Any, **__: Any) -> None:
        name = type(self).__name__
        raise StateError(f"{name} only loads what is there; use {name}.from_pretrained(directory or repository)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and put the adapter on it.

        A tokenizer that lies beside the adapter and has more tokens than the base model makes the model's embeddings grow.

        Args:
            pretrained_model_name_or_path: an adapter's directory, or a repository on the hub.
            adapter_name, is_trainable, config: as for `PeftModel.from_pretrained`.
            revision: of the adapter; the base model's stands in the configuration.
            import_allowlist: libraries whose model classes the configuration may name; transformers and diffusers if None.
            kwargs: for the base model's `from_pretrained`; the hub's arguments and `subfolder` go to the adapter as well.

        Raises:
            AdapterFileError: no adapter there, or one that does not fit the model.
            ConfigError: the configuration names no base model, a class that is not trusted, or another task.
        """
        hub = {k: v for k, v in kwargs.items() if k in HUB_ARGUMENTS} | ({"revision": revision} if revision else {})
        directory = locate(pretrained_model_name_or_path, subfolder=kwargs.pop("subfolder", None), **hub)
        found = config or PeftConfig.read(directory)
        if not found.base_model_name_or_path:
            raise ConfigError(f"{directory} does not say which base model it belongs to; load that one, and use PeftModel.from_pretrained")
        loader = cls._loader(found, directory, TRUSTED if import_allowlist is None else import_allowlist)
        base = loader.from_pretrained(found.base_model_name_or_path, **({"revision": found.revision} if found.revision else {}) | kwargs)
        grow(base, directory)
        return cls.WRAPS.from_pretrained(base, directory, adapter_name, is_trainable, config)

    @classmethod
    def _loader(cls, config: PeftConfig, directory: Path, trusted: Sequence[str]) -> Any:
        """The class that loads the base model."""
        of_task = PeftModel.OF_TASK.get(str(config.task_type))
        if of_task not in (None, cls.WRAPS):
            right = of_task.__name__.replace("PeftModel", "AutoPeftModel", 1)
            raise ConfigError(f"{directory} is an adapter for {config.task_type}; use {right}")
        if cls.AUTO is not None:
            return getattr(import_module("transformers"), cls.AUTO)
        names = config.auto_mapping or {}
        library, name = str(names.get("parent_library", "")), str(names.get("base_model_class", ""))
        if not library or not name:
            raise ConfigError(f"{directory} does not say what class its base model has; use the AutoPeftModelFor… of its task")
        if library.partition(".")[0] not in trusted:
            raise ConfigError(
                f"{directory} names a class of {library!r}, which would be imported; if you trust it, pass import_allowlist=[{library.partition('.')[0]!r}]"
            )
        return getattr(import_module(library), name)


def grow(base: Any, directory: Path) -> None:
    """Give the base model an embedding for every token of the tokenizer beside the adapter."""
    if (directory / "tokenizer_config.json").is_file() and hasattr(base, "get_input_embeddings"):
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(directory)
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """An adapter and its base model, which goes on with a text."""

    AUTO, WRAPS = "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An adapter and its base model, which writes a text from a text."""

    AUTO, WRAPS = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """An adapter and its base model, which classifies sequences."""

    AUTO, WRAPS = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """An adapter and its base model, which classifies each token."""

    AUTO, WRAPS = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An adapter and its base model, which finds an answer in a text."""

    AUTO, WRAPS = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An adapter and its base model, which gives features."""

    AUTO, WRAPS = "AutoModel", PeftModelForFeatureExtraction
