"""Two processes, data-parallel or sharded, train what one process trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).with_name("script.py"))


def run(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=["lora", "dora"])
def single(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("single") / "a"
    run([SCRIPT, "single", request.param, str(directory)])
    return request.param, load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, single, tmp_path):
    method, expected = single
    run(["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", SCRIPT, kind, method, str(tmp_path / "a")])
    found = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
