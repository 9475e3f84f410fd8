"""Run under torchrun by test_distributed: a few steps of one data-parallel kind, then save the adapter from rank 0."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from veneer import LoraConfig, get_peft_model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def model(dora: bool) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(Block(), Block(), nn.Linear(8, 3))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["2"], use_dora=dora))


def main(kind: str, dora: bool, directory: Path) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    peft = model(dora)
    runs: nn.Module = peft
    if kind != "single":
        dist.init_process_group("gloo")
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
        runs(part).square().mean().backward()
        optimizer.step()
    full = None
    if kind == "fsdp2":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        full = get_model_state_dict(peft, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    peft.save_pretrained(directory, state_dict=full, is_main_process=rank == 0)
    if kind != "single":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "dora", Path(sys.argv[3]))
