"""A model with an adapter in its weights, as a directory that needs no Veneer."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..disk import built_atomically, refuse_taken
from ..errors import AdapterFileError, ConfigError
from ..inject import adapted_modules
from .bases import held

_SLOW = 500_000_000
"""Parameters from which merging takes more than a few seconds."""
_PROCESSORS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*preprocessor_config.json", "processor_config.json",
    "chat_template*", "*.model", "*.tiktoken", "*.spm",
)  # fmt: skip
"""The small files of tokenizers and processors."""


@dataclass(frozen=True)
class SavedModel:
    """A merged model on disk.

    Args:
        output: its directory.
        model: its class.
        parameters: how many it has.
        layers: how many were changed.
        dtype: of its weights.
        files: what was written.
    """

    output: str
    model: str
    parameters: int
    layers: int
    dtype: str
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.output}: {self.model}, {self.parameters:,} parameters in {self.dtype}, {self.layers} layers changed; {', '.join(self.files)}"


def save_merged(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    model: str | None = None,
    *,
    dtype: str | None = None,
    device: Any = None,
    prefix: str | None = None,
    progress: bool = False,
    **hub: Any,
) -> SavedModel:
    """Write the base model with an adapter in its weights, and the files of its tokenizer or image processor, as a new directory.

    Args:
        adapter: a directory, `owner/name` on the hub, or one `.safetensors` file of LyCORIS's or kohya's.
        output: a directory that is not there yet, or empty; it appears whole or not at all.
        model: the base model's folder or name; None for the one that the adapter names.
        dtype: of the weights, such as "bfloat16"; as they are stored if None.
        device: where it is computed.
        prefix: which model of a pipeline such a file is for, as for `load_lycoris`.
        progress: show how far it is, where it takes long.
        hub: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        AdapterFileError: the output is taken, no adapter there, or one that does not fit the model.
        ConfigError: no base model is known.
        StateError: the merged weights would not be finite, or a bias has no place; nothing was written.
    """
    target = Path(output)
    refuse_taken(target)
    with held(adapter, model, prefix=prefix, dtype=dtype, device=device, **hub) as it:
        assert it.base is not None
        network: Any = it.model.get_base_model()
        size = sum(p.numel() for p in network.parameters())
        layers = sum(1 for _ in adapted_modules(network))
        merged: Any = it.model.merge_and_unload(progressbar=progress and size > _SLOW, safe_merge=True)
        if not hasattr(merged, "save_pretrained"):
            raise ConfigError(f"{type(merged).__name__} has no save_pretrained, so it cannot be written as a model's directory")
        if progress and size > _SLOW:
            print(f"writing {size:,} parameters to {target}", file=sys.stderr, flush=True)
        with built_atomically(target) as staging:
            for source in [Path(it.base), *([it.directory] if it.directory else [])]:
                _copy_processor(source, it.base, staging, hub)
            merged.save_pretrained(staging)
            files = sorted(p.name for p in staging.iterdir())
    kind = str(next(merged.parameters()).dtype).removeprefix("torch.")
    return SavedModel(str(target), type(merged).__name__, sum(p.numel() for p in merged.parameters()), layers, kind, files)


def _copy_processor(source: Path, base: str, target: Path, hub: dict[str, Any]) -> None:
    """The small files beside a model's weights: tokenizer, processor, chat template; the adapter's own win over the base's."""
    folder = source if source.is_dir() else _snapshot(base, hub)
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _PROCESSORS):
            shutil.copyfile(path, target / path.name)


def _snapshot(name: str, hub: dict[str, Any]) -> Path:
    """The folder of a hub model's small files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    known = {k: v for k, v in hub.items() if k in ("token", "cache_dir", "local_files_only")}
    try:
        return Path(snapshot_download(name, allow_patterns=list(_PROCESSORS), ignore_patterns=["*/*"], **known))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise AdapterFileError(f"the tokenizer and processor files of {name} could not be fetched: {str(e).strip().splitlines()[0]}") from e
