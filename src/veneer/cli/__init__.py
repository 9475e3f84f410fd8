"""The command line: parse, one library call, print.

`veneer --help` imports nothing but argparse; a command's own arguments are added only when it is the one that was asked for. Results go to stdout, everything
else to stderr. Exit codes: 0 ok, 1 failed, 2 usage, 3 a problem with the data.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import ConfigError, DataError, TargetError, VeneerError, suggest

COMMANDS = {
    "train": "fine-tune a pretrained model on pictures",
    "predict": "name the classes of new pictures",
    "eval": "hold a finished run against labelled pictures",
    "info": "show what an adapter would adapt in a model, or what an adapter does to one",
    "export": "write an adapter for other programs",
    "convert": "write an adapter as plain LoRA, or in another program's format",
    "merge": "write a model with an adapter in its weights",
    "combine": "add, scale and take away adapters: a weighted sum of them as one",
    "doctor": "say what an adapter is, and whether and how it loads",
    "demo": "fine-tune the bundled model on real handwritten digits",
    "run": "run a script that imports peft, with Veneer in its place",
}


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the command in `argv` only."""
    top = argparse.ArgumentParser(
        prog="veneer", description="Fine-tune a frozen model through thin trainable layers.", epilog="veneer COMMAND --help tells more."
    )
    top.add_argument("--version", action="version", version=f"veneer {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False)
        if name == next((a for a in argv if not a.startswith("-")), None):
            module = import_module(f".{name}", __name__)
            module.add_arguments(command, argv)
            if getattr(module, "COMMON_OPTIONS", True):
                command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
                command.add_argument("--verbose", action="store_true", help="show what other libraries say")
                command.add_argument(
                    "--debug", action="store_true", help="show where in the program an error came up (as VENEER_DEBUG=1 does)"
                )
            command.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Before torch is imported: on a busy machine, threads that spin at OpenMP's barriers make small operations many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = ("--debug" in argv and argv[0] != "run") or os.environ.get("VENEER_DEBUG", "0") not in ("", "0")
    try:
        top = parser(argv)
        args, unknown = top.parse_known_args(argv)
        if unknown:
            raise ConfigError(_unknown(top, args.command, unknown[0]))
        return int(args.run(args) or 0)
    except VeneerError as e:
        _say(str(e), debug)
        return 3 if isinstance(e, DataError) else 2 if isinstance(e, (ConfigError, TargetError)) else 1
    except KeyboardInterrupt as e:
        _say("; ".join(["interrupted", *map(str, e.args)]), debug)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        _say(str(e), debug)
        return 1
    except Exception as e:  # the last door: whatever it is, a person gets a sentence, a script its exit code, and --debug the traceback
        first = (str(e).strip().splitlines() or [""])[0]
        _say(f"unexpected {type(e).__name__}: {first} (--debug shows where)", debug)
        return 1


def _say(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"veneer: {message}", file=sys.stderr)


def _unknown(top: argparse.ArgumentParser, command: str, argument: str) -> str:
    """What to say of an argument that a command does not have."""
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    flags = [f for a in commands.choices[command]._actions for f in a.option_strings]
    name = argument.partition("=")[0]
    return f"{command} has no argument {name}.{suggest(name, flags)} `veneer {command} --help` lists them."
