"""`import peft` resolves to Veneer: what is there, what is not, what it says, and when it is too late; scripts run as python runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

NAMES = """
import importlib, importlib.metadata, importlib.util, sys
import veneer
module = veneer.as_peft()
import peft
assert module is peft is veneer.as_peft() and "torch" not in sys.modules
assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2" and importlib.util.find_spec("peft") is not None
assert [d.version for d in importlib.metadata.distributions(name="peft")][0] == "0.21.2"
from peft import LoraConfig, PeftModel, get_peft_model
assert LoraConfig is veneer.LoraConfig and get_peft_model is veneer.get_peft_model

from veneer.integrations.peft.names import MODULES, PUBLIC
for below, table in MODULES.items():
    found = importlib.import_module("peft." + below if below else "peft")
    for name in table:
        assert getattr(found, name) is not None
        assert name in dir(found)
assert not hasattr(peft, "XLoraModel") and hasattr(peft, "LoKrConfig")
for name in sorted(PUBLIC - set(MODULES[""])):
    assert not hasattr(peft, name)
    for statement, kind in [(f"from peft import {name}", ImportError), (f"peft.{name}", AttributeError)]:
        try:
            exec(statement)
        except kind as e:
            assert f"peft.{name} is not part of Veneer" in str(e), e
        else:
            raise AssertionError(name)
for statement, kind, text in [
    ("from peft import LoraConfi", ImportError, "LoraConfi"),
    ("peft.LoraConfi", AttributeError, 'Did you mean "LoraConfig"'),
    ("import peft.nothing", ModuleNotFoundError, "has no module peft.nothing"),
    ("from peft import LoraModel", ImportError, "Veneer has no class for each method"),
    ("from peft.utils.hotswap import check_hotswap_configs_compatible", ImportError, "hotswap_adapter checks it"),
    ("from peft.tuners import XLoraConfig", ImportError, "is not part of Veneer"),
    ("peft.PrefixTuningConfig(num_virtual_tokens=2)", ValueError, "Veneer adapts weights"),
]:
    try:
        exec(statement)
    except kind as e:
        assert text in str(e), e
    else:
        raise AssertionError(statement)
"""

LATE = """
import veneer
try:
    import peft  # HF PEFT
    {more}
    veneer.as_peft()
except veneer.StateError as e:
    print(e)
"""


def python(code: str, environment: dict[str, str], *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_names_of_hf_peft_are_veneers_or_say_why_not(run, packages_without_peft):
    python(NAMES, run.environment())
    python(NAMES, run.environment(packages_without_peft), "-S")


def test_the_list_of_public_names_is_that_of_the_installed_hf_peft(run):
    code = "import peft; from veneer.integrations.peft.names import PUBLIC; print(PUBLIC ^ set(peft.__all__))"
    assert python(code, run.environment()).strip() == "set()"


def test_what_transformers_trl_and_diffusers_import_is_there(run):
    """Every `from peft… import …` in their sources, by reading them: each name is there, or absent with a text of its own."""
    code = """
import ast, importlib.util, pathlib
import veneer; veneer.as_peft()
seen, absent = 0, set()
for library in ("transformers", "accelerate", "trl", "diffusers"):
    for path in pathlib.Path(importlib.util.find_spec(library).submodule_search_locations[0]).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "peft" in text else ():
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "peft":
                for name in node.names:
                    seen += 1
                    try:
                        exec(f"from {node.module} import {name.name}")
                    except ImportError as e:
                        assert "is not part of Veneer" in str(e), e
                        absent.add(f"{node.module}.{name.name}")
print(seen, sorted(absent))
"""
    seen, _, absent = python(code, run.environment()).strip().partition(" ")
    assert int(seen) > 50
    # Each is imported where it is used, and says what to do.
    assert set(ast_list(absent)) <= {
        "peft.utils.hotswap.check_hotswap_configs_compatible",
        "peft.utils.hotswap.hotswap_adapter_from_state_dict",
        "peft.utils.other.fsdp_auto_wrap_policy",
    }


def ast_list(text: str) -> list[str]:
    import ast

    return ast.literal_eval(text)


def test_it_is_refused_when_hf_peft_is_imported_already(run):
    assert "peft is imported already in this process, from" in python(LATE.format(more="pass"), run.environment())


def test_it_is_refused_when_a_library_has_found_that_there_is_none(run, packages_without_peft):
    code = "import veneer, transformers.trainer_utils\ntry:\n    veneer.as_peft()\nexcept veneer.StateError as e:\n    print(e)"
    said = python(code, run.environment(packages_without_peft), "-S")
    assert "transformers.trainer_utils has found already that there is no peft" in said
    early = "import transformers; from transformers.utils import is_peft_available as a; print(a()); import veneer; veneer.as_peft(); print(a())"
    assert python(early, run.environment(packages_without_peft), "-S").split() == ["False", "True"]


SCRIPT = """
import pickle, sys
from dataclasses import dataclass
import helper
from peft import LoraConfig
@dataclass
class Point:
    x: int = 0
assert pickle.loads(pickle.dumps(Point(3))) == Point(3) and __name__ == "__main__" and __file__ == sys.argv[0]
print(LoraConfig.__module__, sys.argv[1:], helper.value)
def stop():
    raise KeyError("of the script")
if "--fail" in sys.argv:
    stop()
sys.exit(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1])
"""


@pytest.mark.parametrize(
    ("arguments", "code", "errors"),
    [
        (["7", "--json"], 7, ""),
        (["0", "--debug"], 0, ""),
        (["a message"], 1, "a message\n"),
        (["0", "--fail"], 1, "KeyError: 'of the script'\n"),
    ],
)
def test_run_is_python_for_the_script(run, tmp_path, arguments, code, errors):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("value = 'beside it'")
    command = [sys.executable, "-m", "veneer", "run", str(tmp_path / "script.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=run.environment())
    assert (done.returncode, done.stdout) == (code, f"veneer.methods.lora {arguments} beside it\n")
    assert done.stderr.endswith(errors) and "veneer" not in done.stderr
    if "--fail" in arguments:
        plain = subprocess.run([sys.executable, *command[4:]], capture_output=True, text=True, env=run.environment())
        # HF PEFT imports torchao, which says on some machines which of its extensions it cannot load.
        traceback = plain.stderr[plain.stderr.index("Traceback") :]
        assert (plain.returncode, traceback) == (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["nothing.py"], "nothing.py is not a file"), (["--json", "s.py"], "run has no argument --json"), ([], "script")],
)
def test_run_says_what_is_wrong_with_its_own_arguments(run, arguments, text):
    done = subprocess.run([sys.executable, "-m", "veneer", "run", *arguments], capture_output=True, text=True, env=run.environment())
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
