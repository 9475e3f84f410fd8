"""One class of `PeftModel` for each task, and `get_peft_model`, which chooses among them.

The classes differ in nothing but their names, which other code asks for by `isinstance` and pipelines read; what a task needs is the base model's own.
"""

from __future__ import annotations

from torch import nn

from .config import PeftConfig, TaskType
from .model import PeftModel


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """A model with adapters that classifies sequences."""


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """A model with adapters that writes a text from a text."""


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """A model with adapters that goes on with a text."""


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """A model with adapters that classifies each token."""


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """A model with adapters that finds an answer in a text."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """A model with adapters that gives features."""


class PeftMixedModel(PeftModel):
    """A model with adapters of several methods; every PeftModel can be one, this is its name elsewhere."""


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
) -> PeftModel:
    """Freeze a model and put a new trainable adapter on it; the class that is returned is that of the configuration's task.

    A head that no checkpoint gave (absent, or of another label set) is trained and saved with the adapter without being asked.

    Args:
        model: any `nn.Module`; its layers are adapted in place.
        peft_config: a method's configuration, such as `LoraConfig(r=16)`.
        adapter_name: letters, digits, `_` and `-`.
        mixed: return a `PeftMixedModel`; adapters of different methods live together on every PeftModel.
        autocast_adapter_dtype: keep adapters in float32 where the base is in half precision.
        revision: of the base model, noted in the configuration.

    Raises:
        ConfigError, TargetError: as for `PeftModel`; the model is as it was.

    >>> import torch
    >>> from veneer import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> model.print_trainable_parameters()
    trainable params: 14 || all params: 29 || trainable%: 48.2759
    """
    if revision is not None:
        peft_config.revision = revision
    cls = PeftMixedModel if mixed else PeftModel.OF_TASK.get(str(peft_config.task_type), PeftModel)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
