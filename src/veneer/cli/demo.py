"""`veneer demo`: the main job on real digits, with nothing to download."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Where the demo puts its files."""
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where pictures and runs are put (default demo/)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")


def run(args: argparse.Namespace) -> int:
    """Run the demo."""
    from ..vision.demo import run_demo
    from ..vision.quiet import quieten

    quieten(args.verbose)
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        scores = run_demo(args.folder, seed=args.seed)
    if args.json:
        found = [{"name": s.name, "accuracy": s.accuracy, "interval": s.interval, "seconds": s.seconds} for s in scores]
        print(json.dumps({"folder": str(args.folder), "scores": found}))
    return 0
