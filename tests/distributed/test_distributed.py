"""Two processes, data-parallel or sharded, train what one process trains, for every method."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("script.py")
spec = importlib.util.spec_from_file_location("distributed_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def together(request, tmp_path_factory):
    """What two processes wrote."""
    directory = tmp_path_factory.mktemp(request.param)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(SCRIPT),
        request.param,
        str(directory),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.parametrize("case", script.CASES)
def test_two_processes_equal_one(case, together, tmp_path):
    script.train("single", case, tmp_path)
    found, expected = (load_file(d / "adapter_model.safetensors") for d in (together / case, tmp_path))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    start = script.model(case).state_dict()
    trained = [k for k in expected if k.endswith("2.weight")]
    assert trained and not torch.equal(expected[trained[0]], start["base_model.model.2.veneer.default.weight"])


def test_adapters_that_train_in_one_batch(together, tmp_path):
    script.train("single", "mixed", tmp_path)
    for name in script.MIXED:
        found, expected = (load_file(d / name / "adapter_model.safetensors") for d in (together / "mixed", tmp_path))
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        start = {k: t for k, t in script.mixed().state_dict().items() if f".veneer.{name}." in k}
        head = f"base_model.model.2.veneer.{name}.weight"
        assert head in start and not torch.equal(expected["base_model.model.2.weight"], start[head])
