"""Several adapters on one model: which are there, which run, and new ones from old ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files, inject
from ..adapting import check_name
from ..config import PeftConfig
from ..errors import StateError, VeneerError
from ..holding import Holding
from ..shelving import keep_to_budget
from .wrapper import Wrapper

if TYPE_CHECKING:
    from ..combining.options import Options


class WithAdapters(Wrapper, Holding):
    """Adapters by name."""

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that run."""
        return list(inject.record(self.get_base_model()).active)

    @property
    def active_adapter(self) -> str:
        """The name of the one adapter that runs; the first of several."""
        if not self.active_adapters:
            raise StateError("no adapter is active; use set_adapter(name)")
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the active adapter."""
        return self.peft_config[self.active_adapter]

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig) -> None:
        """Attach another adapter, inactive until `set_adapter`."""
        self._attach(adapter_name, peft_config, fresh=True)
        inject.record(self.get_base_model()).trainable.add(adapter_name)
        try:
            keep_to_budget(self.get_base_model())
        except VeneerError:
            self.delete_adapter(adapter_name)
            raise

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Attach a weighted combination of adapters, W' = W + Σ wᵢ (W'ᵢ − W), inactive; a LoRA, or a copy where one of weight 1 is all there is.

        Adapters of any method are combined by their changes: `linear` and `cat` exactly, where these have low rank, `svd` as the nearest change of a
        rank. This is the sum that task arithmetic means (arXiv:2212.04089); HF PEFT's `linear` adds factors instead, which brings in products of one
        adapter's B with another's A.

        Args:
            adapters: names of attached adapters.
            weights: wᵢ, one for each; a negative one takes an adapter's change away.
            adapter_name: of the new adapter.
            combination_type: "svd", "linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune", or one of the last four with "_svd", which
                prunes the changes instead of the factors. DARE draws from torch's generator.
            svd_rank: the rank of the result; the largest of the inputs if None.
            svd_clamp: clamp the factors of svd to this quantile of their numbers.
            svd_full_matrices: of no effect; the factors are the same either way.
            svd_driver: cuSOLVER's, on CUDA devices.
            density: the share of the numbers that pruning keeps (ties, dare, magnitude_prune).
            majority_sign_method: "total" or "frequency" (ties).

        Raises:
            ConfigError: weights, options or ranks that do not go together, or a name that is taken; the model is as it was.
            StateError: an unknown adapter, or changes that this type cannot combine; the model is as it was.

        >>> import torch
        >>> from veneer import LoraConfig, get_peft_model
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
        >>> model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "difference", "linear")
        >>> model.peft_config["difference"].r
        3
        """
        from ..combining.options import Options

        options = Options(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        self.add_combination(adapters, weights, adapter_name, options)

    def add_combination(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, options: Options, *, progress: bool = False
    ) -> None:
        """`add_weighted_adapter` with its options in one value, and a bar where that is asked for."""
        from ..combining.weighted import combined

        check_name(adapter_name, self.peft_config)
        model = self.get_base_model()
        config, tensors = combined(model, adapters, weights, options, progress=progress)
        self._attach(adapter_name, config, fresh=False)
        try:
            labels = next((found for n, found in inject.record(model).labels.items() if n in adapters), {})
            origin = Path(f"the combination {adapter_name}")
            files.load(model, adapter_name, tensors, origin, shared=config.writes_shared, labels=labels)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several, the active ones; they train unless `inference_mode`, the others do not."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        inject.activate(self.get_base_model(), names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model."""
        if adapter_name not in self.peft_config:
            inject.activate(self.get_base_model(), [adapter_name])
        inject.remove(self.get_base_model(), adapter_name)
        del self.peft_config[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the block with the base model's own weights, heads and biases."""
        model = self.get_base_model()
        trained = inject.disable(model)
        try:
            yield
        finally:
            inject.enable(model, trained)
