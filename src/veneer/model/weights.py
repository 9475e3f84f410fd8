"""Adapters in the weights, and out of them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import inject
from .wrapper import Wrapper

if TYPE_CHECKING:
    from .. import merging


class WithWeights(Wrapper):
    """Merging and unmerging."""

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        safe: bool = False,
        originals_device: str | torch.device | None = None,
    ) -> merging.MergeReport:
        """Write the active adapters, or the named ones, into the weights, until `unmerge_adapter`; returns what rounding took from each weight.

        Packed weights are packed again with their own settings.

        Args:
            adapter_names: merge these; they become the active ones.
            safe_merge: look at every merged weight first, and merge none if one has NaN or infinite numbers; always so where a weight is packed.
            safe: the same, by its shorter name.
            originals_device: where the original weights are kept until then, such as "cpu"; None leaves them where they are.

        Raises:
            ConfigError: a device that cannot hold them.
            StateError: an unknown name, merged already, numbers that are not finite, or a bias that has no place; the model is as it was.
        """
        from .. import merging

        return merging.merge(self.get_base_model(), names=adapter_names, safe=safe or safe_merge, originals_device=originals_device)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        from .. import merging

        merging.unmerge(self.get_base_model())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        safe: bool = False,
        report: merging.MergeReport | None = None,
    ) -> nn.Module:
        """The base model with the active adapters (or the named ones) in its weights and without Veneer.

        Args:
            progressbar: show how far it is.
            safe_merge: refuse to write NaN or infinite numbers; always so where a weight is packed.
            safe: the same, by its shorter name.
            report: a `MergeReport()`, which gets what rounding took from each weight.

        Raises:
            StateError: the merged weights would not be finite; the model is as it was.
        """
        from .. import merging

        return merging.merge_and_unload(
            self.get_base_model(), names=adapter_names, safe=safe or safe_merge, progress=progressbar, report=report
        )

    def unload(self) -> nn.Module:
        """The untouched base model."""
        from .. import merging

        merging.unmerge(self.get_base_model())
        return inject.detach(self.get_base_model())
