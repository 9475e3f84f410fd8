"""`PeftType`: the methods' names in the format, as values that code of the field compares, lists and reads `.value` of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .errors import suggest

# Every method that the public format names, known here so that a comparison with one that Veneer lacks is simply false.
_FORMAT = """
PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT ADAPTION_PROMPT IA3 BEFT LILY LOHA LOKR OFT POLY
LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA HRA VBLORA UNILORA CPT MISS RANDLORA ROAD TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF
DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING DEFT
"""
_NAMES = dict.fromkeys(_FORMAT.split())


def add_name(name: str) -> None:
    """Make a method's name a `PeftType`; an enumeration would be closed to methods that come later."""
    _NAMES.setdefault(name)


class _Members(type):
    """What makes `PeftType.LORA`, `list(PeftType)` and `"LORA" in PeftType` work, as with an enumeration."""

    def __getattr__(cls, name: str) -> Any:
        if name in _NAMES:
            return cls(name)
        raise AttributeError(f"PeftType has no member {name!r}.{suggest(name, _NAMES)}")

    def __iter__(cls) -> Iterator[Any]:
        return (cls(name) for name in _NAMES)

    def __len__(cls) -> int:
        return len(_NAMES)

    def __contains__(cls, name: object) -> bool:
        return name in _NAMES

    def __getitem__(cls, name: str) -> Any:
        return cls(name)


class PeftType(str, metaclass=_Members):
    """A method's name in the format; equal to the plain string.

    Args:
        name: such as "LORA".

    Raises:
        ValueError: no method is called so.

    >>> PeftType.LORA == "LORA", PeftType.LORA.value, PeftType("LOHA").name
    (True, 'LORA', 'LOHA')
    """

    __slots__ = ()

    def __new__(cls, name: str) -> PeftType:
        if name not in _NAMES:
            raise ValueError(f"{name!r} is not a PeftType.{suggest(str(name), _NAMES)}")
        return super().__new__(cls, name)

    @property
    def name(self) -> str:
        """The name as a plain string."""
        return str(self)

    @property
    def value(self) -> str:
        """The name as a plain string."""
        return str(self)
