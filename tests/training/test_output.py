"""The output folder under stress: two runs at once, a full disk, an overwrite that cannot begin."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_fixtures import ROOT
from safetensors.torch import load_file, save_file

from vpt_peft.files import write_whole
from vpt_peft.training.output import claim_output_dir, full_disk_explained
from vpt_peft.training.resume import last_checkpoint


pytest_plugins = ["training_fixtures"]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("given", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "last"}])
def test_a_second_run_leaves_the_first_alone(run, copied, make_arguments, given):
    _, out = copied(method="linear")
    if not given:
        for path in (out / "all_results.json", out / "vpt_peft_baseline.json", *out.glob("checkpoint-*/*")):
            path.unlink()
    training = make_arguments(method="linear", overwrite_output_dir=True).training
    with claim_output_dir(training, {"mine": 1}, out / "checkpoint-1"):
        before = content(out)
        with pytest.raises(FileExistsError, match="another run is writing to it"):
            run(method="linear", **given)
        assert content(out) == before and (out / ".lock").exists()
    assert not (out / ".lock").exists()


def test_the_lock_of_a_killed_run_does_not_hold(run, make_arguments, tmp_path):
    training = make_arguments().training
    child = os.fork()
    if child == 0:
        with claim_output_dir(training, {}):
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL and (tmp_path / "out" / ".lock").exists()
    metrics, out = run(method="linear")
    assert metrics["test_samples"] == 50 and not (out / ".lock").exists()


@pytest.mark.parametrize("given", [{"dataset_name": "no/such-data"}, {"model_name_or_path": "no/such-model"}])
def test_an_overwrite_that_cannot_begin_removes_nothing(run, copied, monkeypatch, given):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, out = copied(method="linear")
    before = content(out)
    with pytest.raises(OSError, match="no/such"):
        run(method="linear", overwrite_output_dir=True, **given)
    assert content(out) == before and last_checkpoint(out) is not None


@pytest.fixture
def file_limit():
    """Set the most bytes a file may have; writing more fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write", [lambda path: save_file({"a": torch.zeros(9999)}, path), lambda path: torch.save(torch.zeros(9999), path)]
)
def test_libraries_errors_of_writing_become_one(tmp_path, file_limit, write):
    file_limit(10_000)
    with pytest.raises(OSError, match="cannot be written to.*Make room there"), full_disk_explained(tmp_path):
        write(tmp_path / "weights")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), FileNotFoundError(2, "no image")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, full_disk_explained(tmp_path):
        raise error
    assert caught.value is error


def test_disk_that_fills_up_during_training(run, make_arguments, file_limit, tmp_path):
    _, out = run(method="full", max_steps=3, save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1)
    weights = load_file(out / "model.safetensors")
    file_limit(60_000)
    with pytest.raises(OSError, match="No checkpoint is complete; start again with --overwrite_output_dir"):
        run(method="full", overwrite_output_dir=True, seed=3)
    kept = load_file(out / "model.safetensors")
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    # What broke off neither stands in the way nor is taken for a checkpoint
    file_limit(resource.RLIM_INFINITY)
    _, out = run(method="full", overwrite_output_dir=True, seed=3)
    assert any(not torch.equal(weights[name], value) for name, value in load_file(out / "model.safetensors").items())


def test_text_is_written_whole_or_not_at_all(tmp_path, file_limit):
    path = tmp_path / "table.csv"
    write_whole(path, "old")
    file_limit(100)
    with pytest.raises(OSError):
        write_whole(path, "x" * 1000)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_a_lock_that_cannot_be_removed_does_not_hide_the_error(make_arguments, monkeypatch, tmp_path):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with pytest.raises(OSError, match="cannot be written to.*No checkpoint is complete"):
        with claim_output_dir(make_arguments().training, {}) as folder, full_disk_explained(folder):
            monkeypatch.setattr(Path, "unlink", refuse)
            raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a file system of its own")
def test_disks_that_are_full_at_any_write(tmp_path):
    """Real ones, of a few sizes; all of them are a campaign of benchmarks.full_disk."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    command = ["unshare", "-rm", sys.executable, "-m", "benchmarks.full_disk", "--methods", "vpt"]
    found = tmp_path / "found.json"
    done = subprocess.run(
        [*command, "--every", "20", "--output", str(found)],
        capture_output=True, text=True, timeout=400, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(found.read_text())
    assert outcomes["vpt: full disk"]["refused"] >= 2 and outcomes["vpt: read-only"]["refused"] >= 3
    assert not any(each["wrong"] for each in outcomes.values())
