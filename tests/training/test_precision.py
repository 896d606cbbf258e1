"""Low precision at the highest rates of the papers' grids: finite to the end, or stopped with the last good state kept."""

import math

import pytest
import torch
from safetensors.torch import load_file

from vpt_peft.training.resume import last_checkpoint
from vpt_peft.training.trainer import TrainingDiverged


pytest_plugins = ["training_fixtures"]

HIGHEST = {
    "vpt": {"recipe": "vpt_paper", "base_learning_rate": 50},
    "gated_vpt": {"recipe": "gpt_paper", "learning_rate": 5},
}


def are_finite(folder):
    return all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "adapter_model.safetensors").values())


@pytest.mark.parametrize("method", HIGHEST)
def test_a_whole_schedule_at_the_highest_rate_in_bfloat16(run, method):
    metrics, out = run(method=method, bf16=True, use_cpu=True, num_train_epochs=6, **HIGHEST[method])
    assert metrics["epoch"] == 6 and math.isfinite(metrics["train_loss"]) and math.isfinite(metrics["eval_loss"])
    assert are_finite(out)
    weights = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_beyond_them_a_run_is_stopped_and_what_was_good_is_kept(run, tmp_path):
    """The first step of the warm-up has a rate of zero; those after it overflow float32."""
    given = {"method": "vpt", "learning_rate": 1e38, "prompt_learning_rate": 1e38, "head_learning_rate": 1e38}
    each_step = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    with pytest.raises(TrainingDiverged, match="Lower the learning rate"):
        run(**given, **each_step, optim="sgd", max_grad_norm=0.0, bf16=True, use_cpu=True, num_train_epochs=6)
    checkpoint = last_checkpoint(tmp_path / "out")
    assert checkpoint is not None and are_finite(checkpoint)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
