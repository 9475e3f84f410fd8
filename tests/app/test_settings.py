"""One schema: precedence, origins, and what a wrong name or value is answered with."""

from __future__ import annotations

import pytest

from veneer import ConfigError
from veneer.vision.settings import TrainSettings, method_class, option_fields, resolve


def test_the_later_wins_and_every_value_knows_its_origin(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 4\nbatch-size: 16\nr: 2\nlora_alpha: 3\n")
    resolved = resolve({"epochs": 2, "r": 5}, file=file)
    table = resolved.table()
    assert table["epochs"] == {"value": 2.0, "origin": "command line"}
    assert table["batch_size"] == {"value": 16, "origin": "config file"}
    assert table["learning_rate"] == {"value": method_class("lora").facts().learning_rate, "origin": "method preset"}
    assert table["seed"] == {"value": 0, "origin": "built-in"}
    assert (table["r"]["origin"], table["lora_alpha"]["origin"], table["use_dora"]["origin"]) == ("command line", "config file", "built-in")
    config = resolved.adapter_config()
    assert (config.r, config.lora_alpha) == (5, 3)
    assert resolve({"learning_rate": 1e-4}).table()["learning_rate"] == {"value": 1e-4, "origin": "command line"}


def test_every_field_and_option_is_in_the_table():
    names = set(TrainSettings.model_fields) | set(option_fields(method_class("lora")))
    assert set(resolve({}).table()) == names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch' for method lora. Did you mean \"epochs\""),
        ({"lora_alhpa": 3}, 'Did you mean "lora_alpha"'),
        ({"method": "lorra"}, "method: 'lorra' is not one of .*lora"),
        ({"epochs": -1}, "epochs: Input should be greater than 0, got -1"),
        ({"augment": "lots"}, "augment: Input should be 'none', 'light' or 'standard'"),
        ({"r": "many"}, "r: .*integer.*, got 'many'"),
        ({"r": 0}, "r: a whole number"),
        ({"lora_dropout": 2.0}, "lora_dropout: a probability"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown setting 'epoch' in .*a.yaml"),
        ("a: [", "is not YAML"),
        ("- 3", "holds list"),
        (None, "there is no configuration file"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve({}, file=file)


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert resolve({}, file=tmp_path / "a.yaml") == resolve({})
