"""Training in two processes under FSDP1, FSDP2 and DDP, by torch's own wrappers, equals one process on the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_fixtures import ROOT, vit
from sharding_workers import NAMES, POLICIES, Found, build, cases, evaluate, fit


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed training")
TOLERANCE = 1e-6
WAYS = {way: list(cases(way)) for way in ("fsdp1", "fsdp2", "ddp")}
ALL = [(way, case) for way, names in WAYS.items() for case in names]
each = pytest.mark.parametrize(("way", "case"), ALL, ids=[f"{way}-{case}" for way, case in ALL])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory):
    """Results of a way by case, and the folder with its adapters; each way is started once."""
    results: dict[str, tuple[dict[str, Found], Path]] = {}

    def run(way: str) -> tuple[dict[str, Found], Path]:
        if way not in results:
            folder = tmp_path_factory.mktemp(way)
            results[way] = (start(way, folder), folder)
        return results[way]

    return run


def start(way: str, folder: Path) -> dict[str, Found]:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = str(ROOT / "tests" / "sharding_workers.py")
    done = subprocess.run(
        [*torchrun, worker, way, str(folder)], capture_output=True, text=True, env=environment, timeout=240
    )
    found = torch.load(folder / "found.pt") if (folder / "found.pt").is_file() else {}
    assert done.returncode or list(found) == WAYS[way]
    return {case: found.get(case, {"error": f"not reached: {done.stderr[-4000:]}"}) for case in WAYS[way]}


@cache
def one_process(name: str) -> tuple[dict[str, torch.Tensor], list[float], torch.Tensor]:
    """Trained values, losses and logits of one process on the joint batches."""
    model = build(name)
    losses = fit(model)
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return values, losses, evaluate(model)


def result(ran, way: str, case: str) -> Found:
    found = ran(way)[0][case]
    assert "error" not in found, found["error"]
    return found


@each
def test_equals_one_process(ran, way: str, case: str):
    name = case.split("-")[0]
    found = result(ran, way, case)
    assert found["processes"] == 2
    values, losses, logits = one_process(name)
    start = dict(build(name).named_parameters())
    for key, value in values.items():
        assert (value - start[key]).abs().max() > 1e-3, f"{key} was not trained"
        assert (found["state"][key] - value).abs().max() < TOLERANCE, key
    first, second = found["losses"]
    assert first != second
    for one, other, joint in zip(first, second, losses, strict=True):
        assert abs((one + other) / 2 - joint) < TOLERANCE
    assert (found["logits"] - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", WAYS["fsdp1"])
def test_fsdp1_shards(ran, case: str):
    """A process holds half of the parameters, in units of blocks."""
    found = result(ran, "fsdp1", case)
    assert found["units"] >= 1 + 3
    assert found["total"] / 2 <= found["held"] < 0.51 * found["total"]


@pytest.mark.parametrize("case", WAYS["fsdp2"])
def test_fsdp2_shards(ran, case: str):
    """A process holds half of the parameters, apart from those with a first dimension of one (class token)."""
    found = result(ran, "fsdp2", case)
    assert 0.5 * found["total"] <= found["held"] < 0.6 * found["total"]


@each
def test_saved_adapter_loads_in_one_process(ran, way: str, case: str):
    found = result(ran, way, case)
    folder = ran(way)[1] / case
    assert (folder / "adapter_model.safetensors").is_file()
    model = PeftModel.from_pretrained(vit(), folder)
    assert (evaluate(model) - found["logits"]).abs().max() < TOLERANCE
    saved = {n for n, p in build(case.split("-")[0]).named_parameters() if p.requires_grad}
    loaded = dict(model.named_parameters())
    assert saved <= set(loaded)
    for key in saved:
        assert torch.equal(loaded[key], found["state"][key]), key


def test_all_ways_are_run():
    assert len(WAYS["fsdp1"]) == 2 * len(NAMES) * len(POLICIES) and WAYS["fsdp2"] == WAYS["ddp"] == NAMES
