"""The names of what a head tells apart: an adapter with a head of its own keeps its own, and the model's configuration says those of the head that runs.

transformers reads them in many places: losses read their number, pipelines their names. So switching writes them into the model's own configuration instead of keeping
them beside it. On disk they are a list in a file of its own, which other readers of the format leave alone; of a new field in `adapter_config.json` they would warn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .errors import AdapterFileError
from .heads import head_modules
from .layers.swap import ADAPTERS

LABELS_NAME = "labels.json"
"""A list of label names in the order of a head's outputs."""


@dataclass(frozen=True)
class Said:
    """What a model's configuration says of its labels.

    Args:
        names: by output.
        numbers: outputs by name.
        problem: what kind of loss they have, which transformers finds out at the first loss.
        count: the number that the model itself keeps; None where it keeps none.
    """

    names: dict[int, str]
    numbers: dict[str, int]
    problem: str | None
    count: int | None


@dataclass
class Labels:
    """Whose labels the configuration says, and what it says of the others; None stands for the base model."""

    shown: str | None = None
    said: dict[str | None, Said] = field(default_factory=dict)

    def of_base(self, model: nn.Module) -> Said | None:
        """What is said of the base model; None for a model without labels."""
        return _saying(model) if self.shown is None else self.said[None]

    def give(self, model: nn.Module, name: str, names: Mapping[int, str]) -> None:
        """Note an adapter's label names."""
        base = self.of_base(model)
        assert base is not None
        self.said[name] = Said(dict(names), {n: i for i, n in names.items()}, base.problem, None if base.count is None else len(names))
        if self.shown == name:
            _say(model, self.said[name])

    def show(self, model: nn.Module, name: str | None) -> None:
        """Let the configuration say one adapter's labels, or the base model's; what was written into it meanwhile is kept for the one that it was said of."""
        if name != self.shown:
            self.note(model)
            _say(model, self.said[name])
            self.shown = name

    def note(self, model: nn.Module) -> None:
        """Keep what the configuration says now."""
        now = _saying(model)
        if now is not None:
            self.said[self.shown] = now


def _saying(model: nn.Module) -> Said | None:
    config = getattr(model, "config", None)
    names = getattr(config, "id2label", None)
    if not isinstance(names, Mapping) or not names:
        return None
    numbers = dict(getattr(config, "label2id", None) or {})
    names = {int(i): str(name) for i, name in names.items()}
    return Said(names, numbers, getattr(config, "problem_type", None), model.__dict__.get("num_labels"))


def _say(model: nn.Module, said: Said) -> None:
    config: Any = model.config
    config.id2label, config.label2id, config.problem_type = dict(said.names), dict(said.numbers), said.problem
    if said.count is not None:
        model.num_labels = said.count  # type: ignore[assignment]  # transformers keeps a number there


def label_tensors(model: nn.Module, saved: Iterable[str], base: Said | None) -> list[str]:
    """Names of the parameters with one row for each label, in those modules of the model's own head that an adapter keeps whole."""
    if base is None:
        return []
    heads = head_modules(model)
    kept = [p for p in saved if any(p == h or p.startswith(h + ".") for h in heads)]
    found = [(f"{p}.{n}", t) for p in kept for n, t in model.get_submodule(p).named_parameters() if f".{ADAPTERS}." not in f".{n}"]
    return [name for name, t in found if t.dim() and t.shape[0] == len(base.names)]


def chosen(base: Said, outputs: int, own: Mapping[int, str] | None) -> Mapping[int, str]:
    """The names for a head of so many outputs: its file's own, else the base's if they are as many, else transformers' numbered ones."""
    if own is not None:
        return own
    return base.names if len(base.names) == outputs else _numbered(outputs)


def _numbered(n: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(n)}


def read(directory: Path) -> dict[int, str] | None:
    """The label names beside an adapter; None where there are none.

    Raises:
        AdapterFileError: a file that is no list of names.
    """
    path = directory / LABELS_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise AdapterFileError(f"{path} is not JSON ({e}); copy the adapter's folder again, or remove this file") from None
    if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
        raise AdapterFileError(
            f'{path} is no list of label names; write it as ["cat", "dog"], in the order of the head\'s outputs, or remove it'
        )
    return dict(enumerate(found))


def checked(own: Mapping[int, str] | None, outputs: int, directory: Path) -> Mapping[int, str] | None:
    """The label names of a file, if there are as many as outputs.

    Raises:
        AdapterFileError: there are more, or fewer.
    """
    if own is not None and len(own) != outputs:
        raise AdapterFileError(
            f"{directory / LABELS_NAME} names {len(own)} labels, and the head beside it has {outputs} outputs: they are of different trainings; "
            "copy both from one of them, or remove the names"
        )
    return own


def written(names: Mapping[int, str] | None) -> dict[str, bytes]:
    """The file of label names; none where nobody named them."""
    if not names or sorted(names) != list(range(len(names))) or names == _numbered(len(names)):
        return {}
    return {LABELS_NAME: (json.dumps([names[i] for i in range(len(names))], indent=2, ensure_ascii=False) + "\n").encode()}
