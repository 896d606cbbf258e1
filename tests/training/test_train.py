"""Whole runs on a tiny ViT and a few of scikit-learn's digits: files, results, resuming, and how runs fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import vpt_peft.training.train as program
from vpt_peft.data.arguments import DataArguments
from vpt_peft.training.arguments import from_record, parse_args
from vpt_peft.training.evaluation import evaluate_model
from vpt_peft.training.inference import load_adapter_model, read_record
from vpt_peft.training.output import prepare_output_dir
from vpt_peft.training.resume import last_checkpoint
from vpt_peft.training.train import train
from vpt_peft.training.trainer import TrainingDiverged, VPTTrainer


pytest_plugins = ["training_fixtures"]
ROOT = Path(__file__).parents[2]


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["vpt", "linear", "full"])
def test_run_writes_all_that_is_needed(finished, method):
    metrics, out = finished(method=method)
    expected = {
        "vpt": {"adapter_config.json", "adapter_model.safetensors"},
        "linear": {"config.json", "vpt_peft_baseline.json", "vpt_peft_baseline.safetensors"},
        "full": {"config.json", "vpt_peft_baseline.json", "model.safetensors"},
    }[method]
    results = {f"{name}_results.json" for name in ("train", "eval", "test", "all")}
    expected |= results | {"preprocessor_config.json", "README.md", "training_config.json", "trainer_state.json"}
    files = {path.name for path in out.iterdir() if path.is_file()}
    assert files == expected
    everything = json.loads((out / "all_results.json").read_text())
    assert 0 <= everything["eval_accuracy"] <= 1 and everything["test_samples"] == 50
    assert everything["eval_accuracy"] == metrics["eval_accuracy"]
    assert json.loads((out / "eval_results.json").read_text())["eval_accuracy"] == metrics["eval_accuracy"]
    labels = json.loads((out / ("adapter_config.json" if method == "vpt" else "config.json")).read_text())["id2label"]
    assert labels == {str(i): str(i) for i in range(10)}
    model, _ = load_adapter_model(out)
    assert model.config.num_labels == 10


def test_learns_and_keeps_the_best_epoch(run):
    metrics, out = run(
        method="linear", num_train_epochs=6, learning_rate=0.03, max_train_samples=400, per_device_train_batch_size=16
    )
    state = json.loads((out / "trainer_state.json").read_text())
    scores = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry][:6]
    # Chance is 0.1, and the last epoch is not the best
    assert max(scores) > 0.2 and scores[-1] < max(scores)
    assert metrics["eval_accuracy"] == max(scores) == state["best_metric"]
    assert same(weights(out), weights(Path(state["best_model_checkpoint"])))


@pytest.mark.parametrize("method", ["full", "vpt", "mlp", "vpt+lora"])
def test_what_is_saved_gives_the_metrics_that_are_reported(finished, method):
    metrics, out = finished(method=method)
    model, processor = load_adapter_model(out)
    data = from_record(DataArguments, read_record(out))
    for split, name in (("validation", "eval"), ("test", "test")):
        again = evaluate_model(model, processor, data, split)
        assert again["accuracy"] == metrics[f"{name}_accuracy"]
        assert again["loss"] == pytest.approx(metrics[f"{name}_loss"], rel=1e-5)


def test_seed_decides(run, finished):
    _, out = finished(method="vpt")
    first = weights(out)
    for seed, equal in ((42, True), (43, False)):
        _, out = run(method="vpt", seed=seed, overwrite_output_dir=True)
        assert same(first, weights(out)) == equal


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("vpt", {"prompt_dropout": 0.1, "augmentation": "resize_crop_flip"}),
        ("gated_vpt", {}),
        ("lora", {}),
        ("partial", {}),
        ("vpt+lora", {}),
        ("full", {"augmentation": "resize_crop_flip", "optim": "sgd", "optim_args": "momentum=0.9"}),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(run, tmp_path, method, given):
    given = {"method": method, "num_train_epochs": 4, "save_total_limit": 10, "load_best_model_at_end": False, **given}
    _, whole = run(output_dir=str(tmp_path / "whole"), **given)
    halfway = tmp_path / "resumed" / "checkpoint-6"
    shutil.copytree(whole / "checkpoint-6", halfway)
    shutil.copy(whole / "training_config.json", halfway.parent)
    # A checkpoint whose writing broke off is passed over
    (halfway.parent / "checkpoint-9").mkdir()
    _, resumed = run(output_dir=str(halfway.parent), resume_from_checkpoint="last", **given)
    assert same(weights(whole), weights(resumed))
    logs = [json.loads((out / "trainer_state.json").read_text())["log_history"] for out in (whole, resumed)]
    losses = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in logs]
    assert losses[0] == losses[1]


def test_early_stopping(run):
    metrics, _ = run(method="linear", num_train_epochs=10, learning_rate=0.0, early_stopping_patience=2)
    assert metrics["epoch"] == 3


@pytest.mark.parametrize(
    "given",
    [
        {"bf16": True, "use_cpu": True},
        {"gradient_accumulation_steps": 3},
        {"activation_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"init_method": "tokens"},
        {"max_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["vpt", "partial"])
def test_trainer_options(run, method, given):
    if method == "partial" and "init_method" in given:
        pytest.skip("prompts only")
    metrics, out = run(method=method, **given)
    assert 0 < metrics["train_loss"] < 10
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_activation_checkpointing_changes_nothing_but_memory(run, tmp_path):
    results = [
        weights(run(method="partial", output_dir=str(tmp_path / str(flag)), activation_checkpointing=flag)[1])
        for flag in (False, True)
    ]
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


class Poison(TrainerCallback):
    """Sets a weight to a value after some steps."""

    def __init__(self, step, value=float("nan")):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(self.value)


@pytest.mark.parametrize(
    ("step", "value", "kept", "message"),
    [
        (
            1,
            float("nan"),
            None,
            "training loss is nan at step 2.*Lower the learning rate.*No checkpoint was saved yet",
        ),
        # After the last step of the second epoch: seen before the checkpoint is written
        (6, float("nan"), 3, "weights are not finite after step 6.*learning_rate=.*checkpoint-3"),
        (6, 3e38, 3, "evaluation loss is nan after step 6.*learning_rate=.*checkpoint-3"),
        (7, float("nan"), 6, "training loss is nan at step 8.*checkpoint-6"),
    ],
)
def test_nan_stops_and_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch, step, value, kept, message):
    class Poisoned(VPTTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.callback_handler.callbacks.insert(0, Poison(step, value))

    monkeypatch.setattr(program, "VPTTrainer", Poisoned)
    with pytest.raises(TrainingDiverged, match=f"(?s){message}"):
        run(method="linear", num_train_epochs=4)
    out = tmp_path / "out"
    checkpoint = last_checkpoint(out)
    assert not list(out.glob("*.safetensors"))
    assert checkpoint == (out / f"checkpoint-{kept}" if kept else None)
    if checkpoint:
        assert all(torch.isfinite(value).all() for value in weights(checkpoint).values())


@pytest.mark.parametrize(
    ("step", "given", "kept"),
    [(2, {"save_strategy": "steps", "save_steps": 1}, 1), (3, {"save_strategy": "no"}, None)],
    ids=["checkpoint", "result"],
)
def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch, step, given, kept):
    """A gradient may overflow while the loss of the same step is finite, and no evaluation may follow."""

    class Poisoned(VPTTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.callback_handler.callbacks.insert(0, Poison(step))

    monkeypatch.setattr(program, "VPTTrainer", Poisoned)
    with pytest.raises(TrainingDiverged, match=f"weights are not finite after step {step}"):
        run(method="linear", num_train_epochs=1, eval_strategy="no", load_best_model_at_end=False, **given)
    out = tmp_path / "out"
    assert not list(out.glob("*.safetensors"))
    assert last_checkpoint(out) == (out / f"checkpoint-{kept}" if kept else None)
    assert not (out / f"checkpoint-{step}").exists()


def test_foreign_folder_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for given in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "last"}):
        with pytest.raises(FileExistsError, match="thesis|no run of vpt-peft wrote"):
            run(method="linear", **given)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_earlier_results_need_a_flag(run, copied):
    _, out = copied(method="linear")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="--overwrite_output_dir"):
        run(method="linear")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    _, out = run(method="linear", overwrite_output_dir=True, seed=5)
    assert json.loads((out / "training_config.json").read_text())["seed"] == 5


@pytest.mark.parametrize(
    ("wanted", "message"), [("last", "no complete checkpoint"), ("missing", "'missing' is not a complete checkpoint")]
)
def test_nothing_to_resume_from(make_arguments, wanted, message):
    with pytest.raises(FileNotFoundError, match=message):
        prepare_output_dir(make_arguments(resume_from_checkpoint=wanted).training, {})


def test_output_dir_that_is_a_file(make_arguments, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        prepare_output_dir(make_arguments().training, {})


def test_full_disk_leaves_the_old_adapter_whole(run, copied, monkeypatch):
    _, out = copied(method="linear")
    before, card = weights(out), (out / "README.md").read_bytes()

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    saved = program.save_trained
    monkeypatch.setattr(program, "save_trained", lambda model, folder: (saved(model, folder), no_space()))
    with pytest.raises(OSError, match="No space left"):
        run(method="linear", seed=9, overwrite_output_dir=True)
    assert same(weights(out), before) and (out / "README.md").read_bytes() == card
    assert not list(out.glob(".saving-*"))


@pytest.mark.parametrize("given", [{"dataset_name": "no/such-data-set"}, {"model_name_or_path": "no/such-model"}])
def test_nothing_is_written_when_model_or_data_are_missing(run, tmp_path, monkeypatch, given):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no/such"):
        run(**given)
    assert not (tmp_path / "out").exists()


def test_two_processes_write_once_and_train_alike(tiny_vit, tmp_path):
    """Two CPU processes see half of each batch; only the first writes."""
    config = {
        "model_name_or_path": tiny_vit,
        "max_train_samples": 64,
        "max_eval_samples": 20,
        "max_predict_samples": 20,
        "method": "linear",
        "num_train_epochs": 2,
        "disable_tqdm": True,
        "max_grad_norm": 0,
        "use_cpu": True,
    }
    outs = tmp_path / "one", tmp_path / "two"
    train(parse_args({**config, "per_device_train_batch_size": 16, "output_dir": str(outs[0])}))
    (tmp_path / "run.json").write_text(json.dumps({**config, "per_device_train_batch_size": 8}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "vpt_peft"]
    command += ["train", str(tmp_path / "run.json"), "--output_dir", str(outs[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    one, two = (weights(out) for out in outs)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    metrics = [json.loads((out / "all_results.json").read_text()) for out in outs]
    assert metrics[0]["test_accuracy"] == metrics[1]["test_accuracy"]


def test_validation_images_are_trained_on_when_settings_are_chosen(run, make_arguments):
    metrics, folder = run(method="linear", train_on_validation=True)
    assert metrics["train_samples"] == 96 + 50 and metrics["test_samples"] == 50
    assert not any(name.startswith("eval_") for name in metrics) and not (folder / "eval_results.json").exists()
    assert metrics["saved_bytes"] == (folder / "vpt_peft_baseline.safetensors").stat().st_size
    assert "the weights of the last epoch are kept" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="leaves nothing to evaluate on"):
        make_arguments(train_on_validation=True, early_stopping_patience=2)
