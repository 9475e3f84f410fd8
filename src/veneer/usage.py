"""The code that loads a base model and its adapter again, as text for people to copy; every line of it runs."""

from __future__ import annotations

import re

from torch import nn

_PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "ForAudioClassification": "audio-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "SamModel": "mask-generation",
}
_MOST_LABELS = 200


def library_class(model: nn.Module) -> type | None:
    """The class of transformers that a model is of, also where wrappers for sharding made a class of their own; None for other models."""
    return next((c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")), None)


def pipeline_of(class_name: str) -> str | None:
    """The hub's name of the task that a class of transformers is for.

    >>> pipeline_of("ViTForImageClassification")
    'image-classification'
    """
    return next((task for ending, task in _PIPELINES.items() if class_name.endswith(ending)), None)


def loading(
    model: nn.Module, base: str | None, adapter: str, *, library: str, revision: str | None, subfolder: str | None, new_head: bool
) -> str:
    """A script that makes `model`, the base with its adapter.

    Args:
        base: the base model's name on the hub.
        adapter: the adapter's directory or repository.
        library: `veneer` or `peft`.
        revision: of the base model.
        subfolder: where in the repository the adapter is.
        new_head: the adapter brings the head, so the base is made for the adapter's labels.
    """
    cls = library_class(model)
    where = f', subfolder="{subfolder}"' if subfolder else ""
    last = f'model = PeftModel.from_pretrained(base, "{adapter}"{where}).eval()'
    if cls is None:
        return f"from {library} import PeftModel\n\nbase = ...  # a {type(model).__name__}, as the adapter was trained on\n{last}"
    lines = [f"from transformers import {cls.__name__}", f"from {library} import PeftModel", ""]
    options = [f'"{base or "path/to/the/base/model"}"']
    if revision:
        options.append(f'revision="{revision}"')
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if new_head and labels and re.search("For.*(Classification|Segmentation|Detection)$", cls.__name__):
        names = [labels[i] for i in sorted(labels)]
        if names != [f"LABEL_{i}" for i in range(len(names))] and len(names) <= _MOST_LABELS:
            lines.append(f"labels = {names!r}")
            options += ["id2label=dict(enumerate(labels))", "label2id={label: i for i, label in enumerate(labels)}"]
        else:
            options.append(f"num_labels={len(names)}")
        options.append("ignore_mismatched_sizes=True")
    call = ", ".join(options) if len(options) == 1 else "".join(f"\n    {option}," for option in options) + "\n"
    return "\n".join([*lines, f"base = {cls.__name__}.from_pretrained({call})", last])
