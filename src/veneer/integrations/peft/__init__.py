"""`import peft` resolves to Veneer, for transformers, accelerate, TRL, diffusers and every script that is written for that package."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

from ...errors import StateError
from .finder import NAME, PeftFinder

# Modules that decide while they are imported whether there is a peft.
_DECIDE_EARLY = (
    "transformers.trainer",
    "transformers.trainer_utils",
    "diffusers.utils.constants",
    "diffusers.utils.import_utils",
    "trl.trainer.utils",
)


def as_peft() -> ModuleType:
    """Make `import peft` give Veneer in this process, whether or not HF PEFT is installed; returns that module.

    Call it before the first import of `peft`, and, where HF PEFT is not installed, before libraries that ask for it. A second call changes nothing.
    Names of HF PEFT that Veneer does not have raise an error where they are used.

    Raises:
        StateError: HF PEFT is imported already, or a library has found already that there is none.

    Example:

        import veneer

        veneer.as_peft()
        from peft import LoraConfig  # is veneer.LoraConfig
    """
    if not any(isinstance(finder, PeftFinder) for finder in sys.meta_path):
        _refuse_too_late()
        sys.meta_path.insert(0, PeftFinder())
    from importlib import import_module

    return import_module(NAME)


def _refuse_too_late() -> None:
    if NAME in sys.modules:
        origin = getattr(sys.modules[NAME], "__file__", None)
        raise StateError(
            f"peft is imported already in this process, from {origin}; call veneer.as_peft() before the first import that needs it"
        )
    if find_spec(NAME) is not None:
        return
    early = [name for name in _DECIDE_EARLY if name in sys.modules]
    if early:
        raise StateError(
            f"{early[0]} has found already that there is no peft; call veneer.as_peft() before importing {early[0].partition('.')[0]}"
        )
    utils = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal"):
        cached = getattr(utils, name, None)
        if cached is not None and hasattr(cached, "cache_clear"):
            cached.cache_clear()
