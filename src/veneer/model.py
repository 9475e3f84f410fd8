"""`PeftModel`, what a user holds: the base model, adapted in place, behind the interface that users of the `peft` package know.

The wrapper is thin on purpose: layers are adapted where they stand (see `layers.adapted`), and everything but adapters is answered by the base
model. Each wrapper's class carries the base's forward signature, because Trainer and others read column and label names off it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import files, inject, merging, mixing
from .adapting import check_name, put_on
from .config import PeftConfig
from .disk import locate
from .errors import ConfigError, StateError, VeneerError, VeneerWarning, suggest
from .holding import Holding, note_key, shelf_key, shelve
from .layers.storages import number_of
from .shelving import keep_to_budget, pack
from .wrapping import AdaptedModel, with_signature

if TYPE_CHECKING:
    from .cards import Card
    from .combining.options import Options
    from .converting import Conversion
    from .status import TunerLayerStatus, TunerModelStatus


class PeftModel(Holding, nn.Module):
    """A frozen model with adapters.

    Args:
        model: the base model; its layers are adapted in place.
        peft_config: a method's configuration.
        adapter_name: letters, digits, `_` and `-`.
        autocast_adapter_dtype: keep adapters in float32 where the base is in half precision.

    Raises:
        ConfigError: a configuration that cannot be used, or adapters that cannot live together.
        TargetError: target names that match nothing, or layers that cannot be adapted; the model is as it was.
    """

    base_model: AdaptedModel
    OF_TASK: ClassVar[dict[str, type[PeftModel]]] = {}
    """The class that wraps models for a task."""

    WRAPPER: ClassVar[type[PeftModel]]
    """The class without the base's signature."""

    def __init_subclass__(cls, task: str | None = None) -> None:
        if task is not None:
            PeftModel.OF_TASK[task] = cls

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
        if isinstance(model, PeftModel):
            raise ConfigError(
                "this model is a PeftModel already; use its add_adapter(name, config), or get_base_model() for the model inside"
            )
        if inject.RECORD in model.__dict__:
            raise ConfigError("this model has adapters already; use the PeftModel that holds them, or its unload() first")
        self.peft_config: dict[str, PeftConfig] = {}
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
            from .stepping import watch

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

    # Parameters

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
        from .status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all modules with adapters together."""
        from .status import get_model_status

        return get_model_status(self)

    # Adapters

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
        from .combining.options import Options

        options = Options(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        self.add_combination(adapters, weights, adapter_name, options)

    def add_combination(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, options: Options, *, progress: bool = False
    ) -> None:
        """`add_weighted_adapter` with its options in one value, and a bar where that is asked for."""
        from .combining.weighted import combined

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

    # Merging

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        safe: bool = False,
        originals_device: str | torch.device | None = None,
    ) -> merging.MergeReport:
        """Write the active adapters, or the named ones, into the weights, until `unmerge_adapter`; returns what rounding took from each weight.

        Packed weights are packed again with their own settings.

        Args:
            adapter_names: merge these; they become the active ones.
            safe_merge: look at every merged weight first, and merge none if one has NaN or infinite numbers; always so where a weight is packed.
            safe: the same, by its shorter name.
            originals_device: where the original weights are kept until then, such as "cpu"; None leaves them where they are.

        Raises:
            ConfigError: a device that cannot hold them.
            StateError: an unknown name, merged already, numbers that are not finite, or a bias that has no place; the model is as it was.
        """
        return merging.merge(self.get_base_model(), names=adapter_names, safe=safe or safe_merge, originals_device=originals_device)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        merging.unmerge(self.get_base_model())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        safe: bool = False,
        report: merging.MergeReport | None = None,
    ) -> nn.Module:
        """The base model with the active adapters (or the named ones) in its weights and without Veneer.

        Args:
            progressbar: show how far it is.
            safe_merge: refuse to write NaN or infinite numbers; always so where a weight is packed.
            safe: the same, by its shorter name.
            report: a `MergeReport()`, which gets what rounding took from each weight.

        Raises:
            StateError: the merged weights would not be finite; the model is as it was.
        """
        return merging.merge_and_unload(
            self.get_base_model(), names=adapter_names, safe=safe or safe_merge, progress=progressbar, report=report
        )

    def unload(self) -> nn.Module:
        """The untouched base model."""
        merging.unmerge(self.get_base_model())
        return inject.detach(self.get_base_model())

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write each adapter in the public format: `default` into the directory itself, any other into a folder of its name.

        Args:
            save_directory: made if needed; files already there are replaced whole or not at all.
            safe_serialization: False is refused: pickles are not written.
            selected_adapters: only these.
            state_dict: take the values from here, as gathered from a sharded model, by their names in this model.
            is_main_process: False writes nothing.
            kwargs: `max_shard_size` and other arguments of `PreTrainedModel.save_pretrained` are accepted and have no meaning for one small file.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle; Veneer writes safetensors only")
        names = list(selected_adapters) if selected_adapters is not None else list(self.peft_config)
        for name in names:
            if name not in self.peft_config:
                raise StateError(
                    f"no adapter is called {name!r}; attached are {', '.join(self.peft_config)}.{suggest(name, self.peft_config)}"
                )
        if is_main_process:
            for name in names:
                self._save_one(Path(save_directory), name, state_dict)
            inject.record(self.get_base_model()).shelf.settle()

    def _save_one(self, directory: Path, name: str, state_dict: Mapping[str, Tensor] | None) -> None:
        from .cards import place
        from .saving import write_adapter

        config = self.peft_config[name]
        tensors = files.entries(self.get_base_model(), name, shared=config.writes_shared)
        if state_dict is not None:
            from .state_dicts import gathered

            tensors = gathered(tensors, self, state_dict)
        text = config.to_json(of_parts=any(s.is_part for s in inject.record(self.get_base_model()).plans[name].sites))
        state = files.states(self.get_base_model(), name)
        write_adapter(place(directory, name), text, tensors, state, self._card(name), files.names_to_write(self.get_base_model(), name))

    def save_as_lora(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        rank: int | None = None,
        tolerance: float | None = None,
        *,
        uniform: bool = False,
    ) -> Conversion:
        """Write one adapter as a plain LoRA, that any reader of LoRA loads: with equal outputs, or the nearest of a rank.

        Args:
            save_directory: made if needed; files already there are replaced whole or not at all.
            adapter_name: the active one if None.
            rank, tolerance, uniform: as for `convert`.

        Returns:
            The rank and the error of each layer.

        Raises:
            StateError: its change has no low rank, and neither a rank nor a tolerance was given; nothing is written.
        """
        from .converting import convert

        return convert(self, adapter_name or self.active_adapter, rank, tolerance, save_directory=save_directory, uniform=uniform)

    def _card(self, name: str, **more: Any) -> Card:
        from .cards import Card

        return Card.of(self.get_base_model(), name, self.peft_config[name], total=self.get_nb_trainable_parameters()[1], **more)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str], *, repo_id: str | None = None) -> None:
        """Write the adapters' model cards into a directory where they are saved; what else a card says there, as Trainer's, stays.

        Args:
            output_dir: where the adapters are saved.
            repo_id: where they will be on the hub, if that is known.
        """
        for name in self.peft_config:
            self._card(name, repo_id=repo_id).update(Path(output_dir))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> Self:
        """Put an adapter from a directory or the hub on a base model; the class that is returned is that of the adapter's task.

        Args:
            model: the base model that the adapter was trained on.
            model_id: a directory, a repository on the hub, or one `.safetensors` file of LyCORIS's or kohya's scripts.
            is_trainable: go on training it; otherwise nothing requires grad.
            config: use this configuration instead of the file's.
            low_cpu_mem_usage: never draw values that the file replaces; always so.
            key_mapping: {regular expression: replacement} for tensor names of another release.
            hub: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            AdapterFileError: no adapter there, or one that does not fit the model; the model is as it was.
        """
        from .foreign import is_foreign, read_foreign
        from .state_dicts import renamed
        from .translation import todays

        if is_foreign(model_id):
            if config is not None:
                raise ConfigError(f"config: {model_id} says by its tensors what it is; leave config out")
            read, directory = read_foreign(model, model_id), Path(model_id)
            config, tensors = read.config, read.tensors
        else:
            directory = locate(model_id, **hub)
            config = config or PeftConfig.read(directory)
            config, tensors = todays(model, config, renamed(files.read_tensors(directory), key_mapping))
        return cls._holding(model, adapter_name, config, tensors, directory, is_trainable, autocast_adapter_dtype)

    @classmethod
    def _holding(
        cls,
        model: nn.Module,
        name: str,
        config: PeftConfig,
        tensors: Mapping[str, Tensor],
        origin: Path,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> Self:
        """A base model with an adapter of these tensors."""
        config.inference_mode = not is_trainable
        wanted = cls.OF_TASK.get(str(config.task_type), cls) if cls is PeftModel else cls
        new = wanted(model, config, name, autocast_adapter_dtype=autocast_adapter_dtype, _fresh=False)
        try:
            files.load(model, name, tensors, origin, shared=config.writes_shared)
        except BaseException:
            inject.detach(model)
            raise
        return new  # type: ignore[return-value]  # a subclass of cls

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        hotswap: bool = False,
        packed: bool = False,
        **hub: Any,
    ) -> None:
        """Read an adapter from a directory or the hub, under a new name or over the adapter of that name; or a LyCORIS or kohya file.

        Args:
            hotswap: replace the attached adapter's numbers in place, as `hotswap_adapter` does, so that a compiled model is not compiled again.
            model_id, is_trainable, autocast_adapter_dtype, low_cpu_mem_usage, key_mapping, hub: as for `from_pretrained`.
            packed: leave it packed until `set_adapter` (see `hold`); a thousand adapters are loaded quickly so.

        Raises:
            AdapterFileError: no adapter there, or one that does not fit; the model is as it was.
        """
        if hotswap:
            from .hotswap import hotswap_adapter

            hotswap_adapter(self, model_id, adapter_name, key_mapping=key_mapping, **hub)
            return
        from .foreign import is_foreign
        from .state_dicts import renamed
        from .translation import todays

        model = self.get_base_model()
        if is_foreign(model_id):
            from .lycoris import load_lycoris

            load_lycoris(self, model_id, adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype)
            if packed:
                pack(model, adapter_name)
            return
        directory = locate(model_id, **hub)
        config, tensors = PeftConfig.read(directory), renamed(files.read_tensors(directory), key_mapping)
        key = shelf_key(config, autocast_adapter_dtype) if packed else ""
        fresh = adapter_name not in self.peft_config
        if packed and fresh and shelve(model, adapter_name, config, tensors, directory, key, is_trainable=is_trainable):
            self._list(adapter_name, config)
            return
        config, tensors = todays(model, config, tensors)
        self._take_in(adapter_name, config, tensors, directory, is_trainable, autocast_adapter_dtype)
        if packed:
            pack(model, adapter_name)
            note_key(model, adapter_name, key)

    def _take_in(
        self,
        name: str,
        config: PeftConfig,
        tensors: Mapping[str, Tensor],
        origin: Path,
        is_trainable: bool,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Attach an adapter with these tensors, inactive, or put them into the one that is attached."""
        model = self.get_base_model()
        if name in self.peft_config:
            for site in inject.record(model).plans[name].sites:
                scales = [config.method(called).scale for called in (site.path, site.weight)]
                if site.method.scale not in scales:
                    raise StateError(
                        f"{origin} has the scale {scales[0]} at {site.weight}, and the attached adapter {name!r} has {site.method.scale}, with which these "
                        "numbers mean something else; load it with hotswap=True, which takes that into account, or under a name of its own"
                    )
            files.load(model, name, tensors, origin, shared=config.writes_shared)
            return
        config.inference_mode = not is_trainable
        self._attach(name, config, fresh=False, autocast_adapter_dtype=autocast_adapter_dtype)
        try:
            files.load(model, name, tensors, origin, shared=config.writes_shared)
        except BaseException:
            self.delete_adapter(name)
            raise
        if is_trainable:
            inject.record(model).trainable.add(name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        dataset: str | None = None,
        tags: Sequence[str] = (),
        commit_message: str = "Upload adapter",
        **options: Any,
    ) -> str:
        """Upload the adapters and their model cards to the hub; returns the commit's address, or the pull request's.

        A card that is on the hub already keeps its words; the section between Veneer's marks is written anew.

        Args:
            repo_id: `owner/name`; made, and private, where there is no such repository.
            metrics: {name: value} for the card, as `trainer.evaluate()` returns it.
            dataset: the name of the data that the metrics are of.
            tags: for the card, beside the method's.
            commit_message: the commit's first line.
            options: `private=False` makes a new repository public; `revision`, `create_pr`, `token`, `commit_description`.

        Raises:
            ConfigError: a metric that is no finite number; nothing was sent.
        """
        from .cards import push_with_cards

        about = {"metrics": dict(metrics or {}), "dataset": dataset, "tags": tuple(tags)}
        cards = [self._card(name, repo_id=repo_id, **about) for name in self.peft_config]
        return push_with_cards(repo_id, self.save_pretrained, cards, commit_message=commit_message, **options)

    # What the base model's own method would not do right for adapters

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


def _blank(cls: type[PeftModel], base: type[nn.Module]) -> PeftModel:
    new: Any = with_signature(cls, base)
    return new.__new__(new)
