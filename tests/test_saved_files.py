"""Adapter files saved by version 0.1 give the outputs they gave then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_fixtures import needs_heads_to_load
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

import vpt_peft  # noqa: F401


SAVED = Path(__file__).parent / "saved"
OUTPUTS = load_file(SAVED / "outputs.safetensors")


def backbone() -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(SAVED / "backbone").eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=OUTPUTS["pixel_values"]).logits


@pytest.mark.parametrize("name", ["deep", "bias", "gated"])
def test_outputs_are_those_of_then(name: str):
    """`bias` holds the backbone's own biases, of which only the difference from the backbone becomes the adapter's."""
    base = backbone()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, SAVED / name)
    torch.testing.assert_close(logits(model), OUTPUTS[name], rtol=0, atol=2e-5)
    assert (OUTPUTS[name] - OUTPUTS["base"]).abs().max() > 0.5
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), OUTPUTS["base"], rtol=0, atol=2e-6)
    assert all(torch.equal(value, model.get_base_model().state_dict()[key]) for key, value in before.items()
               if not key.startswith("classifier"))  # fmt: skip


@pytest.mark.parametrize("name", ["deep", "bias", "gated"])
def test_saved_again_holds_no_key_of_the_backbone(name: str, tmp_path: Path):
    PeftModel.from_pretrained(backbone(), SAVED / name).save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all("prompt_tuner." in key or "classifier." in key for key in keys)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(backbone(), tmp_path)), OUTPUTS[name], rtol=0, atol=2e-5
    )


@needs_heads_to_load
@pytest.mark.parametrize("name", ["deep", "gated"])
def test_transformers_loads_them(name: str, tmp_path: Path):
    shutil.copytree(SAVED / name, tmp_path / name)
    model = AutoModelForImageClassification.from_pretrained(SAVED / "backbone")
    model.load_adapter(str(tmp_path / name))
    torch.testing.assert_close(logits(model), OUTPUTS[name], rtol=0, atol=2e-5)
