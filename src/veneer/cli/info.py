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
    parser.add_argument(
        "what",
        metavar="MODEL|ADAPTER",
        help="a folder or a name on the hub, of a transformers model ('demo' for the bundled one); or an adapter's folder, or its one .safetensors file",
    )
    parser.add_argument("--model", help="of an adapter: the base model, where the adapter does not say it")
    parser.add_argument("--prefix", help="of one file for several models: which it is, such as lora_unet")
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
    if args.model is not None or args.prefix is not None or _is_adapter(args.what):
        return _adapter(args)
    given = {k: v for k, v in vars(args).items() if k not in ("command", "run", "what", "model", "prefix", "json", "verbose", "debug")}
    config = resolve(given).adapter_config()
    place = source(args.what)
    model = skeleton(place, local_files_only=not Path(place).is_dir() and not hub_reachable())
    made, names = plan(model, config), target_names(model)
    size = sum(p.numel() for p in model.parameters())
    if args.json:
        print(json.dumps({"model": args.what, "class": type(model).__name__, "parameters": size, **made.to_dict(), **names.to_dict()}))
        return 0
    print(
        f"{args.what}: {type(model).__name__}, {size:,} parameters\n\n{config.facts().title}, {made.trainable / size:.2%} trainable\n{made}\n\n{names}"
    )
    return 0


def _is_adapter(what: str) -> bool:
    """Whether it is an adapter's folder, one file of LyCORIS's or kohya's, or an adapter on the hub."""
    if Path(what).is_dir():
        return (Path(what) / CONFIG_NAME).is_file()
    if what.endswith(".safetensors"):
        return True
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from ..vision.network import hub_reachable

    try:
        return bool(hf_hub_download(what, CONFIG_NAME, local_files_only=not hub_reachable()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return False


def _adapter(args: argparse.Namespace) -> int:
    """What an adapter does to its base model."""
    from ..integrations.measuring import measure
    from ..vision.models import source
    from ..vision.network import hub_reachable

    base = None if args.model is None else source(args.model)
    found = measure(args.what, base, prefix=args.prefix, local_files_only=not hub_reachable())
    print(json.dumps(found.to_dict(), ensure_ascii=False) if args.json else found)
    return 0
