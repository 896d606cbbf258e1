"""Comparisons and sweeps as a user types them: tables, chosen settings, and going on after a break."""

import json
import statistics
from pathlib import Path

import pytest

import vpt_peft.runs.trials as runs
from vpt_peft.cli.main import main
from vpt_peft.runs.grid import Range, folder_name, make_parser, parse_grid
from vpt_peft.training.evaluation import evaluate_model
from vpt_peft.training.inference import load_adapter_model
from vpt_peft.training.trainer import TrainingDiverged


pytest_plugins = ["training_fixtures"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def flags(tiny_vit, out):
    return [
        *("--model_name_or_path", tiny_vit, "--dataset_name", "digits", "--output_dir", str(out)),
        *("--max_train_samples", "64", "--max_eval_samples", "40", "--max_predict_samples", "40"),
        *("--num_train_epochs", "1", "--disable_tqdm", "true"),
    ]


@pytest.fixture
def trained(monkeypatch):
    """The folder names and resume flags of the runs that really trained."""
    seen, train = [], runs.train

    def counting(arguments, with_test=True):
        training = arguments.training
        seen.append((Path(training.output_dir).name, training.resume_from_checkpoint))
        return train(arguments, with_test)

    monkeypatch.setattr(runs, "train", counting)
    return seen


def read(path):
    return json.loads(path.read_text())


def grid_of(*argv):
    return parse_grid(make_parser("vpt-peft sweep", "Search."), list(argv))


def test_compare_tells_mean_and_deviation_and_trains_nothing_twice(flags, out, capsys, trained):
    argv = ["compare", *flags, "--method", "linear", "vpt", "--seed", "0", "1"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len(trained) == 4
    for line, method in zip(table[2:], ("linear", "vpt"), strict=True):
        results = [read(out / f"method={method},seed={seed}" / "all_results.json") for seed in (0, 1)]
        accuracies = [100 * result["test_accuracy"] for result in results]
        assert f"{statistics.fmean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}" in line
        assert f"{results[0]['trainable_parameters']:,}" in line
    assert main(argv) == 0
    assert table == [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(trained) == 4
    row = read(out / "compare_results.json")["rows"][1]
    assert row["settings"] == {"method": "vpt"} and len(row["metrics"]) == 2 and not row["errors"]


def test_sweep_takes_the_best_of_validation_to_the_test_once(flags, out, capsys):
    rates = ["1e-5", "1e-2", "1e30"]
    assert main(["sweep", *flags, "--method", "linear", "--max_steps", "24", "--learning_rate", *rates]) == 0
    shown = capsys.readouterr().out
    results = read(out / "sweep_results.json")
    rows = {row["settings"]["learning_rate"]: row for row in results["rows"]}
    scores = {rate: rows[rate]["metrics"][0]["eval_accuracy"] for rate in (1e-5, 1e-2)}
    assert scores[1e-2] > scores[1e-5] and results["best"] == {"learning_rate": 1e-2}
    assert [row["settings"]["learning_rate"] for row in results["rows"]] == [1e-2, 1e-5, 1e30]
    assert "Lower the learning rate" in rows[1e30]["errors"]["42"] and "training loss is nan" in shown
    best = out / "learning_rate=0.01"
    assert [path.parent for path in out.glob("*/test_results.json")] == [best]
    assert [rate for rate, row in rows.items() if any("test_accuracy" in metrics for metrics in row["metrics"])] == [
        1e-2
    ]

    model, processor = load_adapter_model(best)
    again = evaluate_model(model, processor, runs.parse_args(_data(flags)).data, "test")
    accuracy = read(best / "all_results.json")["test_accuracy"]
    assert accuracy == again["accuracy"] and again["samples"] == 40
    assert f"| test | Accuracy | {100 * accuracy:.2f} % |" in (best / "README.md").read_text()
    assert f"{100 * accuracy:.2f}" in shown.split("Best: ")[1]


def _data(flags):
    return flags[2:4] + flags[6:12]


def test_sweep_goes_on_where_it_broke_off(flags, out, monkeypatch, caplog, trained):
    argv = ["sweep", *flags, "--method", "linear", "--learning_rate", "1e-3", "1e-2", "--weight_decay", "0", "0.1"]
    counted = runs.train

    def breaks(arguments, with_test=True):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return counted(arguments, with_test)

    monkeypatch.setattr(runs, "train", breaks)
    assert main(argv) == 130
    assert "the same command continues" in caplog.text
    assert len(read(out / "sweep_results.json")["rows"]) == 2 and not list(out.glob("*/test_results.json"))
    monkeypatch.setattr(runs, "train", counted)
    assert main(argv) == 0
    assert len(trained) == 4 == len({name for name, _ in trained})
    assert len(read(out / "sweep_results.json")["rows"]) == 4


def test_a_comparison_that_grows_trains_only_what_is_new(flags, out, capsys, trained):
    argv = ["compare", *flags, "--method"]
    assert main([*argv, "linear", "bias"]) == 0
    assert main([*argv, "mlp", "linear", "bias"]) == 0
    names = [name for name, _ in trained]
    assert sorted(names[:2]) == ["method=bias", "method=linear"] and names[2:] == ["method=mlp"]
    assert [row["settings"]["method"] for row in read(out / "compare_results.json")["rows"]] == [
        "mlp",
        "linear",
        "bias",
    ]
    table = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[-3:] == ["mlp", "linear", "bias"]


def test_sweep_by_the_loss_takes_the_lowest(flags, out, capsys):
    argv = ["sweep", *flags, "--method", "linear", "--max_steps", "24", "--learning_rate", "1e-5", "1e-2"]
    assert main([*argv, "--metric_for_best_model", "loss"]) == 0
    results = read(out / "sweep_results.json")
    losses = [row["metrics"][0]["eval_loss"] for row in results["rows"]]
    assert losses[0] < losses[1] and results["metric"] == "loss" and results["best"] == {"learning_rate": 1e-2}
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    assert titles == ["learning_rate", "runs", "validation loss", "seconds"]


def test_a_run_that_was_killed_is_resumed(flags, out, trained):
    argv = ["compare", *flags, "--method", "linear", "--num_virtual_tokens", "1", "2"]
    assert main(argv) == 0
    folder = out / "num_virtual_tokens=1"
    before = read(folder / "all_results.json")["test_accuracy"]
    for name in ("run_result.json", "README.md", "all_results.json", "vpt_peft_baseline.safetensors"):
        (folder / name).unlink()
    assert main(argv) == 0
    assert trained[2:] == [(folder.name, "last")]
    assert read(folder / "all_results.json")["test_accuracy"] == before


@pytest.mark.parametrize("error", [TrainingDiverged("loss is nan"), ValueError("partial_blocks=9 is too many")])
def test_nothing_but_failures_is_exit_code_2(flags, out, monkeypatch, capsys, error):
    def fail(arguments, with_test=True):
        raise error

    monkeypatch.setattr(runs, "train", fail)
    for command in ("sweep", "compare"):
        folder = str(out / command)
        assert main([command, *flags, "--output_dir", folder, "--method", "linear", "--learning_rate", "1", "2"]) == 2
        assert str(error) in capsys.readouterr().out
        rows = read(out / command / f"{command}_results.json")["rows"]
        assert [row["errors"] for row in rows] == [{"42": str(error)}] * 2


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_ranges_are_sampled_alike_every_time(flags, out, trained, sampler):
    pytest.importorskip("optuna")
    argv = ["sweep", *flags, "--method", "vpt", "--learning_rate", "1e-4:1e-2", "--num_virtual_tokens", "1:4"]
    argv += ["--sampler", sampler, "--num_settings", "3", "--max_steps", "1"]
    assert main(argv) == 0
    tried = [row["settings"] for row in read(out / "sweep_results.json")["rows"]]
    assert len(trained) == len(tried) == 3
    assert all(1e-4 <= each["learning_rate"] <= 1e-2 and each["num_virtual_tokens"] in (1, 2, 3, 4) for each in tried)
    assert len({each["learning_rate"] for each in tried}) == 3
    assert main(argv) == 0
    assert len(trained) == 3 and [row["settings"] for row in read(out / "sweep_results.json")["rows"]] == tried


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sweep"], "nothing varies"),
        (["sweep", "--learning_rate", "1e-4:1e-2"], "learning_rate=0.0001:0.01 is a range"),
        (["sweep", "--learning_rate", "1e-2:1e-4"], "1e-2:1e-4"),
        (["sweep", "--learning_rate", "1e-4:1e-2", "1"], "a range and other values"),
        (["sweep", "--learning_rate", "fast", "1"], "fast"),
        (["compare", "--method", "vpt", "lira"], "lira"),
        (["compare", "--method", "vpt", "linear", "--gate", "scalar"], "gate='scalar' has no effect"),
        (["compare", "--seed", "1:5"], "list the seeds"),
        (["compare", "--push_to_hub"], "push_to_hub cannot be used here"),
        (["compare", "--output_dir", "a", "b"], "output_dir has 2 values"),
        (["compare", "--dataset_name", "no-such-folder/data"], "no-such-folder/data"),
    ],
    ids=" ".join,
)
def test_user_errors_are_one_line_and_train_nothing(flags, out, monkeypatch, capsys, argv, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([argv[0], *flags, *argv[1:]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith(f"vpt-peft {argv[0]}: ")
    assert not list(out.rglob("*.safetensors"))


def test_folders_of_others_and_of_other_settings_are_left_alone(flags, out, capsys):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(["compare", *flags, "--method", "linear"]) == 2
    assert "compare_results.json" in capsys.readouterr().err and len(list(out.iterdir())) == 1
    (out / "thesis.txt").unlink()
    assert main(["compare", *flags, "--method", "linear", "--max_steps", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    assert main(["compare", *flags, "--method", "linear", "--max_steps", "2"]) == 2
    assert "max_steps=1, not 2" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*")}


def test_grid_of_flags():
    grid = grid_of(
        "--method", "vpt", "--learning_rate", "1e-3", "5e-3", "1e-3", "--weight_decay", "0", "1e-2", "--bf16"
    )
    assert grid.common == {"method": "vpt", "bf16": True} and grid.seeds == [42]
    assert grid.trials() == [{"learning_rate": a, "weight_decay": b} for a in (1e-3, 5e-3) for b in (0.0, 1e-2)]
    grid = grid_of("--layers_to_transform", "0", "1", "--seed", "3", "4", "--share_prompts", "true", "false")
    assert grid.common == {"layers_to_transform": [0, 1]} and grid.seeds == [3, 4]
    assert grid.axes == {"share_prompts": [True, False]}
    assert grid_of("--num_virtual_tokens", "1:8").axes == {"num_virtual_tokens": Range(1.0, 8.0, True)}


def test_files_hold_lists(tmp_path):
    (tmp_path / "grid.yaml").write_text("method: [vpt, linear]\nseed: [0, 1]\nlearning_rate: 1e-3\n")
    grid = grid_of(str(tmp_path / "grid.yaml"), "--weight_decay", "0.5")
    assert grid.axes == {"method": ["vpt", "linear"]} and grid.seeds == [0, 1]
    assert grid.common == {"learning_rate": 1e-3, "weight_decay": 0.5}


def test_folder_names_are_short_safe_and_distinct():
    names = {folder_name({"dataset_name": "a/b", "x": "y" * n}) for n in (150, 151)} | {
        folder_name({"dataset_name": "a_b"})
    }
    assert len(names) == 3 and all("/" not in name and len(name) < 140 for name in names)
