"""Run under torchrun by test_distributed: a few steps of one data-parallel kind, then save the adapter from rank 0."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import veneer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


CASES = {
    "lora": ("LoraConfig", {"r": 2}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 4, "tfinal": 1}),
    "loha": ("LoHaConfig", {"r": 2}),
    "lokr": ("LoKrConfig", {"r": 1}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "oft-constrained": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 1e-2}),
    "boft": ("BOFTConfig", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down"]}),
    "vera": ("VeraConfig", {"r": 4}),
    "hra": ("HRAConfig", {"r": 2}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "scaling": 10.0}),
}


def model(case: str) -> veneer.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(Block(), Block(), nn.Linear(8, 3))
    name, options = CASES[case]
    return veneer.get_peft_model(base, getattr(veneer, name)(target_modules=["up", "down"], modules_to_save=["2"], **options))


MIXED = {"a": "lora", "b": "oft", "c": "dora", "d": "loha"}
"""Adapters that train together, each on its own samples of every batch."""


def mixed() -> veneer.PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(Block(), Block(), nn.Linear(8, 3))
    peft = None
    for name, case in MIXED.items():
        config, options = CASES[case]
        made = getattr(veneer, config)(target_modules=["up", "down"], modules_to_save=["2"], **options)
        if peft is None:
            peft = veneer.get_peft_model(base, made, name)
        else:
            peft.add_adapter(name, made)
    assert peft is not None
    peft.set_adapter(list(MIXED))
    return peft


def train(kind: str, case: str, directory: Path) -> None:
    """A few steps; `directory` gets the adapter."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    peft = mixed() if case == "mixed" else model(case)
    runs: nn.Module = peft
    if kind == "ddp":
        runs = nn.parallel.DistributedDataParallel(peft)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for block in peft.get_base_model():
            fully_shard(block, mesh=mesh)
        fully_shard(peft, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 8, generator=generator)
        part = x if kind == "single" else x.chunk(world)[rank]
        optimizer.zero_grad()
        names = {"adapter_names": (list(MIXED) * len(x))[: len(part)]} if case == "mixed" else {}
        runs(part, **names).square().mean().backward()
        optimizer.step()
    full = None
    if kind == "fsdp2":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        full = get_model_state_dict(peft, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    peft.save_pretrained(directory, state_dict=full, is_main_process=rank == 0)


def main(kind: str, directory: Path) -> None:
    dist.init_process_group("gloo")
    for case in [*CASES, "mixed"]:
        train(kind, case, directory / case)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
