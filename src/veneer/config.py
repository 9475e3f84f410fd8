"""Adapter configurations: the base class, the registry, strict reading and writing of `adapter_config.json`.

A configuration is a dataclass whose fields are the format's own names. Nothing here imports torch, so the command line can list every
method's options cheaply. Every value that Veneer cannot honour is refused by name: the format's usual reader warns and goes on, which is how
adapters come to be trained as something else than their file says.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from .errors import AdapterFileError, ConfigError, suggest
from .peft_type import PeftType, add_name

if TYPE_CHECKING:
    from torch import Tensor

    from .form import Form
    from .methods.base import Facts, Method, Schedule

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = "0.21.2"
"""The release of the public format that files are written for."""
PREFIX = "base_model.model."
"""What every key of an adapter's file begins with."""
OF_PARTS = "+PARTS"
"""Behind `peft_type` in the file of an adapter of parts of fused layers: readers that know no parts would load the rest of it without a word."""


class TaskType(StrEnum):
    """What the model is for; decides which head names count as heads."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")

HEADS_OF_TASK = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}

_OTHER_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}
"""Fields that Veneer does not have → the format's own default, which changes nothing."""

C = TypeVar("C", bound="PeftConfig")

_REGISTRY: dict[str, type[PeftConfig]] = {}


def register(config: type[C]) -> type[C]:
    """Make a method's configuration known under its `PEFT_TYPE`, and let it be built from all of the format's fields."""
    _REGISTRY[config.PEFT_TYPE] = config
    add_name(config.PEFT_TYPE)
    build = config.__init__

    @functools.wraps(build)
    def from_fields(self: C, *args: Any, **values: Any) -> None:
        known = {"peft_type", *_OTHER_DEFAULTS, *type(self).REFUSED} - {f.name for f in dataclasses.fields(self)}
        _drop_foreign(type(self), values, known, type(self).__name__)
        build(self, *args, **values)

    setattr(config, "__init__", from_fields)  # noqa: B010  # mypy allows no assignment to a method
    return config


def _drop_foreign(target: type[PeftConfig], values: dict[str, Any], foreign: set[str], origin: str) -> None:
    """Take fields that a configuration does not have out of `values`, where they ask for nothing.

    Raises:
        ConfigError: one asks for something that would not happen.
    """
    for name in foreign & set(values):
        value = values.pop(name)
        if value and _OTHER_DEFAULTS.get(name) != value and not (name == "peft_type" and value == target.PEFT_TYPE):
            why = target.REFUSED.get(name)
            reason = f" ({why})" if why else suggest(name, [f.name for f in dataclasses.fields(target)])
            raise ConfigError(f"{origin}: {name}={value!r} is not supported for {target.PEFT_TYPE}{reason}")


def config_classes() -> dict[str, type[PeftConfig]]:
    """Every method's configuration class by `peft_type`, in alphabetical order.

    >>> "LORA" in config_classes()
    True
    """
    # By name: the methods know this module, and it must not know them.
    import_module(f"{__package__}.methods").discover()
    return dict(sorted(_REGISTRY.items()))


@dataclass(kw_only=True)
class PeftConfig:
    """What every adapter configuration has; use a method's own class, or `from_pretrained`.

    Args:
        task_type: a `TaskType`, or None.
        base_model_name_or_path: the frozen model; filled in on saving.
        revision: the base model's revision on the hub.
        inference_mode: load for inference: nothing requires grad.
        target_modules: which layers: a regular expression for the whole dotted name, a list of names or suffixes, "all-linear",
            or None for the attention's query and value. Names of older transformers releases and role words (`attention`, `mlp`, `attention.query` ...)
            are understood too; when the adapter is attached they are replaced here by the names of today, which every reader of the file knows.
        exclude_modules: names (or one regular expression) to leave out; wins over `target_modules`.
        layers_to_transform: only these layer numbers; with a list of targets only.
        layers_pattern: the name of the list that holds the numbered layers.
        modules_to_save: modules to train whole and to keep beside the adapter, such as a new classification head.
        fused_layouts: where the parts of fused layers lie, for modules that Veneer does not know: name of the layer → its parts, as a list of names of equal width,
            as {name: rows}, or as {"groups": n, "parts": …} where the parts repeat in n groups of rows, such as heads.
        target_parameters: names or suffixes of weights to adapt that belong to no layer of a known kind, such as `experts.gate_up_proj`.

    Raises:
        ConfigError: a value that cannot be used, named, with what to do.
    """

    PEFT_TYPE: ClassVar[str] = ""
    REFUSED: ClassVar[dict[str, str]] = {}
    """Fields of the format that Veneer knows and does not implement → why, or what to use instead."""
    NAMING: ClassVar[tuple[str, ...]] = ()
    """Fields of this method alone that name some of the targets."""

    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    fused_layouts: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.task_type is not None:
            if self.task_type not in list(TaskType):
                raise ConfigError(
                    f"task_type: {self.task_type!r} is not one of {', '.join(TaskType)}.{suggest(str(self.task_type), TaskType)}"
                )
            self.task_type = TaskType(self.task_type)
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):
                setattr(self, name, sorted(value))
            elif isinstance(value, tuple):
                setattr(self, name, list(value))
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name}: expected a list of names, got the string {value!r}; write [{value!r}]")
        if self.fused_layouts is not None:
            self.fused_layouts = {name: checked_layout(name, said) for name, said in self.fused_layouts.items()}
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError("layers_to_transform works with a list of target_modules; with a regular expression, put the numbers into it")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern says where layers_to_transform counts; give layers_to_transform too")

    @property
    def peft_type(self) -> PeftType:
        """The method's name in the format, such as `"LORA"`."""
        return PeftType(self.PEFT_TYPE)

    @property
    def is_prompt_learning(self) -> bool:
        """Always False; other code of the field asks."""
        return False

    @property
    def bias(self) -> str:
        """Which of the base model's biases train: "none", "all" or "…_only"."""
        return "none"

    @classmethod
    def facts(cls) -> Facts:
        """The facts that the method declares about itself."""
        raise ConfigError(f"{cls.__name__} is not a method; use LoraConfig, or PeftConfig.from_pretrained to read a file")

    @property
    def combinators(self) -> list[Facts]:
        """The facts of what the method is combined with; nothing for most configurations."""
        return []

    def method(self, path: str) -> Method:
        """The method with the numbers that hold for the layer at `path`."""
        raise ConfigError(f"{type(self).__name__} is not a method; use LoraConfig, or PeftConfig.from_pretrained to read a file")

    def shared(self, forms: list[Form]) -> dict[str, Tensor]:
        """Constants that all the adapter's layers share, by their key in the file; none for most methods.

        Args:
            forms: of every layer that will be adapted.
        """
        return {}

    @property
    def writes_shared(self) -> bool:
        """Whether the file holds the shared constants, or they are drawn again from their seed."""
        return False

    def schedule(self) -> Schedule | None:
        """What the method does around every step of the optimiser; None for most methods."""
        return None

    def with_rank(self, rank: int) -> Self:
        """The same configuration with one rank for every layer.

        Raises:
            ConfigError: the method has no rank that can grow.
        """
        raise ConfigError(f"{self.PEFT_TYPE} has no rank that zeros could fill up; adapters of equal shapes need no preparation")

    def set_total_steps(self, steps: int) -> None:
        """Tell a schedule how long the training will be, where its configuration does not say so."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, `peft_type` included."""
        return {"peft_type": self.peft_type, **dataclasses.asdict(self)}

    def to_json(self, *, of_parts: bool = False) -> str:
        """The text of `adapter_config.json`: sorted keys and lists, the same bytes in every run.

        Args:
            of_parts: the adapter has parts of fused layers, which other readers must refuse.
        """
        values = self.to_dict() | {"peft_version": FORMAT_VERSION, "inference_mode": True}
        values["peft_type"] += OF_PARTS if of_parts else ""
        for name in ("target_parameters", "fused_layouts"):
            if values[name] is None:
                del values[name]  # fields that most configurations of the format do not have
        for name in _LISTS:
            if isinstance(values.get(name), list):
                values[name] = sorted(values[name])
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a directory."""
        from .disk import write_atomically

        write_atomically(Path(save_directory), {CONFIG_NAME: self.to_json().encode()})

    def push_to_hub(self, repo_id: str, *, commit_message: str = "Upload configuration", **options: Any) -> str:
        """Upload `adapter_config.json` alone to the hub, with the options of `PeftModel.push_to_hub`; returns the commit's address."""
        from .pushing import push

        return push(repo_id, lambda staging, _: self.save_pretrained(staging), commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **hub: Any) -> PeftConfig:
        """Read `adapter_config.json` from a directory or from the hub.

        Raises:
            AdapterFileError: no such file, or not JSON.
            ConfigError: a method or a value that Veneer does not have.
        """
        from .disk import locate

        return cls.read(locate(pretrained_model_name_or_path, **hub))

    @classmethod
    def read(cls, directory: Path) -> PeftConfig:
        """Read `adapter_config.json` from a local directory."""
        path = directory / CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AdapterFileError(
                f"{directory} has no {CONFIG_NAME}; an adapter's directory holds it beside adapter_model.safetensors"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise AdapterFileError(f"{path} is not JSON ({e}); save the adapter again, or restore the file") from None
        if not isinstance(values, dict):
            raise AdapterFileError(f"{path} holds {type(values).__name__}, not a JSON object")
        return cls.from_dict(values, origin=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, origin: str = "configuration") -> PeftConfig:
        """Build the right configuration class from the format's fields.

        A field that this release does not know is harmless when its value is null, false, empty or zero, and an error otherwise: it
        asks for something that would not happen.
        """
        values = dict(values)
        peft_type = values.pop("peft_type", None)
        classes = config_classes()
        if peft_type is None:
            raise ConfigError(f"{origin} has no peft_type; add one of {', '.join(classes)}")
        peft_type = str(getattr(peft_type, "value", peft_type)).removesuffix(OF_PARTS)
        if peft_type not in classes:
            raise ConfigError(f"{origin}: the method {peft_type!r} is not one of {', '.join(classes)}.{suggest(peft_type, classes)}")
        target = classes[peft_type]
        if cls is not PeftConfig and not issubclass(target, cls):
            raise ConfigError(
                f"{origin} is of {peft_type}, which {target.__name__} reads, not {cls.__name__}; use PeftConfig.from_pretrained"
            )
        _drop_foreign(target, values, set(values) - {f.name for f in dataclasses.fields(target) if f.init}, origin)
        return target(**values)


def matches(targets: str | list[str] | None, path: str) -> bool:
    """Whether a target names the module at `path`: a string is a regular expression for the whole path, a list holds names or suffixes.

    >>> matches(["q_proj"], "layers.0.q_proj"), matches(["head"], "my_head"), matches(r".*\\.q", "a.q")
    (True, False, True)
    """
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == t or path.endswith("." + t) for t in targets)


def checked_layout(name: str, said: Any) -> dict[str, Any]:
    """Where the parts of a fused layer lie, as {"groups": n, "parts": names of equal parts, or [name, rows] pairs}: an order that JSON's sorted keys keep."""
    whole = said if isinstance(said, dict) and "parts" in said else {"parts": said}
    groups, parts = whole.get("groups", 1), whole["parts"]
    pairs = list(parts.items()) if isinstance(parts, dict) else list(parts) if isinstance(parts, (list, tuple)) else []
    names = [p if isinstance(p, str) else p[0] for p in pairs]
    widths = [p[1] for p in pairs if not isinstance(p, str)]
    if not names or len(set(names)) < len(names) or len(widths) not in (0, len(names)) or not all(str(n).isidentifier() for n in names):
        raise ConfigError(
            f"fused_layouts[{name!r}]: a list of different names, {{name: rows}}, or {{'groups': n, 'parts': …}}, got {said!r}; for example ['q', 'k', 'v']"
        )
    for number, what in [(groups, "groups"), *((w, "rows") for w in widths)]:
        check_whole(f"fused_layouts[{name!r}]: {what}", number)
    return {"groups": groups, "parts": [list(p) for p in pairs] if widths else names}


def check_probability(name: str, value: float) -> None:
    """Refuse what is no probability below 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}: a probability from 0 up to (not including) 1, got {value!r}")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: a whole number of at least {least}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is not one of the choices."""
    if not any(value is c or (value == c and type(value) is type(c)) for c in choices):
        raise ConfigError(
            f"{name}: {value!r} is not one of {', '.join(map(str, choices))}.{suggest(str(value), [str(c) for c in choices])}"
        )


@dataclass(kw_only=True)
class BiasConfig(PeftConfig):
    """A configuration that can train the base model's own biases as well.

    Args:
        bias: which biases of the base train: "none", "all", or those of the adapted layers only ("lora_only" and so on).
    """

    BIAS_ONLY: ClassVar[str] = ""
    """The method's own word for the biases of adapted layers."""

    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bias", self.bias, ("none", "all", self.BIAS_ONLY))


@dataclass(kw_only=True)
class PatternConfig(PeftConfig):
    """A configuration whose rank and alpha may differ from layer to layer.

    Args:
        r: the rank.
        rank_pattern: {layer name or regular expression: rank}.
        alpha_pattern: {layer name or regular expression: alpha}.
    """

    r: int = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in (self.rank_pattern or {}).items())]:
            check_whole(name, rank)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}

    def with_rank(self, rank: int) -> Self:
        return dataclasses.replace(self, r=rank, rank_pattern={})


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that names `path` (whole, as a suffix, or as a regular expression), or `default`.

    >>> pattern_value({"q_proj": 4}, "layers.0.q_proj", 8), pattern_value({"q_proj": 4}, "layers.0.v_proj", 8)
    (4, 8)
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration that a dictionary of the format's fields describes, `peft_type` among them.

    Raises:
        ConfigError: a method or a value that Veneer does not have.

    >>> get_peft_config({"peft_type": "LORA", "r": 4}).r
    4
    """
    return PeftConfig.from_dict(config_dict)
