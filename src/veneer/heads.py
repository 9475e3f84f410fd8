"""Which modules of a model are its head, and which of them have never been trained.

transformers marks every parameter that came from a checkpoint (`_is_hf_initialized`), and leaves the mark off those it had to make up: absent
from the file, or of another shape because the label set changed. Reading the marks needs no list of head names. A model that carries no mark at
all was not loaded from a checkpoint, so nothing can be said about it.
"""

from __future__ import annotations

from torch import nn

from .layers.swap import own_parameters

_MARK = "_is_hf_initialized"


def head_modules(model: nn.Module) -> list[str]:
    """Paths of the modules outside the backbone of a transformers model with a head; empty for a plain module.

    Only the outermost modules that hold parameters are named.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or getattr(model, prefix, None) in (None, model):
        return []
    return [name for name, child in model.named_children() if name != prefix and next(child.parameters(), None) is not None]


def new_modules(model: nn.Module) -> list[str]:
    """Paths of the innermost modules with a parameter that no checkpoint gave; empty unless the model was loaded from one."""
    parameters = dict(own_parameters(model))
    if not any(getattr(p, _MARK, False) for p in parameters.values()):
        return []
    return list(dict.fromkeys(name.rpartition(".")[0] for name, p in parameters.items() if not getattr(p, _MARK, False)))


def new_heads(model: nn.Module) -> tuple[list[str], list[str]]:
    """(heads to train because they are new, other modules that are new and will stay as they are)."""
    new = new_modules(model)
    heads = [h for h in head_modules(model) if any(n == h or n.startswith(h + ".") for n in new)]
    return heads, [n for n in new if not any(n == h or n.startswith(h + ".") for h in heads)]
