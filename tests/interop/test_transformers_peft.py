"""transformers' own adapter methods, Trainer and pipelines on Veneer, with HF PEFT nowhere on the path: the same numbers as with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def hold_together(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, dict):
        for key in theirs:
            hold_together(ours[key], theirs[key], f"{where}, {key}")
    elif isinstance(theirs, torch.Tensor):
        assert (ours - theirs).abs().max() < 1e-5, where
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=1e-5), where
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            hold_together(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def results(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    run.hf("transformers_script.py", out, "hf")
    run.alone("transformers_script.py", out, "veneer")
    return out, *(torch.load(out / f"{name}.pt") for name in ("hf", "veneer"))


def test_adapter_methods_give_the_numbers_of_hf_peft(results):
    _, theirs, ours = results
    # What is missing is named as each library names its parameters.
    missing = [found["adapters"].pop("second, reloaded") for found in (theirs, ours)]
    hold_together(ours["adapters"], theirs["adapters"], "adapters")
    hold_together(
        [missing[1][0], missing[1][2], len(missing[1][1][0])], [missing[0][0], missing[0][2], len(missing[0][1][0])], "second, reloaded"
    )
    seen = ours["adapters"]
    assert torch.equal(seen["frozen"], seen["disabled"]) and torch.equal(seen["both"], seen["enabled"])
    assert torch.equal(seen["first"], seen["first, reloaded"][0]) and torch.equal(seen["second"], missing[1][0])
    for kind in ("biases", "loha"):
        assert torch.equal(seen[kind], seen[f"{kind}, reloaded"]) and torch.allclose(seen[kind], seen[f"{kind}, from hf"], atol=1e-5)
    assert all((seen[step] - seen["frozen"]).abs().max() > 1e-2 for step in ("first", "second", "both", "biases", "loha"))


def test_the_files_are_those_of_hf_peft(results):
    out, _, _ = results
    for adapter in ("second", "biases", "loha", "classes"):
        theirs, ours = (load_file(out / name / adapter / "adapter_model.safetensors") for name in ("hf", "veneer"))
        assert theirs.keys() == ours.keys() and all((theirs[k] - ours[k]).abs().max() < 1e-6 for k in theirs), adapter
        values, own = (json.loads((out / name / adapter / "adapter_config.json").read_text()) for name in ("hf", "veneer"))
        for field in own:
            same = sorted(own[field]) == sorted(values[field]) if isinstance(own[field], list) else own[field] == values[field]
            assert same or field in ("modules_to_save", "inference_mode"), (adapter, field, own[field], values[field])


def test_trainer_saves_resumes_and_takes_the_best_as_with_hf_peft(results):
    _, theirs, ours = results
    hold_together(ours["trained"], theirs["trained"], "trained")
    assert ours["trained"]["best"][1] == 0 and ours["trained"]["resumed"] == 0
    assert ours["trained"]["class"] == "PeftModelForSequenceClassification" and "model.safetensors" not in ours["trained"]["files"]


def test_pipelines_and_auto_classes_answer_as_with_hf_peft(results):
    _, theirs, ours = results
    hold_together(ours["served"], theirs["served"], "served")
