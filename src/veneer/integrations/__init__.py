"""Veneer inside other libraries. Nothing here is imported before the library it serves is."""

from __future__ import annotations

from functools import cache

import wrapt


@cache
def install() -> None:
    """Serve transformers' Trainer now if it is imported, and else as soon as it is."""
    from . import trainer

    wrapt.register_post_import_hook(trainer.install, "transformers.trainer")
