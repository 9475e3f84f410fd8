"""diffusers' LoRA features on a tiny pipeline: the same pictures as with HF PEFT."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")


def test_every_lora_feature_gives_the_pictures_of_hf_peft(run, tmp_path):
    run.hf("diffusers_script.py", tmp_path, "hf")
    run.alone("diffusers_script.py", tmp_path, "veneer")
    theirs, ours = (torch.load(tmp_path / f"{name}.pt") for name in ("hf", "veneer"))
    for step, picture in theirs["images"].items():
        assert (picture - ours["images"][step]).abs().max() < 1e-5, step
    assert torch.equal(ours["images"]["written by hf"], ours["images"]["written by veneer"])
    assert ours["names"] == theirs["names"] and ours["clean"]
    images = ours["images"]
    assert torch.equal(images["frozen"], images["disabled"]) and torch.equal(images["frozen"], images["unloaded"])
    assert torch.equal(images["loaded"], images["scale is put back"]) and torch.equal(images["loaded"], images["second is deleted"])
    changed = ("loaded", "scaled in the call", "second is active", "weighted sum", "fused")
    assert all((images[step] - images["frozen"]).abs().max() > 1e-2 for step in changed)
    files = [load_file(tmp_path / name / "unet" / "pytorch_lora_weights.safetensors") for name in ("hf", "veneer")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
