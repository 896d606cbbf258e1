"""The commands as a user types them: output, files, exit codes, and errors of one line."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpt_peft.cli.main import COMMANDS, main


pytest_plugins = ["training_fixtures"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def flags(tiny_vit, tmp_path):
    return [
        *("--model_name_or_path", tiny_vit, "--dataset_name", "digits", "--output_dir", str(tmp_path / "out")),
        *("--max_train_samples", "64", "--max_eval_samples", "30", "--max_predict_samples", "30"),
        *("--num_train_epochs", "1", "--disable_tqdm", "true"),
    ]


@pytest.mark.parametrize("method", ["vpt", "mlp", "vpt+adapter"])
def test_train_evaluate_predict(flags, tmp_path, capsys, method):
    out = str(tmp_path / "out")
    assert main(["train", *flags, "--method", method]) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert f"test accuracy {metrics['test_accuracy']:.4f}" in shown and f"saved in {out}" in shown

    assert main(["evaluate", out, "--output_file", str(tmp_path / "metrics.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "metrics.json").read_text())
    assert found["accuracy"] == metrics["test_accuracy"] and found["samples"] == 30
    assert main(["evaluate", "--max_predict_samples", "20", "--split", "validation", out]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 30
    assert main(["evaluate", "--max_predict_samples", "20", out]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 20

    Image.fromarray(np.zeros((20, 10), np.uint8)).save(tmp_path / "a.png")
    assert main(["predict", out, str(tmp_path / "a.png"), "--top_k", "3"]) == 0
    header, row = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header[:3] == ["image", "label_1", "probability_1"] and len(header) == 8
    assert main(["predict", out, str(tmp_path), "--top_k", "0", "--output_file", str(tmp_path / "t.json")]) == 0
    (table,) = json.loads((tmp_path / "t.json").read_text())
    assert len(table["predictions"]) == 10 and table["predictions"][0]["label"] == row[1]


def test_a_table_of_images_from_the_folder_beside(tiny_vit, tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "table").mkdir()
    rows = ["file,label"]
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / "table" / f"{number}.png")
        rows.append(f"{number}.png,{'dark' if number < 6 else 'red'}")
    (tmp_path / "table" / "labels.csv").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    data = ("--dataset_name", "table/labels.csv")
    flags = ("--output_dir", "out", "--num_train_epochs", "1", "--disable_tqdm")
    assert main(["train", "--model_name_or_path", tiny_vit, *data, *flags]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "labels.csv (a local file)" in card and "table/" not in card.partition("| `learning_rate`")[0]
    capsys.readouterr()
    assert main(["evaluate", "out"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 2 and "There is no test split" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--metod", "vpt"], "--metod"),
        (["train", "--method", "vpt", "--gate", "scalar"], "gate='scalar' has no effect"),
        (["train", "--dataset_name", "no-such-folder/data"], "no-such-folder/data"),
        (["train", "--num_virtual_tokens", "0"], "num_virtual_tokens=0"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "--layers_to_transform", "7"], "layers_to_transform"),
        (
            ["train", "--learning_rate", "1e30", "--method", "linear", "--num_train_epochs", "3"],
            "Lower the learning rate",
        ),
        (["evaluate", "no/such-adapter"], "no/such-adapter"),
        (["evaluate", "."], "adapter_config.json"),
        (["predict", "no/such-adapter", "missing.png"], "missing.png"),
        (["push", ".", "user/name"], "adapter_config.json"),
        (["convert", "missing.pth", "folder"], "missing.pth"),
        (["cost", "--batch_size", "0"], "batch_size=0 must be an integer from 1"),
        (["cost", "--memory_limit_gb", "-2"], "--memory_limit_gb -2 must be a positive number"),
        (["cost", "--model_name_or_path", "no/such-model"], "no/such-model"),
        (["export", "no/such-adapter", "out"], "no/such-adapter"),
        (["tarin"], "unknown command 'tarin'"),
    ],
    ids=" ".join,
)
def test_user_errors_are_one_line_and_exit_code_2(flags, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    command, *rest = argv
    if command == "train" and rest != ["missing.yaml"]:
        # Flags of the case come last and win
        rest = [*flags, *rest]
    assert main([command, *rest]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("vpt-peft")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_defects_keep_their_traceback(monkeypatch):
    monkeypatch.setattr("vpt_peft.cli.train.run", lambda argv: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("vpt_peft.cli.train.run", interrupt)
    assert main(["train"]) == 130
    assert "--resume_from_checkpoint last" in capsys.readouterr().err


def test_debug_shows_the_traceback_of_user_errors(monkeypatch):
    monkeypatch.setenv("VPT_PEFT_DEBUG", "1")
    with pytest.raises(ValueError, match="--metod"):
        main(["train", "--metod", "vpt"])


@pytest.mark.parametrize("argv", [["--help"], []])
def test_usage_lists_the_commands(capsys, argv):
    assert main(argv) == (0 if argv else 2)
    captured = capsys.readouterr()
    assert all(name in captured.out + captured.err for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(capsys, command):
    try:
        code = main([command, "--help"])
    except SystemExit as done:
        code = done.code
    assert code == 0
    assert command in capsys.readouterr().out


def test_libraries_that_print_by_themselves_are_heard_once():
    assert main(["cost", "--batch_size", "0"]) == 2
    assert not any(logging.getLogger(name).propagate for name in ("datasets", "huggingface_hub", "torchmetrics"))


def test_what_a_run_prints_into_files(flags, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vpt_peft", "train", *flags[:-2], "--num_train_epochs", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0
    *epochs, results = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]
    assert results.startswith("validation accuracy 0.") and results.endswith(f"saved in {tmp_path / 'out'}")
    # Nothing else: no bars, nothing of libraries, no line twice
    settings, *told = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    assert [line.partition(" ")[0] for line in (settings, *told)] == ["Settings:", "Images", "Trains", "Expects"]


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "vpt_peft", "tarin"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "unknown command" in done.stderr


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize(
    "flag", [["--token", "hf_x"], ["--token=hf_x"], ["--hub_token", "hf_x"], ["--hub_token=hf_x"]]
)
def test_tokens_on_the_command_line(command, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([command, "adapter", *flag]) == 2
    said = capsys.readouterr().err
    assert (
        f"vpt-peft {command}: {flag[0].split('=')[0]}: other users" in said
        and "set HF_TOKEN in the environment" in said
    )
    assert "hf_x" not in said and not list(tmp_path.iterdir())
