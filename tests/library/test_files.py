"""The adapter's directory: all or nothing, on reading and on writing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from veneer import AdaLoraConfig, AdapterFileError, ConfigError, LoraConfig, OFTConfig, PeftModel, StateError, get_peft_model

KEY = "base_model.model.0.lora_A.weight"


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))


@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(directory, f) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    f(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda t: t.pop(KEY), f"1 missing, such as {KEY}"),
        (lambda t: t.update({"base_model.model.7.lora_A.weight": torch.ones(1)}), r"1 unexpected, such as base_model\.model\.7"),
        (lambda t: t.update({KEY: torch.ones(3, 6)}), r"lora_A\.weight has shape \(3, 6\), the model needs \(2, 6\)"),
        (lambda t: t[KEY].fill_(float("nan")), f"{KEY} holds NaN"),
        (lambda t: t.pop("base_model.model.1.bias"), r"1 missing, such as base_model\.model\.1\.bias"),
    ],
    ids=["missing", "unexpected", "misshapen", "not finite", "head"],
)
def test_a_wrong_tensor_is_named_and_the_model_untouched(saved, f, message):
    change(saved, f)
    model = base()
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(model, saved)
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.Linear, nn.Linear] and all(p.requires_grad for p in model.parameters())


def test_a_failed_load_over_an_attached_adapter_changes_nothing(saved):
    model = PeftModel.from_pretrained(base(), saved)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    change(saved, lambda t: (t[KEY].fill_(1.0), t["base_model.model.1.bias"].fill_(float("inf"))))
    for name in ("default", "second"):
        with pytest.raises(AdapterFileError, match="NaN or infinite"):
            model.load_adapter(saved, name)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_half_precision_files_become_float32(saved):
    expected = load_file(saved / "adapter_model.safetensors")[KEY].half()
    change(saved, lambda t: t.update({k: v.half() for k, v in t.items()}))
    model = PeftModel.from_pretrained(base(), saved)
    p = model.get_base_model()[0].veneer["default"]["weight"].lora_A
    assert p.dtype is torch.float32 and torch.equal(p, expected.float())


def test_a_file_without_metadata_loads(saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file(tensors, saved / "adapter_model.safetensors", metadata=None)
    PeftModel.from_pretrained(base(), saved)


def test_a_damaged_file(saved):
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterFileError, match="is damaged"):
        PeftModel.from_pretrained(base(), saved)


def test_a_pickle_is_refused_with_the_conversion(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"A pickle can run code.*save_file"):
        PeftModel.from_pretrained(base(), saved)
    with pytest.raises(ConfigError, match="would write a pickle"):
        get_peft_model(base(), LoraConfig(target_modules=["0"])).save_pretrained(saved, safe_serialization=False)


@pytest.mark.parametrize("source", ["nowhere", "no/where/at-all", "owner/name"])
def test_a_place_that_is_not_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError, match="is not a directory here"):
        PeftModel.from_pretrained(base(), source)


def test_an_argument_that_does_not_exist_is_refused(saved):
    with pytest.raises(TypeError, match='unexpected argument .revison..* Did you mean "revision"'):
        PeftModel.from_pretrained(base(), saved, revison="main")


def test_saving_over_a_file_is_refused(saved, tmp_path):
    (tmp_path / "plain").write_text("x")
    with pytest.raises(AdapterFileError, match="is a file"):
        PeftModel.from_pretrained(base(), saved).save_pretrained(tmp_path / "plain")


def test_other_files_in_the_directory_stay(saved):
    (saved / "notes.txt").write_text("mine")
    (saved / "README.md").write_text("my own card")
    PeftModel.from_pretrained(base(), saved).save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine" and (saved / "README.md").read_text() == "my own card"
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"]


def test_named_adapters_have_folders(saved, tmp_path):
    model = PeftModel.from_pretrained(base(), saved)
    model.load_adapter(saved, "second")
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "second" / "adapter_model.safetensors").read_bytes() == (saved / "adapter_model.safetensors").read_bytes()
    PeftModel.from_pretrained(base(), tmp_path / "both", subfolder="second")
    with pytest.raises(StateError, match="no adapter is called 'third'"):
        model.save_pretrained(tmp_path / "x", selected_adapters=["third"])
    assert not (tmp_path / "x").exists()


KILLED = """
import sys, torch
from veneer import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(512, 512)), LoraConfig(r=64, target_modules=["0"]))
n = 0
while True:
    n += 1
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(n)
    model.save_pretrained(sys.argv[1])
    if n == 1:
        print("saving", flush=True)
"""


@pytest.mark.parametrize("after", [0.02, 0.05, 0.11])
def test_a_killed_writer_leaves_a_whole_adapter(tmp_path, after):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(512, 512)), tmp_path / "a")
    values = {float(v) for p in model.get_base_model()[0].veneer["default"].parameters() for v in p.unique()}
    assert len(values) == 1


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (OFTConfig(oft_block_size=4), OFTConfig(oft_block_size=4, use_cayley_neumann=False), "terms"),
        (OFTConfig(oft_block_size=4), OFTConfig(oft_block_size=4, coft=True, eps=1e-2), "eps"),
        (LoraConfig(r=2), AdaLoraConfig(init_r=2, target_r=1, total_step=10), None),
    ],
    ids=["exact", "constrained", "another method"],
)
def test_a_file_of_another_equation_is_not_read_into_an_attached_adapter(first, second, said, tmp_path):
    def made(config):
        config.target_modules = ["0"]
        return get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)

    made(second).save_pretrained(tmp_path)
    model = made(first)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises((StateError, AdapterFileError), match=said):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.load_adapter(tmp_path, "other")
    assert model.active_adapters == ["default"]


def test_a_misspelt_folder_is_answered_with_the_one_beside_it(saved, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for wrong in (saved.with_name("adaptr"), saved.with_name("adapter1")):
        with pytest.raises(AdapterFileError, match="not a directory here.*Did you mean .adapter."):
            PeftModel.from_pretrained(base(), wrong)
    monkeypatch.chdir(saved.parent)
    with pytest.raises(AdapterFileError, match="Did you mean .adapter."):
        PeftModel.from_pretrained(base(), "adaptr")
