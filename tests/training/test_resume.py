"""A resumed run is the same run or is refused, damaged checkpoints are passed over, and no secret is written."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from vpt_peft.training.output import claim_output_dir
from vpt_peft.training.resume import checkpoints_of, damage, last_checkpoint


pytest_plugins = ["training_fixtures"]

GIVEN = {
    "method": "vpt",
    "num_train_epochs": 3,
    "max_train_samples": 64,
    "init_method": "random",
    "save_total_limit": 3,
}


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def original(tiny_vit, tmp_path_factory):
    from training_fixtures import short_run

    from vpt_peft.training.train import train

    out = tmp_path_factory.mktemp("original") / "out"
    train(short_run(tiny_vit, out, **GIVEN))
    return out


@pytest.fixture
def broken_off(original, tmp_path):
    """The same run as if it had been killed after two of three epochs."""
    out = tmp_path / "out"
    shutil.copytree(original, out)
    for path in [*out.glob("*.json"), *out.glob("*.safetensors"), out / "README.md"]:
        if path.name != "training_config.json":
            path.unlink(missing_ok=True)
    shutil.rmtree(checkpoints_of(out)[0])
    return out


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "adapter_model.safetensors")


def test_whole_checkpoints(original):
    found = checkpoints_of(original)
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert [damage(path) for path in found] == [None, None, None]


@pytest.mark.parametrize("wanted", ["last", "auto", "true"])
def test_resumes_to_the_same_weights(broken_off, original, run, wanted):
    run(**GIVEN, resume_from_checkpoint=wanted)
    mine, theirs = weights(broken_off), weights(original)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 7}, "seed was None and is 7"),
        ({"learning_rate": 0.5}, "learning_rate was .* and is 0.5"),
        ({"method": "vpt_shallow"}, "method was 'vpt' and is 'vpt_shallow'"),
        ({"num_virtual_tokens": 3}, "num_virtual_tokens was 10 and is 3"),
        ({"max_train_samples": 60}, "max_train_samples was 64 and is 60"),
        ({"num_train_epochs": 4}, "num_train_epochs was 3.* and is 4"),
        ({"per_device_train_batch_size": 16}, "per_device_train_batch_size was 32 and is 16"),
    ],
)
@pytest.mark.parametrize("wanted", ["last", "auto"])
def test_another_run_is_refused_before_anything_is_written(broken_off, run, given, message, wanted):
    before = content(broken_off)
    with pytest.raises(ValueError, match=f"other arguments .*{message}"):
        run(**{**GIVEN, **given}, resume_from_checkpoint=wanted)
    assert content(broken_off) == before


def test_what_does_not_matter_may_differ(broken_off, run, original):
    run(**GIVEN, resume_from_checkpoint="last", per_device_eval_batch_size=7, report_to="none")
    assert all(torch.equal(value, weights(original)[name]) for name, value in weights(broken_off).items())
    # It goes on as it was begun
    assert "per_device_eval_batch_size" not in json.loads((broken_off / "training_config.json").read_text())


def test_the_same_images_per_step_in_other_portions_are_the_same_run(broken_off, run):
    metrics, _ = run(
        **GIVEN, resume_from_checkpoint="last", per_device_train_batch_size=16, gradient_accumulation_steps=2
    )
    assert metrics["epoch"] == 3


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("harm", ["missing", "empty", "cut"])
def test_a_damaged_checkpoint_is_named_and_passed_over(broken_off, name, harm, make_arguments, caplog):
    from vpt_peft.training.output import prepare_output_dir

    newest, before = checkpoints_of(broken_off)
    path = newest / name
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(b"" if harm == "empty" else data[: len(data) // 2])
    assert name in damage(newest)
    arguments = make_arguments(**GIVEN, resume_from_checkpoint="last")
    with caplog.at_level(logging.WARNING, "vpt_peft"):
        assert prepare_output_dir(arguments.training, arguments.record()) == before
    assert f"{newest} cannot be resumed from ({name}" in caplog.text
    if name != "trainer_state.json":
        arguments = make_arguments(**GIVEN, resume_from_checkpoint=str(newest))
        with pytest.raises(ValueError, match=f"is damaged: {name}"):
            prepare_output_dir(arguments.training, arguments.record())
    # It goes when the run goes on, so that its files do not mix with those of the run
    with claim_output_dir(arguments.training, {}, before):
        assert checkpoints_of(broken_off) == [before]


def test_auto_starts_where_nothing_was_saved_yet(run, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        out.mkdir(exist_ok=True)
        (out / "training_config.json").write_text('{"seed": 99}')
        (out / ".saving-abc").mkdir(exist_ok=True)
        (out / ".training_config.json.123").write_text("half")
        metrics, _ = run(method="linear", resume_from_checkpoint="auto")
        assert metrics["test_samples"] == 50
        assert not list(out.glob(".*"))
        assert json.loads((out / "training_config.json").read_text())["method"] == "linear"
        shutil.rmtree(out)


def test_auto_does_not_replace_a_result(run, tmp_path):
    run(method="linear", save_strategy="no", load_best_model_at_end=False)
    before = content(tmp_path / "out")
    with pytest.raises(FileExistsError, match="results of an earlier run"):
        run(method="linear", save_strategy="no", load_best_model_at_end=False, resume_from_checkpoint="auto")
    assert content(tmp_path / "out") == before


def test_a_result_that_another_run_has_just_written_is_not_replaced(make_arguments, run, tmp_path):
    from vpt_peft.training.output import prepare_output_dir

    late = make_arguments(method="linear", save_strategy="no", load_best_model_at_end=False)
    prepare_output_dir(late.training, late.record())
    run(method="linear", seed=5, save_strategy="no", load_best_model_at_end=False)
    before = content(tmp_path / "out")
    with pytest.raises(FileExistsError, match="results of an earlier run"):
        with claim_output_dir(late.training, late.record()):
            pass
    assert content(tmp_path / "out") == before


def test_a_checkpoint_of_nobody_knows_what(broken_off, run):
    (broken_off / "training_config.json").write_text("{")
    with pytest.raises(ValueError, match="it is not known what run it is of"):
        run(**GIVEN, resume_from_checkpoint="last")


def test_tokens_are_in_nothing_that_a_run_writes_or_sends(run, hub, tmp_path):
    token = hub.token
    metrics, out = run(
        method="vpt",
        num_train_epochs=2,
        hub_token=token,
        token=token,
        push_to_hub=True,
        hub_model_id="user/secret",
        hub_strategy="all_checkpoints",
    )
    assert list(out.glob("checkpoint-*/training_args.bin"))
    written = content(tmp_path)
    sent = {
        name: data
        for (_, repo) in hub.repos.items()
        for files in repo.commits.values()
        for name, data in files.items()
    }
    assert any("checkpoint" in name for name in sent) and len(written) > 20
    for name, data in [*written.items(), *sent.items()]:
        assert token.encode() not in data, name


def test_pickled_arguments_hold_no_token(make_arguments):
    training = make_arguments(hub_token="hf_secret").training
    assert training.hub_token == "hf_secret" and b"hf_secret" not in pickle.dumps(training)


def test_two_runs_that_begin_together(tiny_vit, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vpt_peft", "train", "--model_name_or_path", tiny_vit, "--dataset_name", "digits",
               "--max_train_samples", "64", "--max_eval_samples", "20", "--max_predict_samples", "20", "--method", "linear",
               "--num_train_epochs", "1", "--save_strategy", "no", "--load_best_model_at_end", "False", "--use_cpu",
               "--output_dir", str(out)]  # fmt: skip
    runs = [subprocess.Popen([*command, "--seed", str(seed)], stderr=subprocess.PIPE, text=True) for seed in (1, 2)]
    said = [process.communicate(timeout=300)[1] for process in runs]
    codes = [process.returncode for process in runs]
    assert sorted(codes) == [0, 2], said
    lost = said[codes.index(2)]
    assert "another run is writing to it" in lost or "results of an earlier run" in lost
    assert json.loads((out / "training_config.json").read_text())["seed"] == codes.index(0) + 1


def test_last_checkpoint_of_an_empty_folder(tmp_path):
    assert last_checkpoint(tmp_path) is None
