"""Configurations: strict reading, reproducible writing, every bad value named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from veneer import AdapterFileError, ConfigError, LoraConfig, PeftConfig, TaskType


def test_written_files_are_the_same_bytes_in_every_process(tmp_path):
    script = "import sys; from veneer import LoraConfig; LoraConfig(target_modules={'v', 'q', 'k'}).save_pretrained(sys.argv[1])"
    for i in range(2):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / str(i))], check=True, env={"PYTHONHASHSEED": str(i)})
    first, second = ((tmp_path / d / "adapter_config.json").read_bytes() for d in "01")
    assert first == second and json.loads(first)["target_modules"] == ["k", "q", "v"]


def test_round_trip(tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q"], task_type=TaskType.SEQ_CLS, rank_pattern={"q": 2}, use_dora=True)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is LoraConfig and again.inference_mode
    again.inference_mode, again.peft_version = False, None
    assert again == config


def test_the_shortest_file_takes_the_defaults(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q"]}')
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.bias, config.use_dora) == (2, 8, "none", False)


def test_what_hf_peft_writes_is_read():
    import peft

    values = json.loads(json.dumps(peft.LoraConfig(r=4, target_modules=["q"]).to_dict(), default=list))
    assert PeftConfig.from_dict(values).r == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 4}, "no peft_type"),
        ({"peft_type": "LORRA"}, "'LORRA' is not one of .*Did you mean \"LORA\""),
        ({"peft_type": "LORA", "lora_alhpa": 4}, 'lora_alhpa=4 is not supported for LORA Did you mean "lora_alpha"'),
        ({"peft_type": "LORA", "use_qalora": True}, "use_qalora=True is not supported for LORA"),
        ({"peft_type": "LORA", "r": 0}, "r: a whole number of at least 1, got 0"),
        ({"peft_type": "LORA", "r": True}, "r: a whole number"),
        ({"peft_type": "LORA", "rank_pattern": {"q": 1.5}}, "rank_pattern"),
        ({"peft_type": "LORA", "bias": "lora"}, "bias: 'lora' is not one of none, all, lora_only"),
        ({"peft_type": "LORA", "init_lora_weights": "pisa"}, "init_lora_weights: 'pisa' is not one of"),
        ({"peft_type": "LORA", "lora_dropout": 1}, "lora_dropout: a probability"),
        ({"peft_type": "LORA", "task_type": "SEQ_CLF"}, "task_type: 'SEQ_CLF' is not one of .*Did you mean \"SEQ_CLS\""),
        ({"peft_type": "LORA", "modules_to_save": "head"}, r"write \['head'\]"),
        ({"peft_type": "LORA", "target_modules": "q", "layers_to_transform": [1]}, "layers_to_transform works with a list"),
        ({"peft_type": "LORA", "layers_pattern": "h"}, "give layers_to_transform too"),
        ({"peft_type": "LORA", "init_lora_weights": "orthogonal", "r": 3}, "needs an even rank"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        PeftConfig.from_dict(values)


@pytest.mark.parametrize(("text", "message"), [(None, "has no adapter_config.json"), ("{", "is not JSON"), ("[]", "not a JSON object")])
def test_bad_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_a_mistyped_argument_is_a_type_error():
    with pytest.raises(TypeError, match="lora_alhpa"):
        LoraConfig(lora_alhpa=3)
