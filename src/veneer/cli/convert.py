"""`veneer convert`: an adapter, in another format."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """An adapter, where it goes, and as what."""
    from ..integrations.formats import FORMATS

    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="an adapter's folder, its name on the hub (owner/name), or one .safetensors file of LyCORIS or kohya",
    )
    parser.add_argument("output", metavar="OUT", help="where it is written: a folder, or for lycoris and kohya a .safetensors file")
    parser.add_argument("--model", help="the base model, where the adapter does not say it: a folder or a name on the hub")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()) + " (default: lora; of one file, peft)",
    )
    nearest = parser.add_mutually_exclusive_group()
    nearest.add_argument("--rank", type=int, metavar="N", help="the nearest LoRA of this rank")
    nearest.add_argument("--tolerance", type=float, metavar="T", help="the lowest ranks whose relative error is at most this, such as 0.05")
    parser.add_argument("--uniform", action="store_true", help="one rank for all layers, for readers that know no rank_pattern")
    parser.add_argument("--prefix", help="in such a file, which model of a pipeline it is of, such as lora_unet")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was lost."""
    from ..integrations.exporting import rewrite
    from ..vision.models import source
    from ..vision.network import hub_reachable
    from ..vision.quiet import quieten

    quieten(args.verbose)
    model = None if args.model is None else source(args.model)
    options = {
        "to": args.to,
        "rank": args.rank,
        "tolerance": args.tolerance,
        "uniform": args.uniform,
        "prefix": args.prefix,
        "progress": not args.json,
    }
    done = rewrite(args.adapter, args.output, model, **options, local_files_only=not hub_reachable())
    print(json.dumps(done.to_dict()) if args.json else done)
    return 0
