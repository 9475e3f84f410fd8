"""The command line, in processes of its own: help without weight, exit codes, streams, JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from veneer.cli import main

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


def veneer(*arguments: object, cwd=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "veneer", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)


def imported(*arguments: str) -> set[str]:
    script = (
        "import sys\nfrom veneer.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('MODULES', *{m.partition('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_help_imports_nothing_heavy():
    assert not imported("--help") & {"torch", "transformers", "pydantic", "numpy", "PIL", "rich", "yaml", "datasets"}
    assert not imported("train", "--help") & {"torch", "transformers", "datasets"}
    assert not imported("predict", "--help") & {"torch", "transformers", "datasets"}
    assert not imported("info", "--help") & {"torch", "transformers", "datasets"}
    assert not imported("doctor", "--help") & {"torch", "transformers", "datasets"}


def test_help_lists_commands_settings_and_method_options():
    assert all(command in veneer("--help").stdout for command in ("train", "predict", "eval", "info", "doctor", "demo"))
    text = veneer("train", "--help").stdout
    assert "--batch-size" in text and "options of lora" in text and "--use-dora" in text and "arXiv:2106.09685" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train"], 2, "give the pictures to train on"),
        (["train", "x", "--epoch", "3"], 2, 'train has no argument --epoch. Did you mean "--epochs"'),
        (["train", "x", "--epochs", "zero"], 2, "epochs: Input should be a valid number"),
        (["train", "x", "--method", "lara"], 2, "'lara' is not one of .*lora"),
        (["train", "x", "--config", "no.yaml"], 2, "there is no configuration file no.yaml"),
        (["train", "--resume", "x", "--epochs", "3"], 2, "--epochs cannot be given with it"),
        (["train", "nowhere"], 3, "There is no file or folder nowhere"),
        (["predict", "nowhere", "a.jpg"], 3, "a.jpg"),
        (["predict", "nowhere", "a.jpg", "--output", "x.txt"], 2, "output: x.txt should end in"),
        (["predict", "nowhere", "a.jpg", "--top", "0"], 2, "top: at least one class"),
        (["eval", "nowhere", "x"], 1, "there is no run nowhere"),
    ],
)
def test_errors_are_a_sentence_and_a_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VENEER_DEBUG", raising=False)
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("veneer: ") and err.count("\n") == 1 and re.search(message, err)


@pytest.mark.parametrize("arguments", [["tarin"], [], ["train", "--epochs"]])
def test_usage_errors_are_code_two(arguments, capsys):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2 and "usage: veneer" in capsys.readouterr().err


def test_exit_codes_reach_the_shell(tmp_path):
    done = veneer("train", "nowhere", cwd=tmp_path)
    assert done.returncode == 3 and done.stderr.startswith("veneer: There is no file or folder nowhere") and "Traceback" not in done.stderr


def test_the_whole_job(shapes, small_model, tmp_path, monkeypatch, capsys):
    done = veneer("train", shapes, "--model", small_model, "--epochs", 2, "--batch-size", 8, "--target-modules", "q_proj,fc1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = done.stderr.splitlines()
    assert log[0] == "newly initialised, so trained and saved with the adapter: classifier"
    assert "3 classes, 30 pictures to train, 6 to validate" in log[1] and "1 files left out, such as" in log[2]
    assert [line.split()[:2] for line in log if line.startswith("epoch")] == [["epoch", "1.0"], ["epoch", "2.0"]]
    assert log[-1].startswith("reloaded in a fresh process: identical logits") and len(log) == 7
    assert done.stdout.splitlines()[0].split() == ["class", "precision", "recall", "f1", "pictures"]
    assert "validation accuracy" in done.stdout and done.stdout.endswith("run runs/shapes-lora-1\n")

    picture = shapes / "lines" / "1.png"
    shown = veneer("predict", "runs/shapes-lora-1", picture, shapes / "lines" / "broken.jpg", cwd=tmp_path)
    assert shown.returncode == 0 and str(picture) in shown.stdout and "%" in shown.stdout
    assert "not read" in shown.stderr and "broken.jpg" not in shown.stdout
    report = veneer("eval", "runs/shapes-lora-1", shapes, "--output", "report", cwd=tmp_path)
    assert report.returncode == 0 and "accuracy" in report.stdout and "broken.jpg" in report.stderr
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"per_class.csv", "confusion.csv", "confusion.png"}

    # The rest in this process, because each new one spends seconds on importing.
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["predict", "runs/shapes-lora-1", str(picture), "--output", "out/a.csv"]) == 0 and capsys.readouterr().out == ""
    assert (tmp_path / "out" / "a.csv").read_text().startswith("path,label,probability")
    assert main(["predict", "runs/shapes-lora-1", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"][0]["path"] == str(picture)
    assert main(["eval", "runs/shapes-lora-1", str(shapes), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["pictures"] == 36 and len(numbers["classes"]) == 3


def test_a_terminal_gets_a_bar_with_the_time_left(shapes, small_model, tmp_path):
    main, side = pty.openpty()
    command = [sys.executable, "-m", "veneer", "train", str(shapes), "--model", str(small_model), "--epochs", "2", "--json"]
    process = subprocess.Popen(
        [c for c in command if c != "--json"], stdout=subprocess.PIPE, stderr=side, cwd=tmp_path, env=ENVIRONMENT | {"TERM": "xterm"}
    )
    os.close(side)
    seen = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    out = process.communicate()[0]
    os.close(main)
    assert process.returncode == 0 and b"validation accuracy" in out
    assert b"training" in seen and b"steps," in seen and b"left" in seen


def test_torchrun_makes_one_run(shapes, small_model, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "veneer", "train"]
    command = [*launch, str(shapes), "--model", str(small_model), "--epochs", "1", "--batch-size", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["shapes-lora-1"]
    events = [json.loads(line)["event"] for line in (tmp_path / "runs" / "shapes-lora-1" / "events.jsonl").read_text().splitlines()]
    assert events == ["running", "data", "train", "log", "evaluate", "saved", "trained", "proved", "finished"]
    assert json.loads(done.stdout)["metrics"]["steps"] == 2
