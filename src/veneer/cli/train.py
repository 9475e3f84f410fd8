"""`veneer train`: the flags are the fields of `TrainSettings` and of the chosen method's configuration."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any, get_type_hints

from ..config import config_classes
from ..errors import ConfigError
from ..vision.settings import TrainSettings, method_class, option_default, option_fields, read_yaml, resolve
from .values import placeholder, reader


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Data, a configuration file, the schema's flags, and the options of the method that `argv` names."""
    parser.add_argument(
        "data", nargs="?", help="a folder of class folders, or of train/val/test; a CSV or Parquet table; a data set's name"
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings; the command line wins over it")
    parser.add_argument("--resume", metavar="RUN", help="continue an interrupted run, with its own settings")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    settings = parser.add_argument_group("settings")
    for name, field in TrainSettings.model_fields.items():
        default = "" if field.default is None else f" (default {_shown(field.default)})"
        text = f"{field.description}{default}".replace("%", "%%")
        if name == "method":
            text = f"how to adapt it: {', '.join(n.lower() for n in config_classes())} (default {field.default})"
        if name == "learning_rate":
            text = f"{field.description} (default: the method's)"
        _add(settings, name, field.annotation, text)
    add_method_options(parser, argv)


def add_method_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """The options of the method that `argv` names."""
    method = _method(argv)
    cls = method_class(method)
    options = parser.add_argument_group(f"options of {method}", f"{cls.facts().title}: {cls.facts().equation} (arXiv:{cls.facts().arxiv})")
    documented, hints = _option_help(cls), get_type_hints(cls)
    for name, f in option_fields(cls).items():
        text = f"{documented.get(name, '')} (default {_shown(option_default(f))})".strip().replace("%", "%%")
        if isinstance(option_default(f), bool) and f.type == "bool":
            options.add_argument(_flag(name), dest=name, action=argparse.BooleanOptionalAction, help=text, default=argparse.SUPPRESS)
        else:
            _add(options, name, hints[name], text)


def _add(group: Any, name: str, hint: Any, text: str) -> None:
    group.add_argument(_flag(name), dest=name, metavar=placeholder(hint), type=reader(hint), help=text, default=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train, and print what came of it."""
    given = {k: v for k, v in vars(args).items() if k not in ("command", "run", "data", "config", "resume", "json", "verbose", "debug")}
    if (args.data is None) == (args.resume is None):
        raise ConfigError("give the pictures to train on (veneer train photos/), or a run to continue (veneer train --resume runs/NAME)")
    if args.resume and (given or args.config):
        raise ConfigError(f"resume: a run goes on with its own settings, so {_flag(next(iter(given), 'config'))} cannot be given with it")
    resolved = None if args.resume else resolve(given, file=args.config)
    from ..vision import training
    from ..vision.quiet import quieten

    quieten(args.verbose)
    result = training.resume(args.resume, quiet=args.json) if resolved is None else training.start(args.data, resolved, quiet=args.json)
    return _print(result, as_json=args.json) if int(os.environ.get("RANK", 0)) == 0 else 0


def _print(result: Any, *, as_json: bool) -> int:
    from ..vision.report import per_class_table

    if as_json:
        told = {"run": str(result.directory), "adapter": str(result.adapter), "labels": result.labels, "metrics": result.metrics}
        print(json.dumps(told, ensure_ascii=False))
        return 0
    low, high = result.evaluation.interval
    part = "test" if "test_accuracy" in result.metrics else "validation"
    print(per_class_table(result.evaluation))
    print(f"\n{part} accuracy {result.evaluation.accuracy:.1%} (95 % interval {low:.1%} – {high:.1%}, {result.evaluation.total} pictures)")
    print(f"run {result.directory}")
    return 0


def _method(argv: Sequence[str]) -> str:
    """The method that the arguments name, before they are parsed."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--method")
    early.add_argument("--config")
    known, _ = early.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.method:
        return str(known.method)
    from pathlib import Path

    from_file = read_yaml(Path(known.config)).get("method") if known.config else None
    return str(from_file or TrainSettings.model_fields["method"].default)


def _option_help(cls: type) -> dict[str, str]:
    """The lines of the `Args` sections of a configuration's docstrings, by option."""
    found: dict[str, str] = {}
    for c in reversed(cls.__mro__):
        current = None
        for line in (c.__doc__ or "").partition("Args:")[2].partition("Raises:")[0].splitlines():
            name, colon, text = line.strip().partition(":")
            if colon and name.isidentifier() and line.startswith(" " * 8) and not line.startswith(" " * 12):
                current = name
                found[name] = text.strip().rstrip(".")
            elif current and line.strip():
                found[current] += " " + line.strip().rstrip(".")
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return "none" if value is None or value in ([], {}) else str(value)
