"""What training must not get wrong without a word: the head that fits by chance, the resumed run, the doubly cropped picture, the photograph in memory."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from veneer import PeftConfig
from veneer.cli import main, parser
from veneer.vision import evaluate, train
from veneer.vision.arguments import choose_workers
from veneer.vision.augment import Augment
from veneer.vision.batches import PictureSet, ahead
from veneer.vision.data import load_data
from veneer.vision.models import image_size
from veneer.vision.runs import Run, create
from veneer.vision.settings import resolve
from veneer.vision.training import resume


@pytest.fixture(scope="module")
def other_classifier(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved classifier that knows three classes, of other names than the shapes."""
    from transformers import AutoModelForImageClassification

    folder = tmp_path_factory.mktemp("model") / "three"
    torch.manual_seed(1)
    AutoModelForImageClassification.from_pretrained(small_model, num_labels=3).save_pretrained(folder)
    shutil.copy(small_model / "preprocessor_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def long_run(shapes: Path, other_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A finished run and its weights."""
    output = tmp_path_factory.mktemp("long")
    result = train(shapes, model=str(other_classifier), output=output, epochs=3, batch_size=8, patience=2, learning_rate=1e-3, quiet=True)
    return result.directory, load_file(result.adapter / "adapter_model.safetensors")


def test_a_head_with_as_many_classes_of_its_own_is_trained(long_run, other_classifier):
    directory, weights = long_run
    assert PeftConfig.from_pretrained(directory / "adapter").modules_to_save == ["classifier"]
    before = load_file(other_classifier / "model.safetensors")["classifier.weight"]
    assert not torch.equal(before, weights["base_model.model.classifier.weight"])


def test_a_resumed_run_ends_as_if_nothing_had_happened(long_run, monkeypatch, tmp_path):
    directory, weights = long_run
    run = Run(directory)
    last = run.last_checkpoint()
    assert last is not None
    counted = json.loads((last / "trainer_state.json").read_text())["stateful_callbacks"]["EarlyStoppingCallback"]
    metrics = json.loads((directory / "metrics.json").read_text())
    for gone in (last, run.adapter):
        shutil.rmtree(gone)
    last.mkdir()  # one that was cut short
    shutil.copy(directory / "settings.json", last / "adapter_model.safetensors")
    run.set_status("running")
    monkeypatch.chdir(tmp_path)
    result = resume(directory, quiet=True)
    found = load_file(result.adapter / "adapter_model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)
    assert {k: v for k, v in result.metrics.items() if k != "seconds"} == {k: v for k, v in metrics.items() if k != "seconds"}
    again = json.loads((last / "trainer_state.json").read_text())["stateful_callbacks"]["EarlyStoppingCallback"]
    assert again == counted and run.state()["status"] == "finished"


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    run = Run(tmp_path)
    assert run.last_checkpoint() is None
    for step, text in ((9, "{}"), (10, "{}"), (11, '{"global'), (12, None)):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-10"


@pytest.mark.parametrize(("name", "expected"), [("my.photos", "my.photos"), ("a b", "a-b"), ("table.csv", "table")])
def test_a_run_is_named_after_its_data(tmp_path, name, expected):
    data = tmp_path / name
    if data.suffix == ".csv":
        data.write_text("")
    else:
        data.mkdir()
    resolved = resolve({"output": str(tmp_path / "runs")})
    assert [create(resolved, str(data)).directory.name for _ in range(2)] == [f"{expected}-lora-1", f"{expected}-lora-2"]


class TestPictures:
    def processor(self):
        from transformers import BitImageProcessorPil

        return BitImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 16, "width": 16})

    def test_an_augmented_picture_is_not_cropped_again(self, shapes):
        processor, split = self.processor(), load_data(shapes).train
        augment = Augment("standard", image_size(processor))
        torch.manual_seed(3)
        found = PictureSet(split, processor, augment)[0]["pixel_values"]
        torch.manual_seed(3)
        seen = torch.from_numpy(np.asarray(augment(split.image(0))).copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
        torch.testing.assert_close(found, (seen - mean) / std)

    def test_a_lightly_augmented_one_is_seen_as_in_evaluation(self, shapes):
        processor, split = self.processor(), load_data(shapes).train
        plain, light = (PictureSet(split, processor, Augment(kind, (16, 16)))[0]["pixel_values"] for kind in ("none", "light"))
        assert plain.shape == light.shape == (3, 16, 16) and not torch.equal(plain, light)
        assert torch.equal(plain, PictureSet(split, processor)[0]["pixel_values"])

    @pytest.mark.parametrize(("size", "expected"), [((4000, 3000), (572, 429)), ((300, 200), (300, 200)), ((40, 900), (40, 900))])
    def test_a_photograph_is_made_smaller_before_it_is_moved(self, size, expected):
        moved = Augment("light", (196, 196))(Image.new("RGB", size, (10, 200, 30)))
        assert moved.size == expected and moved.getpixel((5, 5)) == (10, 200, 30)

    def test_few_are_open_at_once(self):
        lock, started = threading.Lock(), []

        def start(item: int) -> int:
            with lock:
                started.append(item)
            return item

        most = 0
        for taken, item in enumerate(ahead(start, range(200))):
            assert item == taken
            most = max(most, len(started) - taken)
        assert most <= 10

    def test_reading_ahead_passes_errors_on(self):
        with pytest.raises(ZeroDivisionError):
            list(ahead(lambda x: 1 // x, [1, 0, 1]))


def test_reading_processes_are_few_and_as_asked():
    assert choose_workers(3, 10) == 3 and choose_workers(0, 10**6) == 0
    assert choose_workers(None, 10) == 0 and 0 <= choose_workers(None, 10**6) <= 4


class TestCommandLine:
    @pytest.mark.parametrize(
        ("flag", "text", "value"),
        [
            ("--name", "5", "5"), ("--name", "2026-11-21", "2026-11-21"), ("--name", "no", "no"), ("--trackers", "tensorboard", ["tensorboard"]),
            ("--trackers", "wandb,tensorboard", ["wandb", "tensorboard"]), ("--epochs", "5", 5), ("--learning-rate", "5e-3", 0.005),
            ("--target-modules", "q_proj,v_proj", ["q_proj", "v_proj"]), ("--target-modules", "all-linear", "all-linear"),
            ("--target-modules", r".*\.[01]\..*(q|v)_proj", r".*\.[01]\..*(q|v)_proj"), ("--modules-to-save", "classifier", ["classifier"]),
            ("--layers-to-transform", "0,2", [0, 2]), ("--layers-to-transform", "1", 1), ("--init-lora-weights", "false", False),
            ("--init-lora-weights", "gaussian", "gaussian"), ("--rank-pattern", "{q_proj: 4}", {"q_proj": 4}), ("--workers", "none", "none"),
        ],
    )  # fmt: skip
    def test_a_flag_s_text_is_read_as_its_setting_s_type(self, flag, text, value):
        argv = ["train", "photos", flag, text]
        name = flag.strip("-").replace("-", "_")
        given = getattr(parser(argv).parse_args(argv), name)
        if value == "none":
            assert main(argv) == 2
            return
        extra = {"target_modules": ["q_proj"]} if name == "layers_to_transform" else {}
        assert resolve({name: given, **extra}).table()[name]["value"] == value

    @pytest.mark.parametrize("command", ["train", "predict", "eval", "demo"])
    def test_a_word_that_is_also_a_command_can_be_data(self, command):
        args = parser(argv := ["predict", "runs/1", command]).parse_args(argv)
        assert (args.command, args.images) == ("predict", [command])

    def test_an_endless_run_is_refused(self, capsys):
        assert main(["train", "photos", "--epochs", ".inf"]) == 2
        assert "epochs: Input should be a finite number" in capsys.readouterr().err

    def test_an_error_nobody_foresaw_is_one_line_and_debug_shows_where(self, finished, shapes, capsys, monkeypatch):
        monkeypatch.delenv("VENEER_DEBUG", raising=False)
        argv = ["predict", str(finished.directory), str(shapes / "lines" / "1.png"), "--device", "meta"]
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert err.startswith("veneer: unexpected ") and "--debug shows where" in err and err.count("\n") == 1
        assert main([*argv, "--debug"]) == 1
        assert "Traceback" in capsys.readouterr().err

    def test_a_device_that_is_not_here(self, finished, shapes, capsys):
        assert main(["predict", str(finished.directory), str(shapes), "--device", "nonsense"]) == 2
        assert "device: 'nonsense' cannot be used here" in capsys.readouterr().err

    def test_a_table_with_columns_of_its_own(self, finished, shapes, tmp_path, capsys):
        rows = [f"{shapes / name / f'{i}.png'},{name}" for name in finished.labels for i in range(3)]
        table = tmp_path / "table.csv"
        table.write_text("\n".join(["where,what", *rows]) + "\n")
        argv = ["eval", str(finished.directory), str(table), "--image-column", "where", "--label-column", "what", "--json"]
        assert main(argv) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["pictures"] == 9 and told["part"] == "all" and told["skipped"] == []
        assert told["accuracy"] == evaluate(finished.directory, table, image_column="where", label_column="what").accuracy

    def test_the_part_that_was_measured_is_named(self, finished, shapes, tmp_path, capsys):
        for part in ("train", "test"):
            shutil.copytree(shapes, tmp_path / "data" / part)
        assert main(["eval", str(finished.directory), str(tmp_path / "data")]) == 0
        assert "\ntest accuracy " in capsys.readouterr().out

    def test_damaged_label_names_are_told_of(self, finished, shapes, tmp_path, capsys):
        adapter = shutil.copytree(finished.adapter, tmp_path / "adapter")
        (adapter / "labels.json").write_text("[")
        assert main(["predict", str(adapter), str(shapes / "lines" / "1.png")]) == 1
        assert "labels.json is not JSON" in capsys.readouterr().err
