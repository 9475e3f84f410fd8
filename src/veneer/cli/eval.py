"""`veneer eval`: accuracy of a finished run on labelled pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """A run, labelled pictures, and where the report goes."""
    parser.add_argument("run_directory", metavar="RUN", help="a run's folder, or an adapter's")
    parser.add_argument("data", help="labelled pictures, in any form that `veneer train` reads")
    parser.add_argument("--output", metavar="FOLDER", help="write the per-class table and the confusion matrix into this folder")
    parser.add_argument("--image-column", metavar="NAME", help="the column of a table or data set that holds pictures")
    parser.add_argument("--label-column", metavar="NAME", help="the column that holds labels")
    parser.add_argument("--device", help="such as cpu or cuda:1; by default a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print."""
    from pathlib import Path

    from ..vision.evaluation import evaluate
    from ..vision.quiet import quieten
    from ..vision.report import per_class_table, write_report

    quieten(args.verbose)
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    found = evaluate(args.run_directory, args.data, device=args.device, **columns)
    if args.output:
        write_report(found, Path(args.output))
        print(f"report in {args.output}", file=sys.stderr)
    for s in found.skipped:
        print(f"left out: {s.source}: {s.reason}", file=sys.stderr)
    if args.json:
        skipped = [{"source": s.source, "reason": s.reason} for s in found.skipped]
        more = {"part": found.part, "classes": found.per_class(), "skipped": skipped}
        print(json.dumps(found.metrics() | more, ensure_ascii=False))
        return 0
    low, high = found.interval
    print(per_class_table(found))
    part = "" if found.part == "all" else f"{found.part} "
    print(f"\n{part}accuracy {found.accuracy:.1%} (95 % interval {low:.1%} – {high:.1%}, {found.total} pictures)")
    return 0
