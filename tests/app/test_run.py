"""A run from pictures to proof, and what is done with it afterwards."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from veneer import AdapterFileError, ConfigError, DataError, PeftConfig
from veneer.vision import evaluate, load_data, predict, train
from veneer.vision.answers import rows, write
from veneer.vision.arguments import choose_precision
from veneer.vision.augment import Augment
from veneer.vision.evaluation import Evaluation
from veneer.vision.prediction import load_classifier
from veneer.vision.proof import prove
from veneer.vision.report import confusion_csv, per_class_csv, per_class_table
from veneer.vision.runs import Run
from veneer.vision.statistics import wilson_interval
from veneer.vision.training import scores


class TestRunDirectory:
    def test_it_holds_everything(self, finished):
        names = {p.name for p in finished.directory.iterdir()}
        expected = {"adapter", "checkpoints", "confusion.csv", "confusion.png", "events.jsonl", "metrics.json", "per_class.csv", "run.json"}
        assert names == expected | {"settings.json", "settings.yaml", "skipped.json"}
        assert {p.name for p in finished.adapter.iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors", "labels.json", "preprocessor_config.json",
        }  # fmt: skip

    def test_it_proved_itself(self, finished):
        state = json.loads((finished.directory / "run.json").read_text())
        assert state["status"] == "finished" and state["proof"].startswith("reloaded in a fresh process: identical logits on 6 pictures")

    def test_the_best_and_the_last_checkpoint_are_kept(self, finished):
        kept = {p.name for p in (finished.directory / "checkpoints").iterdir()}
        assert "checkpoint-12" in kept and finished.metrics["best_checkpoint"] in kept and len(kept) <= 2
        best = load_file(finished.directory / "checkpoints" / finished.metrics["best_checkpoint"] / "adapter_model.safetensors")
        saved = load_file(finished.adapter / "adapter_model.safetensors")
        assert best.keys() == saved.keys() and all(torch.equal(best[k], saved[k]) for k in best)

    def test_the_head_is_in_the_adapter(self, finished):
        assert PeftConfig.from_pretrained(finished.adapter).modules_to_save == ["classifier"]
        assert "base_model.model.classifier.weight" in load_file(finished.adapter / "adapter_model.safetensors")

    def test_events_tell_the_story(self, finished):
        events = [json.loads(line) for line in (finished.directory / "events.jsonl").read_text().splitlines()]
        kinds = list(dict.fromkeys(e["event"] for e in events))
        assert kinds == ["running", "data", "train", "log", "evaluate", "saved", "trained", "proved", "finished"]
        assert [e["epoch"] for e in events if e["event"] == "evaluate"] == [1.0, 2.0, 3.0]

    def test_skipped_files_are_listed(self, finished):
        skipped = json.loads((finished.directory / "skipped.json").read_text())
        assert len(skipped) == 1 and skipped[0]["source"].endswith("broken.jpg")

    def test_settings_say_where_they_come_from(self, finished):
        settings = json.loads((finished.directory / "settings.json").read_text())
        assert settings["r"] == {"value": 4, "origin": "argument"} and settings["warmup"]["origin"] == "built-in"

    def test_tables_agree_with_the_metrics(self, finished):
        with (finished.directory / "confusion.csv").open() as f:
            counts = np.array([[int(c) for c in row[1:]] for row in list(csv.reader(f))[1:]])
        assert counts.sum() == finished.metrics["val_pictures"] == 6
        assert np.trace(counts) / counts.sum() == finished.metrics["val_accuracy"]
        with Image.open(finished.directory / "confusion.png") as picture:
            assert picture.format == "PNG"

    def test_the_same_seed_gives_the_same_weights(self, finished, shapes, small_model, tmp_path):
        again = train(shapes, model=str(small_model), output=tmp_path, epochs=3, batch_size=8, r=4, augment="light", patience=0, quiet=True)
        a, b = (load_file(r.adapter / "adapter_model.safetensors") for r in (finished, again))
        assert all(torch.equal(a[k], b[k]) for k in a)

    def test_its_settings_file_repeats_it(self, finished, shapes, tmp_path):
        result = train(shapes, config=finished.directory / "settings.yaml", output=tmp_path, epochs=1, quiet=True)
        assert result.directory == tmp_path / "shapes-lora-1"

    def test_a_name_is_used_once(self, finished, shapes, small_model):
        existing = finished.directory
        before = sorted(p.name for p in existing.iterdir())
        with pytest.raises(ConfigError, match="there is a run .* already"):
            train(shapes, model=str(small_model), output=existing.parent, name=existing.name, quiet=True)
        assert sorted(p.name for p in existing.iterdir()) == before


class TestErrorsBeforeAnythingIsMade:
    def test_no_folder_is_made(self, shapes, small_model, tmp_path):
        (tmp_path / "one" / "cats").mkdir(parents=True)
        shutil.copy(shapes / "lines" / "1.png", tmp_path / "one" / "cats")
        output = tmp_path / "runs"
        with pytest.raises(DataError, match="cats"):
            train(tmp_path / "one", model=str(small_model), output=output)
        with pytest.raises(ConfigError, match="cannot be loaded"):
            train(shapes, model=str(tmp_path), output=output)
        with pytest.raises(ConfigError, match="unknown setting"):
            train(shapes, model=str(small_model), output=output, epoch=1)
        assert not output.exists()


class TestProof:
    def test_another_head_is_found_out(self, finished, shapes, tmp_path):
        adapter = tmp_path / "adapter"
        shutil.copytree(finished.adapter, adapter)
        classifier = load_classifier(finished.adapter, device="cpu")
        split = load_data(shapes).val
        assert prove(classifier.model, classifier.processor, adapter, split)[0]
        tensors = load_file(adapter / "adapter_model.safetensors")
        tensors["base_model.model.classifier.bias"][0] += 1e-3
        save_file(tensors, adapter / "adapter_model.safetensors")
        proved, sentence = prove(classifier.model, classifier.processor, adapter, split)
        assert not proved and "gives other logits than the trained model (largest difference 0.001" in sentence

    def test_a_missing_file_is_found_out(self, finished, shapes, tmp_path):
        adapter = tmp_path / "adapter"
        shutil.copytree(finished.adapter, adapter)
        (adapter / "labels.json").unlink()
        classifier = load_classifier(finished.adapter, device="cpu")
        proved, sentence = prove(classifier.model, classifier.processor, adapter, load_data(shapes).val)
        assert not proved and "no labels.json" in sentence


class TestPrediction:
    def test_a_run_and_its_adapter_folder_answer_alike(self, finished, shapes):
        pictures = [shapes / "lines" / "1.png", shapes / "circles"]
        assert predict(finished.directory, pictures) == predict(finished.adapter, pictures)

    def test_answers_are_sorted_probabilities(self, finished, shapes):
        answers = predict(finished.directory, shapes / "squares", top=3)
        assert len(answers) == 12 and [a.path.name for a in answers[:3]] == ["0.png", "1.png", "2.png"]
        for a in answers:
            values = [p for _, p in a.top]
            assert (
                values == sorted(values, reverse=True)
                and abs(sum(values) - 1) < 1e-5
                and {label for label, _ in a.top} == set(finished.labels)
            )

    def test_a_file_that_is_no_picture_is_told_of(self, finished, shapes):
        answers = predict(finished.directory, [shapes / "lines" / "broken.jpg", shapes / "lines" / "1.png"])
        assert answers[0].error and answers[0].label is None and answers[1].label in finished.labels

    def test_nothing_readable_is_a_data_problem(self, finished, shapes):
        with pytest.raises(DataError, match=r"none of the 1 files .*broken\.jpg"):
            predict(finished.directory, shapes / "lines" / "broken.jpg")

    @pytest.mark.parametrize("name", ["nowhere", ""])
    def test_a_folder_that_is_no_run(self, tmp_path, shapes, name):
        with pytest.raises(AdapterFileError, match="there is no run|holds no finished adapter"):
            predict(tmp_path / name, shapes)

    @pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
    def test_files_by_suffix(self, finished, shapes, tmp_path, suffix):
        answers = predict(finished.directory, [shapes / "lines" / "1.png", shapes / "lines" / "broken.jpg"], top=2)
        file = tmp_path / "new" / f"answers.{suffix}"
        write(file, answers)
        if suffix == "csv":
            with file.open() as f:
                found = [{k: v or None for k, v in row.items()} for row in csv.DictReader(f)]
            expected = [{k: None if v is None else str(v) for k, v in row.items()} for row in rows(answers)]
            assert found == expected
            return
        if suffix == "parquet":
            import pyarrow.parquet

            found = pyarrow.parquet.read_table(file).to_pylist()
        else:
            text = file.read_text()
            found = json.loads(text) if suffix == "json" else [json.loads(line) for line in text.splitlines()]
        assert found == rows(answers)

    def test_a_suffix_without_a_format(self, finished, tmp_path):
        with pytest.raises(ConfigError, match=r'should end in .*\.csv.*Did you mean "\.parquet"'):
            write(tmp_path / "a.parq", [])


class TestEvaluation:
    def test_it_is_what_training_reported(self, finished, shapes, tmp_path):
        val = load_data(shapes).val
        for i in range(len(val)):
            target = tmp_path / "val" / finished.labels[val.labels[i]]
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(val.source(i), target)
        found = evaluate(finished.directory, tmp_path / "val")
        assert found.accuracy == finished.metrics["val_accuracy"] and (found.confusion == finished.evaluation.confusion).all()

    def test_a_class_the_run_does_not_know(self, finished, shapes, tmp_path):
        shutil.copytree(shapes / "lines", tmp_path / "data" / "linse")
        shutil.copytree(shapes / "circles", tmp_path / "data" / "circles")
        with pytest.raises(DataError, match='does not know the class "linse".*Did you mean "lines"'):
            evaluate(finished.directory, tmp_path / "data")

    def test_the_numbers(self):
        from sklearn.metrics import f1_score, precision_recall_fscore_support

        confusion = np.array([[3, 1, 0], [2, 5, 0], [0, 1, 0]])
        true = [i for i in range(3) for j in range(3) for _ in range(confusion[i, j])]
        named = [j for i in range(3) for j in range(3) for _ in range(confusion[i, j])]
        e = Evaluation(["a", "b", "c"], confusion, [])
        precision, recall, f1, support = precision_recall_fscore_support(true, named, zero_division=0)
        for i, row in enumerate(e.per_class()):
            assert (row["precision"] or 0, row["recall"], row["f1"], row["pictures"]) == pytest.approx(
                (precision[i], recall[i], f1[i], support[i])
            )
        assert e.macro_f1 == pytest.approx(f1_score(true, named, average="macro")) and e.accuracy == pytest.approx(8 / 12)
        assert per_class_csv(e).splitlines()[3] == "c,,0,0,1" and confusion_csv(e).splitlines()[1] == "a,3,1,0"
        assert per_class_table(e).splitlines()[3].split() == ["c", "–", "0.000", "0.000", "1"]
        assert "2 of 3 classes, the worst by F1" in per_class_table(e, most=2)

    def test_wilson_is_scipy_s(self):
        from scipy.stats import binomtest

        for correct, total in ((0, 5), (5, 5), (98, 100), (350, 360)):
            theirs = binomtest(correct, total).proportion_ci(method="wilson")
            assert wilson_interval(correct, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


class TestInterruption:
    def command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "veneer", *map(str, arguments)]

    def start(self, shapes, small_model, output) -> subprocess.Popen:
        arguments = [
            "train",
            shapes,
            "--model",
            small_model,
            "--output",
            output,
            "--epochs",
            400,
            "--batch-size",
            8,
            "--patience",
            0,
            "--r",
            4,
        ]
        # A suite that was started in the background ignores SIGINT, and its children would inherit that.
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        return subprocess.Popen(self.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)

    def wait_for_checkpoint(self, process, output):
        for _ in range(1200):
            if process.poll() is not None:
                raise AssertionError(process.stderr.read())
            if any(output.glob("*/checkpoints/checkpoint-*/trainer_state.json")):
                return
            time.sleep(0.05)
        raise AssertionError("no checkpoint in a minute")

    @pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT])
    def test_a_stopped_run_says_so_and_goes_on(self, shapes, small_model, tmp_path, with_signal):
        process = self.start(shapes, small_model, tmp_path)
        self.wait_for_checkpoint(process, tmp_path)
        os.kill(process.pid, with_signal)
        process.communicate()
        run = tmp_path / "shapes-lora-1"
        assert json.loads((run / "run.json").read_text())["status"] == ("running" if with_signal == signal.SIGKILL else "interrupted")
        with pytest.raises(AdapterFileError, match="holds no finished adapter"):
            predict(run, shapes)
        if with_signal == signal.SIGINT:
            assert process.returncode == 1
            return
        # Four epochs in all, so that going on takes a moment only.
        state = max((run / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        reached = json.loads((state / "trainer_state.json").read_text())["global_step"]
        settings = json.loads((run / "settings.json").read_text())
        settings["epochs"]["value"] = reached / 4 + 2
        (run / "settings.json").write_text(json.dumps(settings))
        done = subprocess.run(self.command("train", "--resume", run, "--json"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["metrics"]["steps"] == reached + 8
        assert json.loads((run / "run.json").read_text())["status"] == "finished"
        again = subprocess.run(self.command("train", "--resume", run), capture_output=True, text=True)
        assert again.returncode == 2 and "is finished" in again.stderr


@pytest.mark.parametrize("kind", ["none", "light", "standard"])
def test_augmentation_is_seeded_and_keeps_the_size(kind):
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    augment = Augment(kind, (16, 24))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(picture))
    assert results[0].size == ((24, 16) if kind == "standard" else (40, 30))
    assert results[0].tobytes() == results[1].tobytes()
    assert (results[0].tobytes() == results[2].tobytes()) == (kind == "none")


def test_light_augmentation_moves_by_at_most_its_promise():
    picture = Image.new("L", (101, 101))
    picture.putpixel((50, 50), 255)
    picture = picture.resize((101, 101)).convert("RGB")
    for seed in range(20):
        torch.manual_seed(seed)
        found = np.asarray(Augment("light", (101, 101))(picture))[..., 0].astype(float)
        if found.sum() == 0:
            continue
        y, x = (np.average(np.arange(101), weights=found.sum(a)) for a in (1, 0))
        assert abs(x - 50) <= 12 and abs(y - 50) <= 12


def test_precision_is_chosen_for_the_device():
    assert choose_precision("fp32") == "fp32" and choose_precision("auto") in ("fp32", "bf16")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="fp16 needs a GPU"):
            choose_precision("fp16")


def test_an_unknown_run_cannot_be_resumed(tmp_path):
    from veneer.vision.training import resume

    with pytest.raises(ConfigError, match="is not a run's folder"):
        resume(tmp_path)
    assert Run(tmp_path).state() == {}


def test_between_epochs_of_equal_accuracy_the_surer_one_is_best():
    from types import SimpleNamespace

    labels = np.array([0, 1, 0, 1])

    def score(sure: float, wrong: int) -> dict[str, float]:
        predictions = np.where(labels[:, None] == np.arange(2), sure, 0.0)
        predictions[:wrong] *= -1
        return scores(SimpleNamespace(predictions=predictions, label_ids=labels))

    assert score(2.0, 1)["accuracy"] == score(1.0, 1)["accuracy"] == 0.75
    assert score(2.0, 1)["score"] > score(1.0, 1)["score"]
    assert score(0.1, 0)["score"] > score(9.0, 1)["score"]
