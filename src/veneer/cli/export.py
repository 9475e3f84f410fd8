"""`veneer export`: an adapter, written for other programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """An adapter, a format, and where it goes."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder, or its name on the hub (owner/name)")
    parser.add_argument(
        "--format", choices=["peft"], default="peft", help="peft: the public format without parts of fused layers (default)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where it is written")
    parser.add_argument("--model", help="the base model, where the adapter does not say it: a folder or a name on the hub")


def run(args: argparse.Namespace) -> int:
    """Export, and say how."""
    from ..integrations.exporting import rewrite
    from ..vision.models import source
    from ..vision.network import hub_reachable
    from ..vision.quiet import quieten

    quieten(args.verbose)
    model = None if args.model is None else source(args.model)
    how = rewrite(args.adapter, args.output, model, to="peft", local_files_only=not hub_reachable()).how
    said = {"as LoRA": "as one LoRA of each fused layer, with equal outputs", "as it is": "as it is, by today's module names"}[how]
    print(json.dumps({"output": args.output, "how": how}) if args.json else f"{args.output}: {said}")
    return 0
