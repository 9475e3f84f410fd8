"""`veneer doctor`: what an adapter is, and whether it loads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """An adapter, and the model it is for."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder, or its name on the hub (owner/name)")
    parser.add_argument(
        "--model", help="also say whether it loads on this model: a folder or a name on the hub; 'demo' for the bundled one"
    )


def run(args: argparse.Namespace) -> int:
    """Look, and print."""
    from ..vision.quiet import quieten

    quieten(args.verbose)
    return tell(args.adapter, args.model, as_json=args.json)


def tell(adapter: str, model: str | None, *, as_json: bool) -> int:
    """Print what there is to say of an adapter; 0 if nothing is wrong with it."""
    from ..integrations.doctor import diagnose
    from ..vision.models import source
    from ..vision.network import hub_reachable

    found = diagnose(adapter, None if model is None else source(model), local_files_only=not hub_reachable())
    print(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else found)
    return 0 if found.ok else 1
