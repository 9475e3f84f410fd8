"""`veneer run`: a script as `python` would run it, with Veneer in the place of HF PEFT."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

COMMON_OPTIONS = False
"""What stands behind the script's name is the script's, so there is no room for options of ours."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """The script, and everything behind its name, which is the script's own."""
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")


def run(args: argparse.Namespace) -> int:
    """Run the script; its errors and its exit code are its own."""
    from pathlib import Path

    from ..errors import ConfigError
    from ..integrations.peft import as_peft

    if not Path(args.script).is_file():
        raise ConfigError(f"{args.script} is not a file; give the path of a Python script")
    as_peft()
    return _run(args.script, args.arguments)


def _run(script: str, arguments: Sequence[str]) -> int:
    """As `python script arguments`: a new `__main__`, the script's folder first on the path, its own traceback."""
    import io
    import os
    import types

    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__)
    sys.modules["__main__"] = main
    sys.argv[:] = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # noqa: PTH100,PTH120  # the very string that python puts there
    try:
        with io.open_code(script) as f:
            code = compile(f.read(), script, "exec")
        exec(code, main.__dict__)
    except Exception as e:
        # Without the frames of this file, as if python itself had run the script.
        e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next
        sys.excepthook(type(e), e, e.__traceback__)
        return 1
    return 0
