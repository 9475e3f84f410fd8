"""Write docs/methods.md and the tables of README.md: `python scripts/make_docs.py`, or with --check only say whether they are up to date."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

from veneer.config import BiasConfig, PeftConfig, config_classes
from veneer.layers.kinds import KINDS
from veneer.layers.parameter import ParameterKind

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods.md"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

INTRODUCTION = """# Methods

*Generated from the methods' own facts by `scripts/make_docs.py`; `make docs` checks that it is up to date.*

`W` is the frozen weight as an (out × in) map, `W'` what the adapted layer acts as. Of a convolution, `in` counts the channels of one group times
the kernel; an embedding is the map of one-hot vectors, so its `in` is the number of rows and its `out` their length. b is a block's size, r a rank, m a number
of butterfly factors, n a number of frequencies.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows]]) + "\n"


def methods_page() -> str:
    """docs/methods.md."""
    rows = []
    classes = sorted(config_classes().values(), key=lambda c: (c.facts().year, c.facts().title))
    for cls in classes:
        f = cls.facts()
        paper = f"[arXiv:{f.arxiv}](https://arxiv.org/abs/{f.arxiv}), {f.equation_number}, {f.year}"
        rows.append(
            [
                f.title,
                f"`{cls.__name__}`",
                f"`{f.equation}`",
                paper,
                f"`{f.parameters}`",
                "yes" if f.mergeable else "no",
                f"{f.learning_rate:g}",
            ]
        )
    kinds = [k.name for k in KINDS] + [
        f"bare {ParameterKind.name}s: `nn.MultiheadAttention`'s projections, stacks of expert weights, any matrix (`target_parameters`)"
    ]
    parts = [
        INTRODUCTION,
        table(["method", "configuration", "equation", "paper", "trainable parameters of a layer", "merges", "learning rate here"], rows),
        "DoRA (`LoraConfig(use_dora=True)`, [arXiv:2402.09353](https://arxiv.org/abs/2402.09353), eq. 5) is a combinator over any Δ: "
        "`W' = diag(m / ‖W + Δ‖)·(W + Δ)`, `out` parameters more.\n",
        "## Layer kinds\n\nEvery method works on every kind:\n",
        "\n".join(f"- {k}" for k in kinds) + "\n",
        "In a convolution with groups, each group of outputs sees its own channels through the same columns, so the groups share what acts on columns.\n",
        "## Options\n\nThose that all configurations share stand in `PeftConfig`'s own documentation; these are each method's own.\n",
    ]
    shared = {f.name for f in dataclasses.fields(PeftConfig)}
    for cls in classes:
        own = [f for f in dataclasses.fields(cls) if f.name not in shared]
        parts.append(f"### {cls.facts().title}\n")
        parts.append(table(["option", "default", "meaning"], [[f"`{f.name}`", f"`{default(f)}`", meaning(cls, f.name)] for f in own]))
    return "\n".join(parts)


def default(f: dataclasses.Field) -> str:
    """A field's default value as text."""
    return repr(f.default_factory() if f.default is dataclasses.MISSING else f.default)  # type: ignore[misc]  # one of the two is there


def meaning(cls: type[PeftConfig], option: str) -> str:
    """An option's line in the nearest docstring that has one."""
    for c in cls.__mro__:
        lines = (c.__doc__ or "").splitlines()
        for i, line in enumerate(lines):
            if line.strip().startswith(f"{option}: "):
                text = line.strip().removeprefix(f"{option}: ")
                for more in lines[i + 1 :]:
                    if not more.startswith(" " * 12):
                        break
                    text += " " + more.strip()
                if c is BiasConfig and issubclass(cls, BiasConfig):
                    text = text.replace('("lora_only" and so on)', f'("{cls.BIAS_ONLY}")')
                return text.replace("|", "\\|")
    raise SystemExit(f"{cls.__name__}.{option} has no line in Args")


def speed_table() -> str:
    """The training step's table, from the result file that the benchmark wrote."""
    found = json.loads((RESULTS / "step-cpu.json").read_text(encoding="utf-8"))
    options, versions = found["options"], found["versions"]
    rows = []
    for row in found["rows"]:
        sides = [row["veneer"], row.get("peft")]
        times = [f"{r['time']:.2f} ({r['low']:.2f}–{r['high']:.2f})" if r else "" for r in sides]
        rows.append([row["case"], *times, *(f"{r['saved']:.2f}" if r else "" for r in sides)])
    note = (
        f"ViT-base, {options['layers']} blocks, batch {options['batch']}, {options['dtype']}; {found['hardware']}; torch {versions['torch']}. Time of a training step, "
        "and bytes kept for backward, as multiples of the same model frozen with the gradient carried through every block; "
        "medians and quartiles of ratios, interleaved in one process.\n"
    )
    return (
        table(["all six linears of each block", "time, Veneer", "time, HF PEFT 0.21.2", "memory, Veneer", "memory, HF PEFT"], rows)
        + "\n"
        + note
    )


def mixed_table() -> str:
    """The table of batches with an adapter for each sample, likewise."""
    found = json.loads((RESULTS / "many-adapters-cpu.json").read_text(encoding="utf-8"))
    options, versions = found["options"], found["versions"]
    rows = []
    for row in found["rows"]:
        sides = {name: r for name, r in row.items() if isinstance(r, dict)}
        rows += [[row["case"], name, f"{r['time']:.2f} ({r['low']:.2f}–{r['high']:.2f})"] for name, r in sides.items()]
    note = (
        f"ViT-base, {options['layers']} blocks, batch {options['batch']}, float32; {found['hardware']}; torch {versions['torch']}. Time of a forward as multiples "
        "of the same batch with one adapter of the same method; medians and quartiles of ratios, interleaved in one process.\n"
    )
    return table(["a batch with", "adapters", "time"], rows) + "\n" + note


def filled(text: str, name: str, content: str) -> str:
    """The text with what stands between a pair of markers replaced."""
    begin, end = f"<!-- {name}: generated by scripts/make_docs.py -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise SystemExit(f"README.md has lost the markers of its {name} table: {begin} … {end}")
    return re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n\n{content}\n{end}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = README.read_text(encoding="utf-8")
    for name, content in {"speed": speed_table(), "mixed": mixed_table()}.items():
        readme = filled(readme, name, content)
    pages = {METHODS: methods_page(), README: readme}
    for path, page in pages.items():
        if not check:
            path.write_text(page, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            sys.exit(f"{path} is out of date; run python scripts/make_docs.py")


if __name__ == "__main__":
    main()
