"""The wrapper itself: the base model inside, forward, parameters, copies.

It is thin on purpose: layers are adapted where they stand (see `layers.adapted`), and everything but adapters is answered by the base model. Each wrapper's class carries the
base's forward signature, because Trainer and others read column and label names off it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .. import inject, mixing
from ..adapting import put_on
from ..config import PeftConfig
from ..errors import ConfigError, VeneerWarning
from ..layers.storages import number_of
from ..wrapping import AdaptedModel, with_signature

if TYPE_CHECKING:
    from ..status import TunerLayerStatus, TunerModelStatus


class Wrapper(nn.Module):
    """A base model with one adapter on it; `PeftModel` says what its arguments are."""

    base_model: AdaptedModel
    peft_config: dict[str, PeftConfig]
    OF_TASK: ClassVar[dict[str, type[Any]]] = {}
    """The class that wraps models for a task."""

    WRAPPER: ClassVar[type[nn.Module]]
    """The class without the base's signature."""

    def __init_subclass__(cls, task: str | None = None) -> None:
        if task is not None:
            Wrapper.OF_TASK[task] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        _fresh: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        if _:
            raise TypeError(f"PeftModel got an unexpected argument {next(iter(_))!r}")
        if isinstance(model, Wrapper):
            raise ConfigError(
                "this model is a PeftModel already; use its add_adapter(name, config), or get_base_model() for the model inside"
            )
        if inject.RECORD in model.__dict__:
            raise ConfigError("this model has adapters already; use the PeftModel that holds them, or its unload() first")
        self.peft_config = {}
        self.base_model = AdaptedModel(model)
        self._reached_checked = False
        self.__class__ = with_signature(type(self), type(model))
        self._attach(adapter_name, peft_config, fresh=_fresh, autocast_adapter_dtype=autocast_adapter_dtype)
        inject.activate(model, [adapter_name], trainable=not peft_config.inference_mode)

    def _attach(self, name: str, config: PeftConfig, *, fresh: bool, autocast_adapter_dtype: bool = True) -> None:
        put_on(self.get_base_model(), config, name, fresh=fresh, autocast_adapter_dtype=autocast_adapter_dtype)
        self._list(name, config)

    def _list(self, name: str, config: PeftConfig) -> None:
        if config.task_type is None and config.auto_mapping is None:
            base = type(self.get_base_model())
            config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        self.peft_config[name] = config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            found = getattr(self.base_model.model, name)
            return mixing.generating(self.base_model.model, found) if name == "generate" else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.WRAPPER, type(self.get_base_model())), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        model = self.get_base_model()
        if inject.RECORD in model.__dict__ and inject.record(model).schedules:
            from ..stepping import watch

            watch(model)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward; `adapter_names` names one adapter for each sample, or `"__base__"` for none, in place of the active ones."""
        out = mixing.forward(self.get_base_model(), self.base_model, adapter_names, args, kwargs)
        if not torch.compiler.is_compiling() and not self._reached_checked:
            self._check_reached()
        return out

    def _check_reached(self) -> None:
        if not self.active_adapters:
            return
        self._reached_checked = True
        silent = inject.unreached(self.get_base_model())
        if silent:
            warnings.warn(
                f"{len(silent)} adapted layers were not called in the first forward, such as {silent[0]}: their parent reads the weight without "
                "calling the layer, or this input does not reach them; these adapters have no effect there",
                VeneerWarning,
                stacklevel=3,
            )

    def get_base_model(self) -> nn.Module:
        """The base model, adapted in place; `unload` gives it back without adapters."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, whole saved modules and their frozen originals included."""
        trainable = total = 0
        for p in self.parameters():
            count = number_of(p)
            total += count
            trainable += count if p.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print `trainable params: … || all params: … || trainable%: …`."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of every module with adapters."""
        from ..status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all modules with adapters together."""
        from ..status import get_model_status

        return get_model_status(self)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's own; inputs are made to require grad, without which re-entrant checkpoints give adapters no gradient."""
        model: Any = self.get_base_model()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(*args, **kwargs)
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)


def _blank(cls: type[Wrapper], base: type[nn.Module]) -> Wrapper:
    new: Any = with_signature(cls, base)
    return new.__new__(new)
