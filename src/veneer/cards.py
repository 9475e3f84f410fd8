"""The README.md of an adapter: what it is, of which base, how good it is, and how to use it.

A card that is there already, a person's or Trainer's, keeps its words: only the front matter's known fields and one marked section are written anew. Saving leaves a card
without that section alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from .config import PeftConfig, config_classes
from .disk import write_atomically
from .errors import ConfigError
from .front_matter import compose, parse, united
from .inject import record
from .planning import Plan
from .pushing import push
from .usage import library_class, loading, pipeline_of

CARD_NAME = "README.md"
_BEGIN = "<!-- veneer: from here to the end mark, written anew whenever the adapter is saved or pushed -->"
_END = "<!-- veneer: end -->"
_TIMINGS = ("_runtime", "_per_second", "_time")


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Args:
        model: the base model.
        config: the adapter's configuration.
        plan: what is adapted.
        name: the adapter's name.
        parameters: how many the adapter trained.
        total: how many the model has with it.
        of_parts: it adapts parts of fused layers, which only Veneer's files can name.
        repo_id: where the adapter will be, if that is known.
        metrics: {name: value} of an evaluation, as `trainer.evaluate()` returns it; its timings are left out.
        dataset: the name of the data that the metrics are of.
        tags: of the hub, beside the card's own.

    Raises:
        ConfigError: a metric that is no finite number.
    """

    model: nn.Module
    config: PeftConfig
    plan: Plan
    name: str
    parameters: int
    total: int
    of_parts: bool = False
    repo_id: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"metrics[{name!r}]: a finite number, got {value!r}; leave it out, or give float(value)")
        object.__setattr__(self, "metrics", {n.removeprefix("eval_"): v for n, v in self.metrics.items() if not n.endswith(_TIMINGS)})

    @classmethod
    def of(cls, model: nn.Module, name: str, config: PeftConfig, **more: Any) -> Self:
        """The card of an adapter that is attached to a base model."""
        plan = record(model).plans[name]
        parameters = plan.trainable + sum(model.get_parameter(b).numel() for b in plan.biases)
        return cls(model, config, plan, name, parameters, of_parts=any(s.is_part for s in plan.sites), **more)

    @property
    def base(self) -> str | None:
        """The base model's name on the hub, if it has one."""
        name = self.config.base_model_name_or_path
        return None if not name or name.startswith(("/", ".")) or Path(name).exists() else name

    @property
    def title(self) -> str:
        """The heading of a new card; a person may change it, so it says nothing that another training would make wrong."""
        return f"Adapter of {self.base}" if self.base else f"Adapter of a {type(self.model).__name__}"

    def update(self, directory: Path) -> None:
        """Write the card beside the adapter in the directory that it was saved into, or into the card that is there."""
        own = place(directory, self.name)
        write_atomically(own, {CARD_NAME: self.text(_existing(own)).encode()})

    def beside(self, directory: Path) -> dict[str, bytes]:
        """The card as a file to save in the adapter's own directory; none where a person's card without Veneer's marks is."""
        existing = _existing(directory)
        if existing is None:
            return {CARD_NAME: self.text().encode()}
        return {CARD_NAME: self.text(_without_results(existing)).encode()} if _marked(existing) else {}

    def text(self, existing: str | None = None) -> str:
        """The whole card, with what an existing one says elsewhere."""
        fields, body = parse(existing) if existing is not None else ({}, f"# {self.title}\n")
        section = "\n".join([_BEGIN, "", *self._facts(), *self._results(), *self._usage(), _END])
        if _marked(body):
            before, _, rest = body.partition(_BEGIN)
            body = before + section + rest.partition(_END)[2]
        else:
            body = f"{body.rstrip()}\n\n{section}\n"
        return compose(fields | self._front(fields), body)

    def _front(self, old: Mapping[str, Any]) -> dict[str, Any]:
        cls = library_class(self.model)
        own = [self.config.peft_type.lower(), "veneer", *(["transformers"] if cls else []), *self.tags]
        own += [f"base_model:adapter:{self.base}"] if self.base else []
        task = old.get("pipeline_tag") or (pipeline_of(cls.__name__) if cls else None)
        front: dict[str, Any] = {"base_model": self.base, "library_name": "peft", "pipeline_tag": task}
        front["tags"] = sorted(united(old.get("tags"), own))
        front["datasets"] = united(old.get("datasets"), self.dataset)
        front["metrics"] = united(old.get("metrics"), [n for n in self.metrics if n not in ("loss", "epoch")])
        if self.metrics and self.dataset and task:
            found = [{"type": n, "value": v, "name": n} for n, v in self.metrics.items() if n != "epoch"]
            where = {"name": self.dataset, "type": self.dataset}
            front["model-index"] = [
                {
                    "name": (self.repo_id or self.title).rpartition("/")[2],
                    "results": [{"task": {"type": task}, "dataset": where, "metrics": found}],
                }
            ]
        return {k: v for k, v in front.items() if v}

    def _facts(self) -> list[str]:
        methods = [self.config.facts(), *self.config.combinators]
        layers = sorted({".".join(s.path.split(".")[-2 if s.is_part else -1 :]) for s in self.plan.sites})
        rows = {
            "method": "; with ".join(
                f"{m.title}: {m.equation} ([arXiv:{m.arxiv}](https://arxiv.org/abs/{m.arxiv}), {m.equation_number})" for m in methods
            ),
            "options": f"`{', '.join(_chosen(self.config)) or 'all as by default'}`",
            "base model": f"{self.base or 'not on the hub'}, `{type(self.model).__name__}`",
            "adapted": f"{len(self.plan.sites)} weights: {', '.join(f'`{n}`' for n in layers)}",
            "trained whole": ", ".join(f"`{p}`" for p in self.plan.saved),
            "trainable parameters": f"{self.parameters:,} of {self.total:,} ({100 * self.parameters / max(self.total, 1):.2f} %)",
        }
        return ["| | |", "|---|---|", *(f"| {k} | {v.replace('|', chr(92) + '|')} |" for k, v in rows.items() if v), ""]

    def _results(self) -> list[str]:
        if not self.metrics:
            return []
        rows = [f"| {name} | {value:.4g} |" for name, value in self.metrics.items()]
        return [f"## Results{f' on {self.dataset}' if self.dataset else ''}", "", "| metric | value |", "|---|---|", *rows, ""]

    def _usage(self) -> list[str]:
        adapter = self.repo_id or "path/to/this/folder"
        folder = None if self.name == "default" else self.name
        lines = ["## How to use", ""]
        for library, title in (("veneer", "Veneer"), ("peft", "HF PEFT")):
            if library == "peft" and self.of_parts:
                lines += [
                    "HF PEFT has no name for a part of a fused layer. Where the change has a low rank, `model.save_as_lora(directory)` writes it for the",
                    "whole layers, which HF PEFT loads.",
                    "",
                ]
                continue
            code = loading(
                self.model,
                self.base,
                adapter,
                library=library,
                revision=self.config.revision,
                subfolder=folder,
                new_head=bool(self.plan.saved),
            )
            lines += [f"With {title}:", "", "```python", code, "```", ""]
        return lines


def place(directory: Path, name: str) -> Path:
    """Where an adapter of that name is saved: `default` in the directory itself, any other in a folder of its name."""
    return directory if name == "default" else directory / name


def push_with_cards(repo_id: str, save: Callable[[Path], Any], cards: Sequence[Card], **options: Any) -> str:
    """Push what `save` writes, each adapter with its card; a card that is on the hub already keeps its words."""

    def write(staging: Path, repo: str) -> None:
        save(staging)
        for card in cards:
            dataclasses.replace(card, repo_id=repo).update(staging)

    return push(repo_id, write, keep=[(place(Path(), card.name) / CARD_NAME).as_posix() for card in cards], **options)


def _existing(directory: Path) -> str | None:
    path = directory / CARD_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _without_results(card: str) -> str:
    """A card of Veneer's without what another training found, and without the names of methods."""
    fields, body = parse(card)
    methods = {name.lower() for name in config_classes()}
    fields["tags"] = [t for t in united(fields.get("tags")) if t not in methods]
    return compose({k: v for k, v in fields.items() if k not in ("metrics", "model-index")}, body)


def _marked(text: str) -> bool:
    return _END in text.partition(_BEGIN)[2]


def _chosen(config: PeftConfig) -> list[str]:
    """The method's options that are not as by default."""
    general = {f.name for f in dataclasses.fields(PeftConfig)}
    chosen = []
    for f in dataclasses.fields(config):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        value = getattr(config, f.name)
        if f.name not in general and value != default:
            chosen.append(f"{f.name}: {len(value)} entries" if isinstance(value, dict) else f"{f.name}={value!r}")
    return chosen
