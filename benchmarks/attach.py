"""Import, attach, load, switch and merge: seconds, each in the best of several tries, so that it is the work that is measured."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cases
import measuring
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import veneer

LIMITS: dict[str, float | None] = {
    "import beyond torch's own": 0.2,
    "attach LoRA r16 to q and v of ViT-base": 0.05,
    "attach LoRA r16 to six linears of ViT-base": None,  # a third of it is drawing 1.3 million first numbers
    "attach LoRA r16 to a 7-billion Llama on the meta device": 2.0,
    "load 170 MB over an attached adapter, times a plain read": 1 / 0.7,
    "the same, times a plain read into memory that is there": None,  # which looks at nothing: that every number is finite is another pass
    "set_adapter from one to another on six linears of ViT-base": 0.001,
    "merge_and_unload of all linears of ViT-base": 1.0,
}


def best(make: Callable[[], object], act: Callable[[object], object], tries: int) -> float:
    """The least seconds that `act` took on what `make` gave."""
    found = []
    for _ in range(tries):
        subject = make()
        start = time.perf_counter()
        act(subject)
        found.append(time.perf_counter() - start)
    return min(found)


def vit() -> torch.nn.Module:
    return cases.model("vit-base", 12, "cpu", torch.float32)


def lora(r: int = 16, names: list[str] | None = None) -> veneer.PeftConfig:
    return veneer.LoraConfig(r=r, target_modules=names or cases.MODELS["vit-base"].targets)


def importing(tries: int) -> float:
    code = "import time, torch; s = time.perf_counter(); import veneer; veneer.get_peft_model; veneer.LoraConfig; print(time.perf_counter() - s)"
    return min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(min(3, tries))
    )


def switching(tries: int) -> float:
    model = veneer.get_peft_model(vit(), lora(8), "a")
    model.add_adapter("b", lora(8))
    names = itertools.cycle("ba")
    return best(lambda: next(names), lambda name: model.set_adapter(name), 10 * tries)


def llama() -> torch.nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32))


def loading(tries: int) -> dict[str, float]:
    model = veneer.get_peft_model(vit(), lora(256))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "adapter_model.safetensors"
        # A memory-mapped file has not been read before its numbers are touched.
        new = best(measuring.give_back_memory, lambda _: [t.clone() for t in load_file(file).values()], tries)
        there = {k: t.clone() for k, t in load_file(file).items()}
        again = best(lambda: None, lambda _: [there[k].copy_(t) for k, t in load_file(file).items()], tries)
        ours = best(lambda: None, lambda _: model.load_adapter(folder, "default"), tries)
    return {
        "load 170 MB over an attached adapter, times a plain read": ours / new,
        "the same, times a plain read into memory that is there": ours / again,
    }


def main() -> int:
    args = measuring.parser(__doc__).parse_args()
    tries = args.repeats
    values = {
        "import beyond torch's own": importing(tries),
        "attach LoRA r16 to q and v of ViT-base": best(vit, lambda m: veneer.get_peft_model(m, lora(16, ["q_proj", "v_proj"])), tries),
        "attach LoRA r16 to six linears of ViT-base": best(vit, lambda m: veneer.get_peft_model(m, lora()), tries),
        "attach LoRA r16 to a 7-billion Llama on the meta device": best(
            llama, lambda m: veneer.get_peft_model(m, veneer.LoraConfig(r=16, target_modules="all-linear")), min(3, tries)
        ),
        **loading(tries),
        "set_adapter from one to another on six linears of ViT-base": switching(tries),
        "merge_and_unload of all linears of ViT-base": best(
            lambda: veneer.get_peft_model(vit(), lora()), lambda m: m.merge_and_unload(), min(3, tries)
        ),
    }
    print(measuring.hardware("cpu"))
    missed = []
    for name, value in values.items():
        limit = LIMITS[name]
        print(f"{name:60}{value:8.3f}" + (f"   limit {limit:.2f}" if limit else ""))
        if limit and value > limit:
            missed.append(f"{name}: {value:.3f}, the limit is {limit:.2f}")
    return measuring.finish(args, [{"case": k, "value": round(v, 4), "limit": LIMITS[k]} for k, v in values.items()], missed)


if __name__ == "__main__":
    raise SystemExit(main())
