"""`veneer combine`: a weighted sum of adapters, as one."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Where it goes, the adapters with their weights, and how they are combined."""
    from ..combining.options import TYPES

    parser.add_argument("output", metavar="OUT", help="where the new adapter is written, a folder")
    parser.add_argument(
        "adapters",
        metavar="ADAPTER[:WEIGHT]",
        nargs="+",
        help="an adapter's folder or its name on the hub, and its weight: task:1 style:0.5 bias:-1 adds, adds half of, and takes away (default 1)",
    )
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="linear",
        help="linear: the exact sum (default); svd: the nearest of a rank, for every method; or pruned first",
    )
    parser.add_argument("--rank", type=int, metavar="N", help="the rank of the result, for svd, the _svd forms and linear")
    parser.add_argument(
        "--density", type=float, metavar="SHARE", help="the share of the numbers that pruning keeps, for ties, dare and magnitude_prune"
    )
    parser.add_argument("--majority", choices=["total", "frequency"], default="total", help="how ties elects signs (default total)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what dare drops (default 0)")
    parser.add_argument("--model", help="the base model, where the adapters do not say it: a folder or a name on the hub")


def run(args: argparse.Namespace) -> int:
    """Combine, and say what came out."""
    adapters = [weighted(text) for text in args.adapters]
    import torch

    from ..integrations.combinations import combine
    from ..vision.models import source
    from ..vision.network import hub_reachable
    from ..vision.quiet import quieten

    quieten(args.verbose)
    torch.manual_seed(args.seed)
    done = combine(
        adapters,
        args.output,
        None if args.model is None else source(args.model),
        combination_type=args.type,
        svd_rank=args.rank,
        density=args.density,
        majority_sign_method=args.majority,
        progress=not args.json,
        local_files_only=not hub_reachable(),
    )
    print(json.dumps(done.to_dict()) if args.json else done)
    return 0


def weighted(text: str) -> tuple[str, float]:
    """An adapter and its weight.

    Raises:
        ConfigError: what stands behind the last colon is no number.

    >>> weighted("adapters/a:-0.5"), weighted("owner/name")
    (('adapters/a', -0.5), ('owner/name', 1.0))
    """
    adapter, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not adapter or not math.isfinite(value):
        raise ConfigError(f"{text}: {weight!r} is no weight; write ADAPTER:NUMBER, such as {adapter or 'adapter'}:0.5")
    return adapter, value
