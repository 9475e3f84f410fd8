"""The rules of the house: arrows point one way, knowledge stays in its place, importing is cheap, public names are documented."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import veneer
from veneer.config import config_classes

SRC = Path(veneer.__file__).parent
FILES = sorted(SRC.rglob("*.py"))

# A module may import from those before it, and from its own package.
ORDER = [
    ["errors", "form", "listing", "autocasting"],
    ["disk", "front_matter", "pushing", "usage", "operators", "inits", "peft_type"],
    ["config"],
    ["methods"],
    ["engine"],
    ["layers"],
    ["heads", "roles", "oldnames"],
    ["naming"],
    ["targets"],
    ["planning", "translation", "vocabulary", "labels", "budget"],
    ["packing"],
    ["laying", "shelf", "reach"],
    ["records"],
    ["shelving"],
    ["inject"],
    ["files", "merging", "cards", "wrapping", "stepping", "explaining", "probing", "mixing"],
    ["conversion", "adapting", "state_dicts", "kbit", "saving"],
    ["status", "hotswap", "converting", "combining", "foreign", "holding"],
    ["lycoris"],
    ["model"],
    ["tasks"],
    ["auto"],
    ["integrations"],
    ["vision"],
    ["cli"],
    ["__main__"],
]
RANK = {name: i for i, names in enumerate(ORDER) for name in names}


def place(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def runtime(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from runtime(child)


def imported_places(path: Path) -> set[str]:
    found = set()
    package = ["veneer", *path.relative_to(SRC).parent.parts]
    for node in runtime(tree(path)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [".".join([*module, a.name]) for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("veneer.") and n.count(".")}
    return found


@pytest.mark.parametrize("path", [f for f in FILES if f != SRC / "__init__.py"], ids=lambda f: str(f.relative_to(SRC)))
def test_imports_point_one_way(path):
    here = place(path)
    assert here in RANK, f"{here} has no place in the order of the house; give it one"
    for other in imported_places(path) - {here}:
        if other in RANK:
            assert RANK[other] < RANK[here], f"{here} imports {other}, which comes after it"


@pytest.mark.parametrize("path", [f for f in FILES if place(f) != "layers"], ids=lambda f: str(f.relative_to(SRC)))
def test_only_layers_know_layer_classes(path):
    plain = {"nn.Module", "nn.Parameter", "torch.nn.Module", "torch.nn.Parameter"}
    for node in runtime(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            classes = {ast.unparse(n) for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            wrong = {c for c in classes - plain if c.startswith(("nn.", "torch.nn."))}
            assert not wrong, f"line {node.lineno}: {wrong}"


@pytest.mark.parametrize("path", [f for f in FILES if place(f) != "methods"], ids=lambda f: str(f.relative_to(SRC)))
def test_nothing_asks_which_method_it_is(path):
    names = {n.lower() for n in config_classes()} | {"dora"}
    for node in runtime(tree(path)):
        if isinstance(node, ast.Compare):
            constants = {str(n.value).lower() for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not constants & names, f"line {node.lineno}: {ast.unparse(node)}"


STORAGES = SRC / "layers" / "storages"


@pytest.mark.parametrize("path", [f for f in FILES if STORAGES not in f.parents], ids=lambda f: str(f.relative_to(SRC)))
def test_only_storages_know_packages_that_pack(path):
    text = path.read_text(encoding="utf-8").lower()
    for package in ("bitsandbytes.", "import bitsandbytes", "bnb", "torchao", "params4bit", "linear4bit", "linear8bit", "int8params"):
        assert package not in text, package


def test_importing_costs_nothing():
    script = "import sys, veneer; from veneer.config import config_classes; config_classes(); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", list(veneer.__all__))
def test_public_names_are_documented(name):
    value = getattr(veneer, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for member, function in inspect.getmembers(value, lambda m: inspect.isfunction(m) or isinstance(m, property)):
            if not member.startswith("_") and function.__module__.startswith("veneer") if inspect.isfunction(function) else False:
                assert inspect.getdoc(function), f"{name}.{member}"


def test_public_list_is_complete():
    assert sorted(veneer.__all__) == veneer.__all__
    for name in veneer.__all__:
        assert getattr(veneer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'LoroConfig'"):
        veneer.LoroConfig  # noqa: B018


@pytest.mark.parametrize("name", config_classes())
def test_every_option_is_documented_and_every_fact_is_stated(name):
    cls = config_classes()[name]
    text = "\n".join(inspect.getdoc(c) or "" for c in cls.__mro__)
    own = {"auto_mapping", "peft_version"}
    for f in dataclasses.fields(cls):
        assert f"{f.name}:" in text or f.name in own, f"{cls.__name__}.{f.name} has no line in Args"
    facts = cls.facts()
    assert facts.arxiv and facts.equation and facts.equation_number and facts.learning_rate > 0


def test_package_data_is_declared():
    assert (SRC / "py.typed").is_file()
