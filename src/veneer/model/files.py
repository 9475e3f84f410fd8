"""Adapters in files and on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from .. import files, inject
from ..config import PeftConfig
from ..disk import locate
from ..errors import ConfigError, StateError, suggest
from ..holding import note_key, shelf_key, shelve
from ..shelving import pack
from .adapters import WithAdapters

if TYPE_CHECKING:
    from ..cards import Card
    from ..converting import Conversion


class WithFiles(WithAdapters):
    """Saving, loading, pushing."""

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
        from ..cards import place
        from ..saving import write_adapter

        config = self.peft_config[name]
        tensors = files.entries(self.get_base_model(), name, shared=config.writes_shared)
        if state_dict is not None:
            from ..state_dicts import gathered

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
        from ..converting import convert

        return convert(self, adapter_name or self.active_adapter, rank, tolerance, save_directory=save_directory, uniform=uniform)

    def _card(self, name: str, **more: Any) -> Card:
        from ..cards import Card

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
        from ..foreign import is_foreign, read_foreign
        from ..state_dicts import renamed
        from ..translation import todays

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
        from . import PeftModel

        config.inference_mode = not is_trainable
        wanted = cls.OF_TASK.get(str(config.task_type), cls) if cls is PeftModel else cls
        new = wanted(model, config, name, autocast_adapter_dtype=autocast_adapter_dtype, _fresh=False)
        try:
            files.load(model, name, tensors, origin, shared=config.writes_shared)
        except BaseException:
            inject.detach(model)
            raise
        return new

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
            from ..hotswap import hotswap_adapter

            hotswap_adapter(self, model_id, adapter_name, key_mapping=key_mapping, **hub)
            return
        from ..foreign import is_foreign
        from ..state_dicts import renamed
        from ..translation import todays

        model = self.get_base_model()
        if is_foreign(model_id):
            from ..lycoris import load_lycoris

            load_lycoris(self, model_id, adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype)  # type: ignore[arg-type]  # a PeftModel
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
            files.load(model, name, tensors, origin, shared=config.writes_shared, config=config)
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
        from ..cards import push_with_cards

        about = {"metrics": dict(metrics or {}), "dataset": dataset, "tags": tuple(tags)}
        cards = [self._card(name, repo_id=repo_id, **about) for name in self.peft_config]
        return push_with_cards(repo_id, self.save_pretrained, cards, commit_message=commit_message, **options)
