"""`veneer predict`: classes of new pictures, on the terminal or into a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """A run, pictures, and where the answers go."""
    parser.add_argument("run_directory", metavar="RUN", help="a run's folder, or an adapter's")
    parser.add_argument("images", metavar="PICTURE", nargs="+", help="files, folders and glob patterns")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to give for each picture (default 3)")
    parser.add_argument("--output", metavar="FILE", help="write the answers to FILE.csv, .json, .jsonl or .parquet")
    parser.add_argument("--device", help="such as cpu or cuda:1; by default a GPU if there is one")


def run(args: argparse.Namespace) -> int:
    """Predict, and print or write."""
    from ..vision.answers import check_suffix, rows, write

    if args.top < 1:
        raise ConfigError(f"top: at least one class is given, got {args.top}")
    if args.output:
        check_suffix(args.output)
    from ..vision.prediction import predict
    from ..vision.quiet import quieten
    from ..vision.report import table

    quieten(args.verbose)
    answers = predict(args.run_directory, args.images, top=args.top, device=args.device)
    unread = [a for a in answers if a.error]
    if args.output:
        write(args.output, answers)
        print(f"{len(answers) - len(unread)} answers in {args.output}", file=sys.stderr)
    if args.json:
        print(json.dumps({"run": args.run_directory, "pictures": rows(answers)}, ensure_ascii=False))
    elif not args.output:
        shown = [[str(a.path), *[x for label, p in a.top for x in (label, f"{p:.1%}")]] for a in answers if not a.error]
        print(table(["picture", *[h for i in range(len(shown[0]) // 2) for h in (f"class {i + 1}", "")]], shown))
    for a in unread:
        print(f"not read: {a.path}: {a.error}", file=sys.stderr)
    return 0
