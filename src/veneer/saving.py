"""An adapter's directory, written whole: tensors, configuration, what a schedule has learnt, and the card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .cards import Card
from .config import CONFIG_NAME
from .disk import write_atomically
from .files import STATE_NAME, WEIGHTS_NAME, serialise


def write_adapter(
    target: Path,
    config: str,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    card: Card,
    labels: Mapping[str, bytes | None] | None = None,
) -> None:
    """Write one adapter's directory; files already there are replaced whole or not at all.

    Args:
        config: the text of its configuration.
        state: what a schedule has learnt; empty for none.
        labels: the file of label names (see `files.names_to_write`).
    """
    content: dict[str, bytes | None] = {WEIGHTS_NAME: serialise(tensors), CONFIG_NAME: config.encode(), **(labels or {})}
    content[STATE_NAME] = serialise(state) if state else None
    for name, value in content.items():
        if value is None and (target / name).is_file():
            # That of an adapter which is about to be replaced would be taken for this one's.
            (target / name).unlink()
    write_atomically(target, {n: value for n, value in content.items() if value is not None} | card.beside(target))
