"""A run's folder: made exclusively, filled step by step, and honest about how far it came.

`status` in `run.json` is "running", "interrupted", "failed" or "finished"; only a run that has proved itself is finished.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk import write_atomically
from ..errors import ConfigError
from .settings import Resolved, resolve

RUN_NAME, SETTINGS_NAME, METRICS_NAME, EVENTS_NAME = "run.json", "settings.yaml", "metrics.json", "events.jsonl"


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    directory: Path

    @property
    def adapter(self) -> Path:
        """The folder of the best adapter, with everything that predicting needs."""
        return self.directory / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Trainer's checkpoints, the best and the last."""
        return self.directory / "checkpoints"

    def set_status(self, status: str, **more: Any) -> None:
        """Note how far the run came."""
        values = self.state() | {"status": status} | more
        write_atomically(self.directory, {RUN_NAME: _json(values)})
        self.event(status, **more)

    def state(self) -> dict[str, Any]:
        """What is noted about the run."""
        path = self.directory / RUN_NAME
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to `events.jsonl`."""
        with (self.directory / EVENTS_NAME).open("a", encoding="utf-8") as f:
            f.write(json.dumps({"time": round(time.time(), 3), "event": kind, **values}, default=str) + "\n")

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file into the folder."""
        write_atomically(self.directory, {name: _json(values)})

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that is complete: Trainer writes its state last, so one without it was cut short."""
        found = {int(p.name.rpartition("-")[2]): p for p in self.checkpoints.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()}
        return next((found[step] for step in sorted(found, reverse=True) if _is_json(found[step] / "trainer_state.json")), None)

    def write_settings(self, data: str, resolved: Resolved) -> None:
        """`settings.yaml`, which `--config` reads again, and `settings.json` with the origin of every value."""
        import yaml

        values = {name: entry["value"] for name, entry in resolved.table().items()}
        text = f"# data: {data}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_atomically(self.directory, {SETTINGS_NAME: text.encode(), "settings.json": _json({"data": data} | resolved.table())})


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n").encode()


def create(resolved: Resolved, data: str) -> Run:
    """Make a new run's folder; an existing one is never written into.

    Raises:
        ConfigError: the given name is taken, or cannot be a folder's name.
    """
    settings = resolved.settings
    settings.output.mkdir(parents=True, exist_ok=True)
    if settings.name is not None:
        if not re.fullmatch(r"[\w. -]+", settings.name) or settings.name.strip(". ") == "":
            raise ConfigError(f"name: {settings.name!r} cannot be a folder's name; use letters, digits, '-', '_', '.' and spaces")
        names = iter([settings.name])
    else:
        place = Path(data).resolve()
        stem = re.sub(r"[^\w.-]+", "-", place.stem if place.is_file() else place.name).strip("-.") or "data"
        names = (f"{stem}-{settings.method.lower()}-{i}" for i in range(1, 1_000_000))
    for name in names:
        directory = settings.output / name
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        run = Run(directory)
        run.set_status("running", data=data, started=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        run.write_settings(data, resolved)
        return run
    raise ConfigError(
        f"name: there is a run {settings.output / str(settings.name)} already; choose another name, or continue it with --resume"
    )


def reopen(directory: Path) -> tuple[Run, str, Resolved]:
    """A run that was interrupted, with its data and settings.

    Raises:
        ConfigError: no such run, or one that is finished.
    """
    run = Run(directory)
    state = run.state()
    if not state or not (directory / "settings.json").exists():
        raise ConfigError(f"resume: {directory} is not a run's folder (it has no {RUN_NAME} and settings.json)")
    if state["status"] == "finished":
        raise ConfigError(f"resume: {directory} is finished; start a new run, with more epochs if it should train longer")
    table = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
    data = table.pop("data")
    resolved = resolve({name: entry["value"] for name, entry in table.items()})
    origins = {name: entry["origin"] for name, entry in table.items()}
    return run, data, Resolved(resolved.settings, resolved.options, resolved.origins | origins)
