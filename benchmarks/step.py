"""One training step: the frozen model's floor, Veneer and HF PEFT, interleaved in one process.

The floor is the same model with nothing adapted, forward and a backward that carries the gradient through every block. Every linear layer is adapted. The limits are asserted:
the script fails when one is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import account
import cases
import measuring
import torch
from torch import nn

LIMITS: dict[str, tuple[float, float]] = {
    "LoRA r16": (1.08, 1.05),
    "LoRA r16, dropout 0.1": (1.15, 1.05),
    "DoRA r16": (1.15, 1.20),
    "LoHa r16": (1.55, 1.05),
    "LoHa r4": (1.12, 1.05),
    "LoKr r16": (1.15, 1.05),
    "AdaLoRA 12": (1.12, 1.05),
    "OFT 32": (1.15, 1.05),
    "BOFT 4, 2 factors": (1.25, 1.20),
}
"""Times the floor that ViT-base in float32 may take, and may keep for backward."""


def measure(args: argparse.Namespace) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    inputs = {
        k: v.to(args.device, dtype if v.is_floating_point() else v.dtype) for k, v in cases.MODELS[args.model].inputs(args.batch).items()
    }
    cuda = args.device.startswith("cuda")

    def loss(model: nn.Module) -> torch.Tensor:
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.autocast):
            return model(**inputs).last_hidden_state.float().square().mean()

    def step(model: nn.Module) -> None:
        loss(model).backward()
        measuring.forget_gradients(model)

    def fresh() -> nn.Module:
        return cases.model(args.model, args.layers, args.device, dtype)

    names = args.methods or list(cases.METHODS)
    peaks_found = peaks(names, fresh, step, args)  # first: for the times, the process keeps what memory it has had
    base = cases.floor(args.model, fresh())
    base_bytes = measuring.saved_bytes(base, lambda: loss(base))
    flops = flops_of_step(base, inputs)
    machine = account.Machine(args.device, torch.bfloat16 if args.autocast else dtype)
    rows = []
    for name in names:
        config, options = cases.METHODS[name]
        sides = {"veneer": cases.ours(args.model, fresh(), config, options, wide=not args.narrow)}
        other = None if args.alone else cases.theirs(args.model, fresh(), config, options, wide=not args.narrow)
        if other is not None:
            sides["peft"] = other
        seconds, ratios = measuring.interleaved(lambda: step(base), {k: lambda m=m: step(m) for k, m in sides.items()}, args.repeats, cuda)
        row: dict = {"case": name, "floor_seconds": round(seconds, 4), "floor_saved_bytes": base_bytes} | measuring.as_row(ratios)
        if cuda:
            row["floor_tflops"] = round(flops / seconds / 1e12, 1)
        for side, adapted in sides.items():
            row[side]["saved"] = round(measuring.saved_bytes(adapted, lambda m=adapted: loss(m)) / base_bytes, 3)
        mine = sides["veneer"]
        row["account"] = account.account(lambda m=mine: step(m), lambda: step(base), machine, seconds, row["veneer"]["time"])
        rows.append(row)
        print(line(row), flush=True)
    explain(rows, machine)
    add_peaks(rows, peaks_found)
    return rows


def explain(rows: list[dict], machine: account.Machine) -> None:
    """Print what each of Veneer's times is made of."""
    print(
        f"Veneer beyond the floor, in floors, at {machine.flops / 1e9:.0f} GFLOP/s and {machine.bandwidth / 1e9:.0f} GB/s:\n{account.HEADER}"
    )
    for row in rows:
        print(account.line(row["case"], row["account"]), flush=True)


def peaks(names: list[str], fresh: Callable[[], nn.Module], step: Callable[[nn.Module], None], args: argparse.Namespace) -> dict:
    """How far memory grows in a step, in bytes, of the floor and of each side of each method; empty where the system does not say."""
    sides: dict[tuple[str, str], Callable[[], nn.Module | None]] = {("floor", ""): lambda: cases.floor(args.model, fresh())}
    for name in names:
        config, options = cases.METHODS[name]
        for side, make in (("veneer", cases.ours), *([] if args.alone else [("peft", cases.theirs)])):
            sides[name, side] = lambda make=make, config=config, options=options: make(
                args.model, fresh(), config, options, wide=not args.narrow
            )
    found = {}
    for key, made in sides.items():
        model = made()
        if model is not None:
            step(model)
            found[key] = measuring.peak_bytes(lambda m=model: step(m), args.device.startswith("cuda"))
    return {k: v for k, v in found.items() if v is not None}


def add_peaks(rows: list[dict], found: dict) -> None:
    """Note the peaks in their rows, and print them in floors."""
    floor = found.get(("floor", ""))
    if floor is None:
        return
    print(f"peak of a step, beyond the model: floor {floor / 2**20:.0f} MiB; times the floor:")
    for row in rows:
        row["floor_peak_bytes"] = floor
        cells = []
        for side in ("veneer", "peft"):
            if (row["case"], side) in found:
                row[side]["peak"] = round(found[row["case"], side] / floor, 3)
                cells.append(f"{row[side]['peak']:6.2f}")
        print(f"{row['case']:24}{'  '.join(cells)}", flush=True)


def flops_of_step(base: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Floating-point operations of one floor step."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        base(**inputs).last_hidden_state.float().square().mean().backward()
    return counter.get_total_flops()


def line(row: dict) -> str:
    cells = [f"{row['case']:24}"]
    for side in ("veneer", "peft"):
        r = row.get(side)
        if r is None:
            cells.append(" " * 34)
            continue
        cpu = "" if r["cpu"] is None else f"cpu {r['cpu']:.2f}"
        cells.append(f"{r['time']:6.2f} [{r['low']:.2f}–{r['high']:.2f}] {cpu:9}{r['saved']:6.2f}  ")
    return "".join(cells)


def main() -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--model", default="vit-base", choices=list(cases.MODELS))
    parser.add_argument("--layers", type=int, default=3, help="blocks to measure (default 3)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--autocast", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--narrow", action="store_true", help="adapters in the base's number type too, not in float32")
    parser.add_argument("--alone", action="store_true", help="without HF PEFT")
    parser.add_argument("--methods", nargs="*", choices=list(cases.METHODS), help="only these")
    args = parser.parse_args()
    how = (" under autocast" if args.autocast else "") + (", adapters too" if args.narrow else "")
    print(f"{measuring.hardware(args.device)}; {args.model}, {args.layers} blocks, batch {args.batch}, {args.dtype}{how}")
    print(f"{'':24}{'Veneer: time, CPU time, saved':>34}{'HF PEFT':>34}   (times the floor)")
    rows = measure(args)
    missed = []
    if args.model == "vit-base" and args.dtype == "float32" and not args.autocast:
        for row in rows:
            row["limits"] = LIMITS[row["case"]]
            for what, key, limit in zip(("time", "saved bytes"), ("time", "saved"), LIMITS[row["case"]], strict=True):
                if row["veneer"][key] > limit:
                    missed.append(f"{row['case']}: {what} {row['veneer'][key]:.3f} × floor, the limit is {limit}")
    return measuring.finish(args, rows, missed)


if __name__ == "__main__":
    raise SystemExit(main())
