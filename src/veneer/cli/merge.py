"""`veneer merge`: a model with an adapter in its weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """An adapter, its base, and where the model goes."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="an adapter's folder, its name on the hub (owner/name), or one .safetensors file of LyCORIS or kohya",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the model is written; new, or empty")
    parser.add_argument("--model", help="the base model, where the adapter does not say it: a folder or a name on the hub")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as the base model's are stored)"
    )
    parser.add_argument("--device", help="where it is computed (default cpu)")
    parser.add_argument("--prefix", help="of one file for several models, which it is, such as lora_unet")


def run(args: argparse.Namespace) -> int:
    """Merge, and say where it is."""
    from ..integrations.merged_models import save_merged
    from ..vision.models import device_named, source
    from ..vision.network import hub_reachable
    from ..vision.quiet import quieten

    quieten(args.verbose)
    model = None if args.model is None else source(args.model)
    device = None if args.device is None else device_named(args.device)
    local = not hub_reachable()
    done = save_merged(
        args.adapter, args.out, model, dtype=args.dtype, device=device, prefix=args.prefix, progress=not args.json, local_files_only=local
    )
    print(json.dumps(done.to_dict()) if args.json else done)
    return 0
