"""Comparisons and sweeps as a user types them: protocol, tables, chosen settings, and going on after a break."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import vpt_peft.runs.trials as trials
from vpt_peft.cli.main import main
from vpt_peft.reporting.results import read_results
from vpt_peft.runs.grid import Range, folder_name, make_parser, parse_grid
from vpt_peft.training.arguments import parse_args
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
        *("--num_train_epochs", "1"),
    ]


@pytest.fixture
def trained(monkeypatch):
    """The arguments of the runs that really trained."""
    seen, train = [], trials.train

    def counting(arguments, with_test=True):
        seen.append(arguments)
        return train(arguments, with_test)

    monkeypatch.setattr(trials, "train", counting)
    return seen


def names(trained, out):
    return [str(Path(arguments.training.output_dir).relative_to(out / "runs")) for arguments in trained]


def read(path):
    return json.loads(path.read_text())


def tables(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def grid_of(*argv):
    return parse_grid(make_parser("vpt-peft sweep", "Search."), list(argv))


def test_compare_searches_chooses_retrains_and_tests_once(flags, out, capsys, trained):
    argv = ["compare", *flags, "--method", "linear", "vpt", "--num_trials", "2", "--seed", "5"]
    argv += ["--split_seed", "0", "1", "--learning_rate", "1e-5", "1e-2:0.1"]
    # A range is searched, values that are listed would be rows
    assert main(argv) == 2
    argv[argv.index("1e-5") : argv.index("1e-5") + 2] = ["1e-4:1e-1"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    results = read_results(out)
    searched, tested = (results[results["stage"] == stage] for stage in ("search", "test"))
    # The same trials for both, the first of which changes nothing; one draw and one seed
    settings = [{}, {"learning_rate": searched["settings"][1]["learning_rate"]}]
    assert 1e-4 <= settings[1]["learning_rate"] <= 1e-1
    for row in ("linear", "vpt"):
        mine = searched[searched["row"] == row]
        assert sorted(map(str, mine["settings"])) == sorted(map(str, settings))
        assert set(mine["seed"]) == {5} and set(mine["draw"]) == {0} and mine["test_accuracy"].isna().all()
        chosen = max(mine.itertuples(), key=lambda each: (each.eval_accuracy, -each.eval_loss)).settings
        runs = [each for each in trained if each.method.method == row and each.data.train_on_validation]
        assert len(runs) == 2 and all(each.given["learning_rate"] is not None for each in runs)
        if chosen:
            assert {each.training.learning_rate for each in runs} == {chosen["learning_rate"]}
        assert {(each.data.split_seed, each.training.seed) for each in runs} == {(0, 5), (1, 5)}
    assert len(tested) == 4 and tested["eval_accuracy"].isna().all() and len(trained) == 8
    kept = read(next((out / "results" / "vpt" / "digits" / "test").glob("*.json")))
    assert kept["train_info"]["metrics"]["train_samples"] == 104
    # The table says what the results do
    header, _, *lines = tables(shown)[:4]
    for line, row in zip(lines, ("linear", "vpt"), strict=True):
        mine, cells = tested[tested["row"] == row], dict(zip(header, line, strict=True))
        scores = [100 * score for score in mine["test_accuracy"]]
        assert cells["method"] == row and cells["runs"] == "2"
        assert cells["accuracy (%)"] == f"{statistics.fmean(scores):.2f} ± {statistics.stdev(scores):.2f}"
        assert cells["with head"] == f"{mine['parameters'].iloc[0]:,}"
    assert ["method", "minus linear", "95 % interval", "lowest", "pairs"] in tables(shown)
    assert (out / "report.md").read_text() == shown
    assert Image.open(out / "report.png").size[0] > 1000
    # Nothing is trained twice
    assert main(argv) == 0 and capsys.readouterr().out == shown and len(trained) == 8


def test_results_have_the_shape_of_pefts_comparison(flags, out):
    assert main(["compare", *flags, "--method", "vpt", "--num_train_epochs", "2"]) == 0
    (path,) = (out / "results").rglob("*.json")
    result, folder = read(path), out / "runs" / "vpt" / "digits" / "test" / "split_seed=0,seed=42"
    assert list(result) == ["run_info", "train_info", "meta_info"]
    run, trained, meta = result.values()
    assert path == out / "results" / f"{run['experiment_name']}.json" and run["error_msg"] == ""
    assert run["train_config"]["method"] == "vpt" and run["peft_config"]["peft_type"] == "VPT"
    assert trained["status"] == "success" and [entry["epoch"] for entry in trained["history"][:2]] == [1, 2]
    weights = load_file(folder / "adapter_model.safetensors")
    assert trained["num_trainable_params"] == sum(each.numel() for each in weights.values()) == 3 * 10 * 32 + 330
    assert trained["num_head_params"] == 330
    assert trained["file_size"] == (folder / "adapter_model.safetensors").stat().st_size
    assert trained["process_memory_max"] > 10**8 and run["total_time"] > trained["train_time"] > 0
    assert 10**5 < trained["expected_memory"] < 10**8
    assert meta["package_info"]["torch-version"] and meta["system_info"]["accelerator"]


def test_the_tested_adapter_gives_its_score_again(flags, out):
    assert main(["compare", *flags, "--method", "linear"]) == 0
    folder = out / "runs" / "linear" / "digits" / "test" / "split_seed=0,seed=42"
    model, processor = load_adapter_model(folder)
    again = evaluate_model(model, processor, parse_args([*flags[2:4], *flags[6:12]]).data, "test")
    assert read_results(out)["test_accuracy"][0] == again["accuracy"] and again["samples"] == 40


def test_searched_runs_leave_no_weights(flags, out):
    assert main(["sweep", *flags, "--method", "linear", "--learning_rate", "1e-3", "1e-2"]) == 0
    assert [path.parent.parent.name for path in out.rglob("*.safetensors")] == ["test"]
    assert len(list((out / "runs" / "linear" / "digits" / "search").iterdir())) == 2


def test_sweep_takes_the_best_of_validation_to_the_test_once(flags, out, capsys):
    rates = ["1e-5", "1e-2", "1e30"]
    assert main(["sweep", *flags, "--method", "linear", "--max_steps", "24", "--learning_rate", *rates]) == 0
    shown = capsys.readouterr().out
    results = read_results(out).set_index(["stage", "error"])
    assert len(results.loc["search"]) == 3 and len(results.loc["test"]) == 1
    header, _, *lines = tables(shown)[:5]
    assert [line[header.index("learning_rate")] for line in lines] == ["0.01", "1e-05", "1e+30"]
    assert "training loss is nan" in lines[2][-1] and "Best on digits: learning_rate=0.01\n" in shown
    scores = {str(each["settings"]): each["eval_accuracy"] for _, each in results.loc["search"].iterrows()}
    assert scores["{'learning_rate': 0.01}"] > scores["{'learning_rate': 1e-05}"]
    (best,) = (out / "results").glob("linear/digits/test/*.json")
    assert read(best)["run_info"]["train_config"]["learning_rate"] == 0.01


def test_a_sweep_says_once_what_its_runs_share(flags, out, caplog, tmp_path):
    for name, count in (("dark", 20), ("light", 2)):
        (tmp_path / "squares" / name).mkdir(parents=True)
        for index in range(count):
            colour = (index + (100 if name == "dark" else 200),) * 3
            Image.new("RGB", (16, 16), colour).save(tmp_path / "squares" / name / f"{index}.png")
    data = ("--dataset_name", str(tmp_path / "squares"), "--validation_fraction", "0.5")
    assert main(["sweep", *flags, *data, "--learning_rate", "1e-3", "1e-2"]) == 0
    said = [record.getMessage() for record in caplog.records if record.name.startswith("vpt_peft")]
    results = read_results(out)
    scores = [f"  validation accuracy {score:.4f}." for score in results["eval_accuracy"]]
    assert sorted(line for line in said if line.startswith("  ")) == sorted(scores) and len(scores) == 3
    assert sum("classes are uneven" in line for line in said) == 1
    assert not [line for line in said if "Trains" in line or "epoch" in line]


def test_sweep_by_the_loss_takes_the_lowest(flags, out, capsys):
    argv = ["sweep", *flags, "--method", "linear", "--max_steps", "24", "--learning_rate", "1e-5", "1e-2"]
    assert main([*argv, "--metric_for_best_model", "loss"]) == 0
    header, _, first, second = tables(capsys.readouterr().out)[:4]
    assert header == ["learning_rate", "validation loss", "s"] and float(first[1]) < float(second[1])


@pytest.mark.parametrize("interrupted", [1, 2], ids=["search", "test"])
def test_a_broken_comparison_goes_on(flags, out, monkeypatch, caplog, trained, interrupted):
    argv = ["sweep", *flags, "--method", "linear", "--learning_rate", "1e-3", "1e-2"]
    counted = trials.train

    def breaks(arguments, with_test=True):
        if len(trained) == interrupted:
            raise KeyboardInterrupt
        return counted(arguments, with_test)

    monkeypatch.setattr(trials, "train", breaks)
    assert main(argv) == 130
    assert "the same command continues" in caplog.text and len(read_results(out)) == interrupted
    monkeypatch.setattr(trials, "train", counted)
    assert main(argv) == 0
    assert len(set(names(trained, out))) == len(trained) == 3


def test_a_run_that_was_killed_is_resumed_from_its_checkpoint(flags, out, trained):
    argv = ["compare", *flags, "--method", "linear", "--save_strategy", "epoch", "--num_train_epochs", "2"]
    assert main(argv) == 0
    before = read_results(out)["test_accuracy"][0]
    shutil.rmtree(out / "results")
    for path in out.glob("optuna_journal.log*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(argv) == 0
    assert [each.training.resume_from_checkpoint for each in trained] == [None, "last"]
    assert read_results(out)["test_accuracy"][0] == before


def test_a_comparison_that_grows_trains_only_what_is_new(flags, out, capsys, trained):
    argv = ["compare", *flags, "--method"]
    assert main([*argv, "linear", "bias"]) == 0
    assert main([*argv, "mlp", "linear", "bias"]) == 0
    assert len(trained) == len(set(names(trained, out))) == 3
    assert [line[0] for line in tables(capsys.readouterr().out)][-7:-3] == ["mlp", "linear", "bias", "method"]


def test_several_data_sets_are_tabled_apart(flags, out, capsys, tmp_path):
    other = tmp_path / "squares"
    for split in ("train", "validation", "test"):
        for name, colour in (("dark", 30), ("light", 220)):
            (other / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (16, 16), (colour + index,) * 3).save(other / split / name / f"{index}.png")
    argv = ["compare", *flags, "--dataset_name", "digits", str(other), "--method", "linear", "vpt_shallow"]
    assert main([*argv, "--max_train_samples", "6", "--max_eval_samples", "4", "--max_predict_samples", "8"]) == 0
    found = tables(capsys.readouterr().out)
    assert ["method", "digits", "squares"] in found and found[0][1] == "mean accuracy (%)"
    results = read_results(out)
    assert sorted(results["data"]) == ["digits", "digits", "squares", "squares"]


def test_without_a_test_split_validation_images_score(flags, out, capsys, caplog, tmp_path):
    folder = tmp_path / "squares"
    for split in ("train", "validation"):
        for name, colour in (("dark", 30), ("light", 220)):
            (folder / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (16, 16), (colour + index,) * 3).save(folder / split / name / f"{index}.png")
    assert main(["compare", *flags, "--dataset_name", str(folder), "--method", "linear"]) == 0
    assert "on validation images" in capsys.readouterr().out and "has no test split" in caplog.text
    (result,) = (out / "results").rglob("*.json")
    assert read(result)["train_info"]["metrics"]["train_samples"] == 8


@pytest.mark.parametrize("error", [TrainingDiverged("loss is nan"), ValueError("partial_blocks=9 is too many")])
def test_nothing_but_failures_is_exit_code_2(flags, out, monkeypatch, capsys, error):
    def fail(arguments, with_test=True):
        raise error

    monkeypatch.setattr(trials, "train", fail)
    for command in ("sweep", "compare"):
        folder = str(out / command)
        assert main([command, *flags, "--output_dir", folder, "--method", "linear", "--learning_rate", "1", "2"]) == 2
        assert str(error) in capsys.readouterr().out
        assert set(read_results(folder)["error"]) == {str(error)}


def test_ranges_are_sampled_alike_every_time(flags, out, trained):
    argv = ["sweep", *flags, "--method", "vpt", "--learning_rate", "1e-4:1e-2", "--num_virtual_tokens", "1:4"]
    argv += ["--sampler", "tpe", "--num_trials", "3", "--max_steps", "1"]
    assert main(argv) == 0
    tried = list(read_results(out).query("stage == 'search'")["settings"])
    assert len(trained) == 4 and len(tried) == 3
    assert all(1e-4 <= each["learning_rate"] <= 1e-2 and each["num_virtual_tokens"] in (1, 2, 3, 4) for each in tried)
    assert len({each["learning_rate"] for each in tried}) == 3
    assert main(argv) == 0 and len(trained) == 4


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
        (["compare", "--method", "vpt", "--num_trials", "0"], "num_trials=0 must be at least 1"),
        (["compare", "--seed", "1:5"], "list the seeds"),
        (["compare", "--split_seed", "1:5"], "split_seed=1:5 is a range"),
        (["compare", "--push_to_hub"], "push_to_hub cannot be used here"),
        (["compare", "--early_stopping_patience", "2"], "early_stopping_patience cannot be used here"),
        (["compare", "--output_dir", "a", "b"], "output_dir has 2 values"),
        (["compare", "--dataset_name", "no-such-folder/data"], "no-such-folder/data"),
        (["compare", "--suite", "vtab-1k"], "suite='vtab-1k' names its data sets itself"),
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
    assert "files of no comparison or sweep" in capsys.readouterr().err and len(list(out.iterdir())) == 1
    (out / "thesis.txt").unlink()
    assert main(["compare", *flags, "--method", "linear", "--max_steps", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("r*/**/*")}
    assert main(["compare", *flags, "--method", "linear", "--max_steps", "2"]) == 2
    assert "max_steps=1, not 2" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("r*/**/*")}


def test_grid_of_flags():
    grid = grid_of(
        "--method", "vpt", "--learning_rate", "1e-3", "5e-3", "1e-3", "--weight_decay", "0", "1e-2", "--bf16"
    )
    assert grid.common == {"method": "vpt", "bf16": True} and grid.seeds == [42]
    assert grid.combinations(["learning_rate", "weight_decay"]) == [
        {"learning_rate": a, "weight_decay": b} for a in (1e-3, 5e-3) for b in (0.0, 1e-2)
    ]
    grid = grid_of("--layers_to_transform", "0", "1", "--seed", "3", "4", "--share_prompts", "true", "false")
    assert grid.common == {"layers_to_transform": [0, 1]} and grid.seeds == [3, 4]
    assert grid.axes == {"share_prompts": [True, False]}
    assert grid_of("--num_virtual_tokens", "1:8").axes == {"num_virtual_tokens": Range(1.0, 8.0, True)}
    # Several numbers are values here, where a single run gives one to each block
    assert grid_of("--num_virtual_tokens", "1", "8").axes == {"num_virtual_tokens": [1, 8]}


def test_files_hold_lists(tmp_path):
    (tmp_path / "grid.yaml").write_text("method: [vpt, linear]\nseed: [0, 1]\nlearning_rate: 1e-3\n")
    grid = grid_of(str(tmp_path / "grid.yaml"), "--weight_decay", "0.5")
    assert grid.axes == {"method": ["vpt", "linear"]} and grid.seeds == [0, 1]
    assert grid.common == {"learning_rate": 1e-3, "weight_decay": 0.5}


def test_folder_names_are_short_safe_and_distinct():
    found = {folder_name({"dataset_name": "a/b", "x": "y" * n}) for n in (150, 151)} | {
        folder_name({"dataset_name": "a_b"})
    }
    assert len(found) == 3 and all("/" not in name and len(name) < 140 for name in found)
    assert folder_name({}) == "default"
