"""One training step under `torch.compile(fullgraph=True)`: the compiled floor, Veneer compiled and Veneer eager."""

from __future__ import annotations

from functools import partial

import cases
import measuring
import torch
from torch import nn


def main() -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", nargs="*", default=["LoRA r16", "OFT 32"], choices=list(cases.METHODS))
    args = parser.parse_args()
    inputs = {k: v.to(args.device) for k, v in cases.MODELS["vit-base"].inputs(args.batch).items()}

    def step(run: nn.Module, model: nn.Module) -> None:
        run(**inputs).last_hidden_state.square().mean().backward()
        measuring.forget_gradients(model)

    def fresh() -> nn.Module:
        return cases.model("vit-base", args.layers, args.device, torch.float32)

    base = cases.floor("vit-base", fresh(), compiled=True)
    fast = torch.compile(base, fullgraph=True)
    rows, missed = [], []
    print(f"{measuring.hardware(args.device)}; ViT-base, {args.layers} blocks, batch {args.batch}, float32, times the compiled floor")
    for name in args.methods:
        config, options = cases.METHODS[name]
        adapted = cases.ours("vit-base", fresh(), config, options)
        compiled = torch.compile(adapted, fullgraph=True)
        sides = {"compiled": partial(step, compiled, adapted), "eager": partial(step, adapted, adapted)}
        _, ratios = measuring.interleaved(lambda: step(fast, base), sides, args.repeats, args.device.startswith("cuda"))
        rows.append({"case": name} | measuring.as_row(ratios))
        print(f"{name:24} compiled {ratios['compiled']}   eager {ratios['eager']}", flush=True)
        if ratios["compiled"].low > ratios["eager"].high:  # beyond what the spread of the two explains
            missed.append(f"{name}: compiled {ratios['compiled'].time:.2f}, eager {ratios['eager'].time:.2f} × the compiled floor")
    return measuring.finish(args, rows, missed)


if __name__ == "__main__":
    raise SystemExit(main())
