"""The command line: parse, one library call, print.

`veneer --help` imports nothing but argparse; a command's own arguments are added only when it is the one that was asked for. Results go to stdout, everything
else to stderr. Exit codes: 0 ok, 1 failed, 2 usage, 3 a problem with the data.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import ConfigError, DataError, VeneerError

COMMANDS = {
    "train": "fine-tune a pretrained model on pictures",
    "predict": "name the classes of new pictures",
    "eval": "hold a finished run against labelled pictures",
    "demo": "fine-tune the bundled model on real handwritten digits",
}


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command in `argv` only."""
    top = argparse.ArgumentParser(
        prog="veneer", description="Fine-tune a frozen model through thin trainable layers.", epilog="veneer COMMAND --help tells more."
    )
    top.add_argument("--version", action="version", version=f"veneer {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in argv:
            module = import_module(f".{name}", __name__)
            module.add_arguments(command, argv)
            command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
            command.add_argument("--verbose", action="store_true", help="show what other libraries say, and Python's traceback on an error")
            command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--verbose" in argv or bool(os.environ.get("VENEER_DEBUG"))
    try:
        args = parser(argv).parse_args(argv)
        return int(args.run(args) or 0)
    except VeneerError as e:
        if debug:
            raise
        print(f"veneer: {e}", file=sys.stderr)
        return 3 if isinstance(e, DataError) else 2 if isinstance(e, ConfigError) else 1
    except KeyboardInterrupt:
        print("veneer: interrupted; `veneer train --resume RUN` goes on with a run", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
