"""Many adapters on one ViT-base: what a packed one takes beside its own tensors, and how long loading, switching and attaching again take."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cases
import measuring
import torch

import veneer

LIMITS: dict[str, float | None] = {
    "switch, q and v adapted, 2 attached": 1.0,
    "switch, six linears adapted, 2 attached": 1.0,
    "switch, q and v adapted, 2 attached of 1,000": 1.0,
    "load one of 1,000": None,
    "attach a packed one again and pack another": None,
    "memory beside 1,000 adapters' own bytes, %": 5.0,
}


def model(targets: list[str]) -> veneer.PeftModel:
    base = cases.model("vit-base", 12, "cpu", torch.float32)
    return veneer.get_peft_model(base, veneer.LoraConfig(r=8, target_modules=targets), "first")


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with Path("/proc/self/statm").open() as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def switching(held: veneer.PeftModel, names: list[str], tries: int) -> float:
    """The least milliseconds that one switch takes."""
    found = []
    for i in range(max(20, 10 * tries)):
        start = time.perf_counter()
        held.set_adapter(names[i % len(names)])
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


def two(targets: list[str], tries: int) -> float:
    held = model(targets)
    held.add_adapter("second", veneer.LoraConfig(r=8, target_modules=targets))
    return switching(held, ["first", "second"], tries)


def thousand(adapters: int, tries: int) -> dict[str, float]:
    """What so many adapters take, loaded packed from files."""
    held = model(["q_proj", "v_proj"])
    own = held.get_nb_trainable_parameters()[0] * 4
    with tempfile.TemporaryDirectory() as folder:
        held.save_pretrained(folder)
        for i in range(2):
            held.load_adapter(Path(folder) / "first", f"warm{i}", packed=True)
        before, start = resident(), time.perf_counter()
        for i in range(adapters):
            held.load_adapter(Path(folder) / "first", f"a{i}", packed=True)
        loading, after = time.perf_counter() - start, resident()
    held.set_adapter("a0")
    held.set_adapter("a1")
    fast = switching(held, ["a0", "a1"], tries)
    held.hold(attached=2)
    slow = switching(held, [f"a{i}" for i in range(2, adapters)], tries)
    return {
        "switch, q and v adapted, 2 attached of 1,000": fast,
        "load one of 1,000": 1e3 * loading / adapters,
        "attach a packed one again and pack another": slow,
        "memory beside 1,000 adapters' own bytes, %": 100 * ((after - before) / adapters / own - 1),
    }


def main() -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--adapters", type=int, default=1000, help="how many are held")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(thousand(args.adapters, args.repeats)))
        return 0
    del args.inside
    six = cases.MODELS["vit-base"].targets
    values = {
        "switch, q and v adapted, 2 attached": two(["q_proj", "v_proj"], args.repeats),
        "switch, six linears adapted, 2 attached": two(six, args.repeats),
    }
    # In a process of its own, whose memory nothing else has used before.
    command = [sys.executable, __file__, "--inside", "--adapters", str(args.adapters), "--repeats", str(args.repeats)]
    values |= json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    print(measuring.hardware("cpu"))
    missed = []
    for name, value in values.items():
        limit = LIMITS[name]
        unit = "" if name.endswith("%") else " ms"
        print(f"{name:60}{value:8.3f}{unit}" + (f"   limit {limit:.2f}" if limit else ""))
        if limit and value > limit:
            missed.append(f"{name}: {value:.3f}, the limit is {limit:.2f}")
    return measuring.finish(args, [{"case": k, "value": round(v, 4)} for k, v in values.items()], missed)


if __name__ == "__main__":
    raise SystemExit(main())
