"""One training step: the frozen model's floor, Veneer and HF PEFT, interleaved in one process.

The floor is the same model with nothing adapted, forward and a backward that carries the gradient through every block. Times are medians of ratios to the
floor step that ran just before, so that a busy machine slows both. Saved bytes are counted, not timed: the distinct storages that autograd keeps for backward,
parameters left out. The limits at the top are asserted: the script fails when one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# Threads that spin at OpenMP's barriers measure the machine's other load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import veneer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
CASES: dict[str, tuple[str, dict]] = {
    "LoRA r16": ("LoraConfig", {"r": 16}),
    "LoRA r16, dropout 0.1": ("LoraConfig", {"r": 16, "lora_dropout": 0.1}),
    "DoRA r16": ("LoraConfig", {"r": 16, "use_dora": True}),
    "LoHa r16": ("LoHaConfig", {"r": 16}),
    "LoHa r4": ("LoHaConfig", {"r": 4}),
    "LoKr r16": ("LoKrConfig", {"r": 16}),
    "AdaLoRA 12": ("AdaLoraConfig", {"init_r": 12, "total_step": 1000}),
    "OFT 32": ("OFTConfig", {"oft_block_size": 32}),
    "BOFT 4, 2 factors": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
}
# Times the floor that a case may take, and may keep in memory; None where no promise is made yet.
LIMITS: dict[str, tuple[float | None, float | None]] = {
    "LoRA r16": (1.35, 1.05),
    "LoRA r16, dropout 0.1": (1.7, 1.07),
    "LoHa r4": (None, 1.12),
    "AdaLoRA 12": (1.35, 1.06),
}


def vit(layers: int, device: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(num_hidden_layers=layers), add_pooling_layer=False).to(device, dtype).train()


def floor(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_())
    return model


def ours(model: nn.Module, config: str, options: dict) -> nn.Module:
    return veneer.get_peft_model(model, getattr(veneer, config)(target_modules=TARGETS, **options))


def theirs(model: nn.Module, config: str, options: dict) -> nn.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import peft
        except ImportError:
            return None
        return peft.get_peft_model(model, getattr(peft, config)(target_modules=TARGETS, **options))


def step(model: nn.Module, pixels: Tensor) -> None:
    model(pixel_values=pixels).last_hidden_state.square().mean().backward()
    for p in model.parameters():
        p.grad = None


def clock(f: Callable[[], None], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def saved_bytes(model: nn.Module, pixels: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(pixel_values=pixels).last_hidden_state.square().mean()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    out.backward()
    return total


def measure(args: argparse.Namespace) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    pixels = torch.randn(args.batch, 3, 224, 224, device=args.device, dtype=dtype)
    cuda = args.device.startswith("cuda")
    base = floor(vit(args.layers, args.device, dtype))
    base_bytes = saved_bytes(base, pixels)
    rows = []
    for name, (config, options) in CASES.items():
        sides = {
            "veneer": ours(vit(args.layers, args.device, dtype), config, options),
            "peft": theirs(vit(args.layers, args.device, dtype), config, options),
        }
        row: dict = {"case": name, "floor_saved_bytes": base_bytes}
        ratios: dict[str, list[float]] = {side: [] for side, model in sides.items() if model is not None}
        for i in range(args.repeats + 2):
            for side in ratios:
                reference = clock(lambda: step(base, pixels), cuda)
                took = clock(lambda model=sides[side]: step(model, pixels), cuda)
                if i >= 2:
                    ratios[side].append(took / reference)
        for side, values in ratios.items():
            quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
            row[side] = {
                "time": statistics.median(values),
                "quartiles": [quartiles[0], quartiles[2]],
                "saved": saved_bytes(sides[side], pixels) / base_bytes,
            }
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="blocks of ViT-base to measure (default 4)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    rows = measure(args)
    hardware = (
        torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else f"CPU {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(
        f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}; ViT-base width, {args.layers} blocks, batch {args.batch}, {args.dtype}"
    )
    print(f"{'case':24}{'Veneer':>16}{'HF PEFT':>16}{'saved':>9}{'saved':>9}")
    missed = []
    for row in rows:
        mine, other = row["veneer"], row.get("peft")
        spread = f"{mine['time']:.2f} [{mine['quartiles'][0]:.2f}–{mine['quartiles'][1]:.2f}]"
        print(
            f"{row['case']:24}{spread:>16}{other['time'] if other else float('nan'):>16.2f}{mine['saved']:>9.2f}{other['saved'] if other else float('nan'):>9.2f}"
        )
        for what, limit, value in zip(
            ("time", "saved bytes"), LIMITS.get(row["case"], (None, None)), (mine["time"], mine["saved"]), strict=True
        ):
            if limit is not None and value > limit:
                missed.append(f"{row['case']}: {what} {value:.2f} × floor, the limit is {limit}")
    if args.out:
        args.out.write_text(
            json.dumps({"hardware": hardware, "torch": torch.__version__, "arguments": vars(args) | {"out": None}, "rows": rows}, indent=1)
            + "\n"
        )
    for line in missed:
        print("missed:", line)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
