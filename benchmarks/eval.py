"""The forward of an unmerged adapter in eval mode, without gradients, against the frozen model's."""

from __future__ import annotations

from functools import partial

import cases
import measuring
import torch

LIMIT = 1.05


def main() -> int:
    parser = measuring.parser(__doc__)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 32])
    args = parser.parse_args()
    base = cases.model("vit-base", args.layers, args.device, torch.float32).eval()
    rows, missed = [], []
    print(f"{measuring.hardware(args.device)}; ViT-base, {args.layers} blocks, float32, times the frozen model's forward")
    for name, (config, options) in cases.METHODS.items():
        if "dropout" in name:
            continue  # off in eval mode
        adapted = cases.shaken(
            cases.ours("vit-base", cases.model("vit-base", args.layers, args.device, torch.float32), config, options)
        ).eval()
        for batch in args.batch:
            inputs = {k: v.to(args.device) for k, v in cases.MODELS["vit-base"].inputs(batch).items()}
            with torch.inference_mode():
                _, ratios = measuring.interleaved(
                    partial(base, **inputs), {"veneer": partial(adapted, **inputs)}, args.repeats, args.device.startswith("cuda")
                )
            r = ratios["veneer"]
            rows.append({"case": name, "batch": batch, "limit": LIMIT} | measuring.as_row(ratios))
            print(f"{name:24} batch {batch:3}  {r}  cpu {r.cpu or float('nan'):.2f}", flush=True)
            if r.time > LIMIT:
                missed.append(f"{name}: eval forward {r.time:.3f} × the frozen model's at batch {batch}, the limit is {LIMIT}")
    return measuring.finish(args, rows, missed)


if __name__ == "__main__":
    raise SystemExit(main())
