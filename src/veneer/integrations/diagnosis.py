"""What there is to say of an adapter, and how it is said."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Diagnosis:
    """What was found; printing it shows a few lines.

    Args:
        adapter: where it is.
        method: its `peft_type`.
        base: the model that it names as its base.
        written_for: the release of the format's own library that its configuration names.
        options: numbers of the method, and what is not at its default.
        targets: the names of the adapted layers.
        whole: whole modules inside, such as a new head → their numbers.
        labels: how many classes a head inside has.
        tensors, parameters, types: of the file.
        spelling: how its tensors are called, where that is not the usual way.
        problems: what is wrong with the files.
        model: the class of the model that it was tried on; empty if none was asked for.
        loads: "as it is", "by translation", "no", or None if no model was asked for.
        layers: how many layers it adapts there.
        renamed: tensors that go by another name there, {in the file: in the model}.
        reason: why it does not load.
    """

    adapter: str
    method: str | None = None
    base: str | None = None
    written_for: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    targets: str | list[str] | None = None
    whole: dict[str, int] = field(default_factory=dict)
    labels: int | None = None
    tensors: int = 0
    parameters: int = 0
    types: list[str] = field(default_factory=list)
    spelling: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    model: str = ""
    loads: str | None = None
    layers: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with the files and, if a model was asked for, it loads there."""
        return not self.problems and self.loads != "no"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, and `ok`."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        options = ", ".join(k if v is True else f"{k}={v}" for k, v in self.options.items())
        lines = [
            ("adapter", self.adapter),
            ("method", ": ".join(s for s in (self.method or "not named", options) if s)),
            ("base", self.base or "not named"),
            ("format", f"of peft {self.written_for}" if self.written_for else "of an early release: the configuration names no version"),
            ("targets", ", ".join(self.targets) if isinstance(self.targets, list) else str(self.targets)),
            ("tensors", f"{self.tensors}, {self.parameters:,} numbers, {', '.join(self.types)}" if self.tensors else "none could be read"),
            ("whole", ", ".join(f"{name} ({n:,} numbers)" for name, n in self.whole.items()) or "no head and no other whole module inside"),
            *(("names", text) for text in self.spelling),
            *(("problem", text) for text in self.problems),
        ]
        if self.loads:
            example = next(iter(self.renamed.items()), None)
            how = f": {len(self.renamed)} of {self.tensors} tensors, such as {example[0]} → {example[1]}" if example else ""
            lines.append(
                ("loads", f"no: {self.reason}" if self.loads == "no" else f"{self.loads}, on {self.layers} layers of {self.model}{how}")
            )
        return "\n".join(f"{name:8} {text}" for name, text in lines)
