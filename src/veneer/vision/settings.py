"""One typed schema of a training run: the command line's flags, a YAML file's keys and the arguments of `veneer.vision.train` are its fields.

A method's own options are the fields of its configuration class, found through the registry, so a new method brings its options along. Every value knows
where it came from: built-in, method preset, configuration file, or command line (argument).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..config import PeftConfig, config_classes
from ..errors import ConfigError, suggest

BUILT_IN, PRESET, FILE, GIVEN = "built-in", "method preset", "config file", "command line"

# Options of a configuration that the application sets itself, or that describe a file.
_NOT_OPTIONS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}


class TrainSettings(BaseModel):
    """How to train; a method's own options come on top."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    model: str = Field(
        "google/vit-base-patch16-224-in21k", description="the pretrained model: a name on the hub, a folder, or 'demo' for the bundled one"
    )
    method: str = Field("lora", description="how to adapt it")
    name: str | None = Field(None, description="the run's name; by default DATA-METHOD-NUMBER")
    output: Path = Field(Path("runs"), description="the folder that runs are put in")
    epochs: float = Field(10, gt=0, description="passes over the training pictures")
    batch_size: int = Field(32, ge=1, description="pictures in a step, per device")
    eval_batch_size: int = Field(64, ge=1, description="pictures in an evaluation batch, per device")
    accumulate: int = Field(1, ge=1, description="steps whose gradients are added up before the weights change")
    learning_rate: float = Field(5e-3, gt=0, description="AdamW's peak learning rate; each method has its own preset")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="the share of the steps over which the learning rate rises")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="probability mass spread over the other classes")
    patience: int = Field(5, ge=0, description="stop after so many epochs without a better validation score; 0 never stops early")
    augment: Literal["none", "light", "standard"] = Field(
        "standard", description="none; light: small shifts, turns and zooms; standard: random resized crop and mirror image"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto takes bf16 where the device is fast at it")
    seed: int = Field(0, ge=0, description="of the split, the head, the order and the augmentation")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="the share split off for validation when the data have no validation part")
    image_column: str | None = Field(None, description="the column of a table or data set that holds pictures")
    label_column: str | None = Field(None, description="the column that holds labels")
    workers: int | None = Field(
        None, ge=0, description="processes that read pictures; 0 reads them in the main process; by default up to 4 for many pictures"
    )
    trackers: list[str] = Field([], description="experiment trackers to report to, such as tensorboard or wandb")


@dataclass(frozen=True)
class Resolved:
    """The settings of one run, the method's options, and where every value came from."""

    settings: TrainSettings
    options: dict[str, Any]
    origins: dict[str, str]

    @property
    def config_class(self) -> type[PeftConfig]:
        """The method's configuration class."""
        return method_class(self.settings.method)

    def adapter_config(self) -> PeftConfig:
        """The adapter's configuration."""
        return self.config_class(**self.options)

    def table(self) -> dict[str, dict[str, Any]]:
        """{name: {"value": …, "origin": …}} of everything."""
        values = self.settings.model_dump(mode="json") | self.options
        return {name: {"value": value, "origin": self.origins[name]} for name, value in values.items()}


def method_class(method: str) -> type[PeftConfig]:
    """The configuration class of a method by its name on the command line.

    >>> method_class("lora").__name__
    'LoraConfig'
    """
    classes = {name.lower(): cls for name, cls in config_classes().items()}
    if method.lower() not in classes:
        raise ConfigError(f"method: {method!r} is not one of {', '.join(classes)}.{suggest(method, classes)}")
    return classes[method.lower()]


def option_fields(cls: type[PeftConfig]) -> dict[str, dataclasses.Field[Any]]:
    """The options of a method that a user may set, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in _NOT_OPTIONS}


def option_default(field: dataclasses.Field[Any]) -> Any:
    """The default of an option."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def resolve(given: Mapping[str, Any], *, file: str | Path | None = None, given_from: str = GIVEN) -> Resolved:
    """Settings from the built-in values, the method's presets, a configuration file and what was given, the later over the earlier.

    Args:
        given: values by name, of `TrainSettings` or of the method's configuration.
        file: a YAML file with the same names.
        given_from: the name of the origin of `given`.

    Raises:
        ConfigError: an unknown name, with the nearest ones, or a value that cannot be used.
    """
    from_file = read_yaml(Path(file)) if file is not None else {}
    method = str({**from_file, **given}.get("method", TrainSettings.model_fields["method"].default))
    cls = method_class(method)
    own = TrainSettings.model_fields
    options = option_fields(cls)
    values: dict[str, Any] = {n: f.default for n, f in own.items()} | {n: option_default(f) for n, f in options.items()}
    origins = dict.fromkeys(values, BUILT_IN)
    for origin, layer in (
        (PRESET, {"learning_rate": cls.facts().learning_rate, **cls.facts().preset}),
        (FILE, from_file),
        (given_from, given),
    ):
        for name, value in layer.items():
            if name not in values:
                where = f" in {file}" if origin == FILE else ""
                raise ConfigError(f"unknown setting {name!r}{where} for method {method}.{suggest(name, values)}")
            values[name], origins[name] = value, origin
    hints = get_type_hints(cls)
    checked = {n: _checked(n, hints[n], values[n]) for n in options}
    try:
        settings = TrainSettings(**{n: values[n] for n in own})
    except ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r} ({origins[str(first['loc'][0])]})"
        ) from None
    resolved = Resolved(settings, checked, origins)
    resolved.adapter_config()
    return resolved


def _checked(name: str, hint: Any, value: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as e:
        raise ConfigError(f"{name}: {e.errors()[0]['msg']}, got {value!r}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings as a dictionary; a run's own `settings.yaml` is one too."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(e).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; it should hold names and values, such as 'epochs: 5'")
    return {str(k).replace("-", "_"): v for k, v in values.items()}
