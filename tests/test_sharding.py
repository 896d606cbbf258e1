"""Training in two processes: FSDP2 replaces parameters, DDP averages gradients; both give the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from peft import get_peft_model_state_dict
from sharding_workers import build, plain_gradients, train


NAMES = ["deep", "shallow", "gated"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """What two processes computed for every configuration; they are started once."""
    folder = tmp_path_factory.mktemp("sharding")
    mp.spawn(train, args=(NAMES, str(folder)), nprocs=2, join=True)
    return torch.load(Path(folder) / "found.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["fsdp", "ddp"])
def test_gradients_of_two_processes(found, name: str, way: str):
    expected, gradients = plain_gradients(name), found[name][way]
    assert set(gradients) == set(expected)
    for key, gradient in expected.items():
        assert torch.allclose(gradients[key], gradient, rtol=1e-4, atol=1e-5), key


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed training")
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_of_a_sharded_model(found, name: str):
    """Sharding drops no prompt from the adapter's file."""
    expected, state = get_peft_model_state_dict(build(name)), found[name]["state"]
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
