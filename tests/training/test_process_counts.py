"""Runs of two real processes: one is killed, and the run goes on with two or one; a run of one goes on with two."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft_fixtures import ROOT
from safetensors.torch import load_file
from training_fixtures import short_run

from vpt_peft.training.output import lost_process_explained
from vpt_peft.training.resume import checkpoints_of, damage
from vpt_peft.training.train import train


pytest_plugins = ["training_fixtures"]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed training")
TOLERANCE = 1e-6
GIVEN = {
    "method": "vpt",
    "init_method": "random",
    "num_train_epochs": 12,
    "max_train_samples": 64,
    "max_eval_samples": 20,
    "max_predict_samples": 20,
    "save_total_limit": 20,
    "use_cpu": True,
}
RESULTS = ("adapter_*", "*_results.json", "README.md", "trainer_state.json", "preprocessor_config.json")


def start(backbone: str, out: Path, batch: int) -> list[subprocess.Popen[str]]:
    """Start the program in two processes that nothing watches over, as a scheduler does."""
    arguments = short_run(backbone, out, **GIVEN, per_device_train_batch_size=batch, resume_from_checkpoint="auto")
    flags = [f"--{name}={value}" for name, value in arguments.given.items()]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "vpt_peft", "train", *flags],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]


@contextlib.contextmanager
def one_thread():
    """As many as the processes have: sums of another order differ by more than the tolerance."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(backbone: str, out: Path, batch: int = 32, **given):
    with one_thread():
        return train(short_run(backbone, out, **GIVEN, per_device_train_batch_size=batch, **given))


def assert_equal_weights(out: Path, expected: Path):
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, expected))
    assert mine.keys() == theirs.keys()
    assert max((mine[name] - theirs[name]).abs().max().item() for name in theirs) < TOLERANCE


@pytest.fixture(scope="module")
def undisturbed(tiny_vit, tmp_path_factory):
    """A run of one process from start to end."""
    out = tmp_path_factory.mktemp("one") / "out"
    alone(tiny_vit, out)
    return out


@pytest.fixture(scope="module")
def killed(tiny_vit, tmp_path_factory):
    """A run of two processes after one was killed: its folder, how long the other lived, its exit code and its words."""
    out = tmp_path_factory.mktemp("two") / "out"
    survivor, victim = start(tiny_vit, out, 16)
    end = time.monotonic() + 300
    while not any(damage(path) is None for path in checkpoints_of(out)):
        assert survivor.poll() is victim.poll() is None and time.monotonic() < end, survivor.communicate()[1]
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    _, said = survivor.communicate(timeout=120)
    assert victim.wait() == -signal.SIGKILL
    victim.stderr.close()
    return out, time.monotonic() - killed_at, survivor.returncode, said


def test_a_killed_process_ends_the_run_with_one_line(killed):
    out, seconds, code, said = killed
    assert code == 2 and seconds < 60
    assert "vpt-peft train: another process of this run has ended, so this one ends too" in said
    newest = re.search(r"(\S+checkpoint-\d+) is complete: continue with --resume_from_checkpoint last", said)
    assert newest and damage(Path(newest[1])) is None
    assert "Traceback" not in said and not (out / "adapter_model.safetensors").exists()
    assert len(list(Path(newest[1]).glob("rng_state_*.pth"))) == 2


def test_a_run_of_two_goes_on_alone(killed, undisturbed, tiny_vit, tmp_path):
    out = Path(shutil.copytree(killed[0], tmp_path / "out"))
    alone(tiny_vit, out, resume_from_checkpoint="last")
    assert_equal_weights(out, undisturbed)


def test_a_run_of_two_is_not_resumed_alone_with_half_the_images(killed, tiny_vit, tmp_path):
    out = Path(shutil.copytree(killed[0], tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"2 processes with 32 images per step, and this one has 1; .* product is 32"):
        alone(tiny_vit, out, batch=16, resume_from_checkpoint="last")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_random_state_of_one_process_is_missing(killed, tmp_path):
    out = Path(shutil.copytree(killed[0], tmp_path / "out"))
    newest = next(path for path in checkpoints_of(out) if damage(path) is None)
    (newest / "rng_state_1.pth").unlink()
    assert damage(newest) == "rng_state_1.pth is missing"


@pytest.mark.parametrize("begun_by", [1, 2])
def test_a_run_goes_on_with_two(killed, undisturbed, tiny_vit, tmp_path, begun_by):
    out = Path(shutil.copytree(undisturbed if begun_by == 1 else killed[0], tmp_path / "out"))
    for path in [found for name in RESULTS for found in out.glob(name)]:
        path.unlink()
    for path in checkpoints_of(out)[:-2] if begun_by == 1 else []:
        shutil.rmtree(path)
    processes = start(tiny_vit, out, 16)
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert len(list(checkpoints_of(out)[0].glob("rng_state_*.pth"))) == 2
    assert_equal_weights(out, undisturbed)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes differ") as caught, lost_process_explained(tmp_path):
        raise RuntimeError("shapes differ")
    assert type(caught.value) is RuntimeError
