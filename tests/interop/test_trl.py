"""TRL's SFTTrainer on Veneer: the losses and the weights that it gives with HF PEFT."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")


def test_supervised_fine_tuning_equals_that_with_hf_peft(run, tmp_path):
    run.hf("trl_script.py", tmp_path, "hf")
    run.veneer("trl_script.py", tmp_path, "veneer")
    theirs, ours = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("hf", "veneer"))
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5) and len(ours["losses"]) == 3
    assert ours["losses"][2] != pytest.approx(ours["losses"][0], abs=1e-3)
    assert ours["logits"] == pytest.approx(theirs["logits"], abs=1e-4)
    assert ours["class"] == theirs["class"] == "PeftModelForCausalLM" and ours["is a PeftModel"]
    assert ours["reloaded differs by"] < 1e-6
    assert "adapter_model.safetensors" in ours["files"] and "model.safetensors" not in ours["files"]
    assert set(theirs["files"]) == set(ours["files"])
