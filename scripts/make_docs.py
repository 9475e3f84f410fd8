"""Write docs/methods.md and the tables of README.md and docs/speed.md: `python scripts/make_docs.py`, or with --check only say whether they are up to date."""

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
SPEED = ROOT / "docs" / "speed.md"
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


def result(name: str) -> tuple[list[dict], str]:
    """The rows that a benchmark wrote, and what was measured on what."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    options = found["options"]
    model = {"vit-base": "ViT-base", "dinov2-large": "DINOv2-large's shape", "llama-2048": "Llama-shaped (d = 2048, 2048 tokens)"}[
        options.get("model", "vit-base")
    ]
    dtype = f"{options.get('dtype', 'float32')}{' under bfloat16 autocast' if options.get('autocast') else ''}{', adapters too' if options.get('narrow') else ''}"
    count = f"{options['layers']} block{'s' if options['layers'] > 1 else ''}"
    return found["rows"], f"{model}, {count}, batch {options['batch']}, {dtype}; {found['hardware']}; torch {found['versions']['torch']}."


def spread(side: dict | None) -> str:
    """A median and its quartiles."""
    return f"{side['time']:.2f} ({side['low']:.2f}–{side['high']:.2f})" if side else ""


def number(side: dict | None, key: str) -> str:
    return f"{side[key]:.2f}" if side and key in side else ""


def speed_table() -> str:
    """The training step's table, from the result file that the benchmark wrote."""
    rows, measured = result("step-cpu")
    header = [
        "all six linears of each block",
        "time, Veneer",
        "time, HF PEFT 0.21.2",
        "kept, Veneer",
        "kept, HF PEFT",
        "peak, Veneer",
        "peak, HF PEFT",
    ]
    cells = [
        [row["case"], *(spread(s) for s in sides), *(number(s, key) for key in ("saved", "peak") for s in sides)]
        for row in rows
        for sides in [(row["veneer"], row.get("peft"))]
    ]
    note = (
        f"{measured} Time of a training step, bytes kept for backward, and how far the process's memory grows in a step, as multiples of the same model frozen with the "
        "gradient carried through every block; medians and quartiles of ratios, interleaved in one process.\n"
    )
    return table(header, cells) + "\n" + note


def steps_table(name: str) -> str:
    """One setting's times, and what they are made of."""
    rows, measured = result(name)
    limited = any("limits" in row for row in rows)
    header = ["", "time", *(["limit"] if limited else []), "HF PEFT", "kept", *(["limit"] if limited else []), "HF PEFT", "peak", "HF PEFT"]
    cells = []
    for row in rows:
        ours, theirs = row["veneer"], row.get("peft")
        time, kept = ([f"{v:.2f}"] for v in row["limits"]) if limited else ([], [])
        cells.append(
            [row["case"], spread(ours), *time, spread(theirs), number(ours, "saved"), *kept, number(theirs, "saved")]
            + [number(s, "peak") for s in (ours, theirs)]
        )
    parts = ["", "products, GFLOP", "price", "took", "passes, GB", "price", "took", "calls", "left"]
    keys = ["products_price", "products_took", "passes_price", "passes_took", "left"]
    made_of = []
    for row in rows:
        a = row["account"]
        at, cost, by, way, rest = (f"{a[k]:+.3f}" for k in keys)
        made_of.append(
            [row["case"], f"{a['products_gflop']:+.1f}", at, cost, f"{a['passes_gb']:+.2f}", by, way, f"{a['calls']:+.0f}", rest]
        )
    return "\n".join([measured + "\n", table(header, cells), table(parts, made_of)])


def forwards_table() -> str:
    """Forwards without gradients, by batch."""
    found = json.loads((RESULTS / "eval-cpu.json").read_text(encoding="utf-8"))
    batches = found["options"]["batch"]
    by_case: dict[str, dict[int, dict]] = {}
    for row in found["rows"]:
        by_case.setdefault(row["case"], {})[row["batch"]] = row
    cells = [[case, *(spread(own[b]["veneer"]) for b in batches), f"{own[batches[0]]['limit']:.2f}"] for case, own in by_case.items()]
    note = f"ViT-base, {found['options']['layers']} blocks, float32; {found['hardware']}; torch {found['versions']['torch']}.\n"
    return note + "\n" + table(["", *(f"batch {b}" for b in batches), "limit"], cells)


def compiled_table() -> str:
    """Compiled steps beside eager ones."""
    found = json.loads((RESULTS / "compiled-cpu.json").read_text(encoding="utf-8"))
    return table(
        ["", "compiled, times the compiled floor", "eager, times the floor"],
        [[row["case"], spread(row["compiled"]), spread(row["eager"])] for row in found["rows"]],
    )


def once_table() -> str:
    """What is done once: importing, attaching, loading, merging."""
    found = json.loads((RESULTS / "attach-cpu.json").read_text(encoding="utf-8"))
    cells = [[row["case"], f"{row['value']:.4g}", f"{row['limit']:.3g}" if row["limit"] else ""] for row in found["rows"]]
    return table(["seconds, or multiples where it says so", "measured", "limit"], cells)


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
        raise SystemExit(f"the markers of the {name} table are lost: {begin} … {end}")
    return re.sub(f"{re.escape(begin)}.*{re.escape(end)}", lambda _: f"{begin}\n\n{content}\n{end}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages = {METHODS: methods_page()}
    speed = {f.stem: steps_table(f.stem) for f in sorted(RESULTS.glob("step-*.json"))}
    speed |= {"eval-cpu": forwards_table(), "compiled-cpu": compiled_table(), "attach-cpu": once_table()}
    for page, tables in {README: {"speed": speed_table(), "mixed": mixed_table()}, SPEED: speed}.items():
        text = page.read_text(encoding="utf-8")
        for name, content in tables.items():
            text = filled(text, name, content)
        pages[page] = text
    for path, page in pages.items():
        if not check:
            path.write_text(page, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != page:
            sys.exit(f"{path} is out of date; run python scripts/make_docs.py")


if __name__ == "__main__":
    main()
