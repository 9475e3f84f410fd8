"""A batch in which each picture has its own adapter, against the same batch with one: by distinct adapters, by loaded ones, and HF PEFT's way.

The floor is the forward of the same batch with one adapter of the same method, in eval mode and without gradients. The limits are asserted: the script fails when one is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import cases
import measuring
import torch
from torch import Tensor, nn

METHODS: dict[str, tuple[str, dict]] = {
    "LoRA r8": ("LoraConfig", {"r": 8}),
    "DoRA r8": ("LoraConfig", {"r": 8, "use_dora": True}),
    "LoHa r8": ("LoHaConfig", {"r": 8}),
    "LoKr r8": ("LoKrConfig", {"r": 8}),
    "OFT 32": ("OFTConfig", {"oft_block_size": 32}),
    "BOFT 4, 2 factors": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
}
LIMIT, LIMIT_OF_LORA, LIMIT_OF_LOADED = 1.5, 1.25, 1.05
"""Times the same batch with one adapter; and times the same batch with no more adapters loaded than it uses."""


def loaded(args: argparse.Namespace, method: str, count: int, layers: int, *, other: bool = False) -> nn.Module | None:
    """A model with `count` adapters of one method, Veneer's or HF PEFT's."""
    config, options = METHODS[method]
    base = cases.model("vit-base", layers, args.device, torch.float32)
    targets = cases.targets("vit-base", base)
    model = (cases.theirs if other else cases.ours)("vit-base", base, config, options)
    if model is None:
        return None
    kind = type(next(iter(model.peft_config.values())))
    for i in range(1, count):
        model.add_adapter(f"a{i}", kind(target_modules=targets, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(mark in name for mark in (".veneer.", "lora_")):
                p.add_(0.01 * torch.randn_like(p))
    return model.eval()


def names(batch: int, distinct: int) -> list[str]:
    """The samples' adapters, taken in turn."""
    return ["default" if i % distinct == 0 else f"a{i % distinct}" for i in range(batch)]


def measure(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """The rows of the result file, and what was missed."""
    inputs = {k: v.to(args.device) for k, v in cases.MODELS["vit-base"].inputs(args.batch).items()}

    def side(model: nn.Module, which: Sequence[str] | None = None) -> Callable[[], Tensor]:
        return partial(model, **inputs, **({} if which is None else {"adapter_names": list(which)}))

    cuda = args.device.startswith("cuda")
    rows: list[dict] = []
    missed: list[str] = []

    def compare(case: str, floor: Callable[[], Tensor], sides: dict[str, Callable[[], Tensor]], limits: dict[str, float]) -> None:
        with torch.inference_mode():
            seconds, ratios = measuring.interleaved(floor, sides, args.repeats, cuda)
        rows.append({"case": case, "floor_seconds": round(seconds, 4)} | measuring.as_row(ratios))
        print(f"{case:24}" + "   ".join(f"{name} {r}" for name, r in ratios.items()), flush=True)
        for name, limit in limits.items():
            if ratios[name].time > limit:
                missed.append(f"{case}, {name}: {ratios[name].time:.2f} × the same batch with one adapter, the limit is {limit}")

    for method in args.methods or METHODS:
        model = loaded(args, method, args.batch, args.layers)
        assert model is not None
        lora = method.startswith("LoRA")
        counts = [n for n in (1, 2, 8) if n < args.batch] if lora else []
        sides = {f"{n} distinct": side(model, names(args.batch, n)) for n in [*counts, args.batch]}
        other = loaded(args, method, args.batch, args.layers, other=True) if lora and not args.alone else None
        if other is not None:
            sides["HF PEFT's way"] = side(other, names(args.batch, args.batch))
        compare(method, side(model), sides, {f"{args.batch} distinct": LIMIT_OF_LORA if lora else LIMIT})
        del model, other, sides
    if args.loaded > args.batch:
        each = names(args.batch, args.batch)
        few, many = (loaded(args, "LoRA r8", n, 1) for n in (args.batch, args.loaded))
        assert few is not None and many is not None
        label = f"{args.loaded} loaded"
        compare(f"{args.batch} distinct, 1 block", side(few, each), {label: side(many, each)}, {label: LIMIT_OF_LOADED})
    return rows, missed


def main() -> int:
    parser = measuring.parser(__doc__)
    cuda = torch.cuda.is_available()
    parser.set_defaults(repeats=9 if cuda else 3)
    parser.add_argument("--layers", type=int, default=12 if cuda else 3, help="blocks to measure")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--loaded", type=int, default=1000, help="adapters held in memory, in the last row")
    parser.add_argument("--alone", action="store_true", help="without HF PEFT")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="only these")
    args = parser.parse_args()
    print(
        f"{measuring.hardware(args.device)}; ViT-base, {args.layers} blocks, batch {args.batch}, float32, times the same batch with one adapter"
    )
    rows, missed = measure(args)
    return measuring.finish(args, rows, missed)


if __name__ == "__main__":
    raise SystemExit(main())
