"""What Python's import system asks for `peft`: the modules, whether there are any, and the version of the distribution."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ...config import FORMAT_VERSION
from ...errors import suggest
from .names import MODULES, absent, why_absent

NAME = "peft"


class StandIn(ModuleType):
    """A module of `peft` whose names are Veneer's, resolved on first use."""

    def __getattr__(self, name: str) -> Any:
        below = self.__name__.removeprefix(NAME).removeprefix(".")
        table = MODULES[below]
        if name == "__all__":
            return sorted(table)
        if name in table:
            home, _, attribute = table[name].partition(":")
            value = getattr(import_module(home), attribute or name)
        elif f"{below}.{name}".removeprefix(".") in MODULES:
            value = import_module(f"{self.__name__}.{name}")
        else:
            raise AttributeError(why_absent(below, name) + ("" if name.startswith("_") else suggest(name, table)))
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES[self.__name__.removeprefix(NAME).removeprefix(".")]})


class _StandInLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name, "Veneer in the place of HF PEFT.")

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == NAME:
            module.__dict__["__version__"] = FORMAT_VERSION


class Metadata(importlib.metadata.Distribution):
    """The metadata of a distribution called `peft`, whose version is that of the format."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {FORMAT_VERSION}\nSummary: Veneer in the place of HF PEFT\n",
            "top_level.txt": f"{NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class PeftFinder(MetaPathFinder):
    """Finds `peft`, before any that is installed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != NAME:
            return None
        below = fullname.removeprefix(NAME).removeprefix(".")
        if below in MODULES:
            # The way of a package, so that what lies below is looked for here too.
            return ModuleSpec(fullname, _StandInLoader(), origin="veneer", is_package=True)
        parent, _, last = below.rpartition(".")
        if absent(parent, last):
            # `from peft import name` comes here for a name that the module does not have; an error from here is what its user reads.
            raise ImportError(why_absent(parent, last), name=fullname)
        raise ModuleNotFoundError(f"Veneer stands in for peft here, and has no module {fullname}", name=fullname)

    def find_distributions(self, context: Any = None) -> Iterable[Metadata]:
        """The distribution, where `importlib.metadata` asks for it or for all."""
        name = getattr(context, "name", None)
        return [Metadata()] if name is None or name.lower() == NAME else []
