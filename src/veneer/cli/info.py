"""`veneer info`: the plan for a model, and the words that name its layers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..config import CONFIG_NAME
from .train import add_method_options


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """A model, a method, and its options."""
    parser.add_argument("model", metavar="MODEL", help="a folder or a name on the hub, of a transformers model; 'demo' for the bundled one")
    parser.add_argument("--method", help="how to adapt it (default lora)", default="lora")
    add_method_options(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Plan, and print."""
    from ..integrations.skeletons import skeleton
    from ..planning import plan
    from ..vision.models import source
    from ..vision.network import hub_reachable
    from ..vision.quiet import quieten
    from ..vision.settings import resolve
    from ..vocabulary import target_names

    quieten(args.verbose)
    if (Path(args.model) / CONFIG_NAME).is_file():
        from .doctor import tell

        return tell(args.model, None, as_json=args.json)
    given = {k: v for k, v in vars(args).items() if k not in ("command", "run", "model", "json", "verbose", "debug")}
    config = resolve(given).adapter_config()
    place = source(args.model)
    model = skeleton(place, local_files_only=not Path(place).is_dir() and not hub_reachable())
    made, names = plan(model, config), target_names(model)
    size = sum(p.numel() for p in model.parameters())
    if args.json:
        print(json.dumps({"model": args.model, "class": type(model).__name__, "parameters": size, **made.to_dict(), **names.to_dict()}))
        return 0
    print(
        f"{args.model}: {type(model).__name__}, {size:,} parameters\n\n{config.facts().title}, {made.trainable / size:.2%} trainable\n{made}\n\n{names}"
    )
    return 0
