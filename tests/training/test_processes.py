"""Training in two processes by the program equals training in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_fixtures import short_run
from training_workers import launch

from vpt_peft.training.arguments import parse_args
from vpt_peft.training.train import train


pytest_plugins = ["training_fixtures"]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed training")
TOLERANCE = 1e-6
IMAGES = 32
# 90 images leave process 1 with ten in its last batch of 16, 70 leave it with none
CASES: dict[str, dict[str, Any]] = {
    "deep": {"method": "vpt", "max_train_samples": 90},
    "checkpointed": {"method": "vpt", "max_train_samples": 70, "gradient_checkpointing": True},
    "accumulated": {"method": "vpt_shallow", "max_train_samples": 70, "gradient_accumulation_steps": 2},
    "gated": {"method": "gated_vpt", "max_train_samples": 70},
    "linear": {"method": "linear", "max_train_samples": 90},
}


def flags(case: str, backbone: str, folder: Path, processes: int) -> dict[str, Any]:
    batch = IMAGES // processes // CASES[case].get("gradient_accumulation_steps", 1)
    given = {"per_device_train_batch_size": batch, "logging_steps": 1, "logging_strategy": "steps", **CASES[case]}
    return short_run(backbone, folder / case, **given).given


@pytest.fixture(scope="module")
def pairs(tiny_vit: str, tmp_path_factory: pytest.TempPathFactory):
    """Per way: the folder of runs in two processes and what was found; under "one" those of a single process."""
    ran: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(way: str) -> tuple[Path, dict[str, Any]]:
        if way not in ran:
            folder = tmp_path_factory.mktemp(way)
            processes = 1 if way == "one" else 2
            cases = {case: flags(case, tiny_vit, folder, processes) for case in CASES}
            if way == "one":
                # As many threads as the processes have: sums of another order differ by more than the tolerance
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                try:
                    found = {case: {"metrics": train(parse_args(given))} for case, given in cases.items()}
                finally:
                    torch.set_num_threads(threads)
            else:
                found = launch(cases, folder)
            ran[way] = folder, found
        return ran[way]

    return get


def weights(folder: Path) -> dict[str, torch.Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    assert paths, f"no weights in {folder}"
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(pairs, case: str):
    (ours, found), (theirs, single) = pairs("ddp"), pairs("one")
    assert "error" not in found[case], found[case]["error"]
    assert found[case]["processes"] == 2 and found[case]["wrapper"] == "DistributedDataParallel"
    trained, expected = weights(ours / case), weights(theirs / case)
    assert set(trained) == set(expected)
    for name in expected:
        difference = (trained[name] - expected[name]).abs().max().item()
        assert difference < TOLERANCE, (name, difference)
    for name in ("train_loss", "eval_loss", "eval_accuracy", "test_loss", "test_accuracy", "eval_samples"):
        assert abs(found[case]["metrics"][name] - single[case]["metrics"][name]) < TOLERANCE, name


def test_accumulation_equals_one_batch(pairs, tiny_vit: str, tmp_path: Path):
    """Four batches of eight, the last ones uneven, are one of 32."""
    pairs("one")
    split = short_run(
        tiny_vit,
        tmp_path,
        **CASES["gated"],
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
    )
    train(split)
    expected = weights(pairs("one")[0] / "gated")
    for name, tensor in weights(tmp_path).items():
        assert (tensor - expected[name]).abs().max() < TOLERANCE, name
