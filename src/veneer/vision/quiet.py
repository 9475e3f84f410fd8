"""Keep other libraries' chatter off a person's terminal."""

from __future__ import annotations

import logging
import os


def quieten(verbose: bool = False) -> None:
    """Show Veneer's own notes, and of other libraries errors only; with `verbose`, everything."""
    logger = logging.getLogger("veneer")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if verbose else logging.WARNING)
        logger.propagate = False
    if verbose:
        return
    # Packages that are imported later warn on import of their own compiled parts and of what torch will change.
    for all_others in (logging.getLogger(), logging.getLogger("torch")):
        all_others.setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    disable_progress_bars()
