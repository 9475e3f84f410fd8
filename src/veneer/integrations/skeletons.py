"""transformers models without their weights: built on the meta device from their configuration, in a second, whatever their size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import device, nn

from ..errors import ConfigError

_AUTO = ("ImageClassification", "SequenceClassification", "TokenClassification", "QuestionAnswering", "CausalLM", "Seq2SeqLM")


def skeleton(model: str, **hub: Any) -> nn.Module:
    """The model of a checkpoint, without its weights.

    Args:
        model: a folder with a `config.json`, or a name on the hub.
        hub: arguments of `AutoConfig.from_pretrained`, such as `local_files_only`.

    Raises:
        ConfigError: no such model, or one that transformers cannot build by itself.
    """
    return next(skeletons(model, **hub))


def skeletons(model: str, *, classes: Sequence[str] = (), labels: int | None = None, **hub: Any) -> Iterator[nn.Module]:
    """The models that a checkpoint can be loaded as, without weights, the likeliest first.

    Args:
        classes: names of transformers' classes to try first.
        labels: how many classes a classification head has, where it is not the checkpoint's own number.

    Raises:
        ConfigError: as `skeleton`.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model, **hub)
    except (OSError, ValueError, ImportError, KeyError) as e:
        first = " ".join(str(e).strip().splitlines()[0].split()) if str(e).strip() else type(e).__name__
        raise ConfigError(
            f"model {model!r} cannot be read: {first} Give a folder that holds a transformers model's config.json, or the name of a model on the hub "
            "(owner/name) with a network connection."
        ) from e
    named = [getattr(transformers, name, None) for name in [*classes, *(config.architectures or [])]]
    if labels is not None and labels != config.num_labels:
        config.num_labels = labels
    auto = [getattr(transformers, f"AutoModelFor{task}") for task in _AUTO] + [transformers.AutoModel]
    mapped = [c._model_mapping.get(type(config), None) for c in auto]
    found = list(dict.fromkeys(c for c in [*named, *mapped] if isinstance(c, type)))
    if not found:
        raise ConfigError(
            f"model {model!r} is a {config.model_type}, which transformers {transformers.__version__} builds no model of by itself"
        )
    for cls in found:
        with device("meta"):
            built = cls(config)
        built.eval()
        built.name_or_path = model
        yield built
