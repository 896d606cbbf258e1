"""The checks that PEFT's own tests make of the files of every method; see test_peft_judgement.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from judged_models import KINDS, attach, base, every, still
from peft import (
    PeftModel,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file


@every
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_save_pretrained(encoder: str, kind: str, safe: bool, tmp_path: Path):
    model = attach(encoder, kind)
    model.add_adapter("other", KINDS[kind]())
    model.eval().save_pretrained(tmp_path, safe_serialization=safe)
    name = "adapter_model.safetensors" if safe else "adapter_model.bin"
    for folder in (tmp_path, tmp_path / "other"):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        # One card stands for all
        assert names - {"README.md"} == {name, "adapter_config.json"} and (tmp_path / "README.md").exists()
        held = json.loads((folder / "adapter_config.json").read_text())
        assert held["peft_type"] == model.peft_config["default"].peft_type.value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base(encoder), tmp_path)
        result = loaded.load_adapter(tmp_path / "other", "other")
    assert not result.missing_keys and not any("missing adapter keys" in str(each.message) for each in caught)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@every
def test_only_the_chosen_adapter_is_saved(encoder: str, kind: str, tmp_path: Path):
    model = attach(encoder, kind)
    count = len(get_peft_model_state_dict(model))
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, KINDS[kind]())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == count
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@every
def test_a_configuration_that_is_given(encoder: str, kind: str, tmp_path: Path):
    model = attach(encoder, kind)
    model.save_pretrained(tmp_path)
    config = model.peft_config["default"]
    loaded = PeftModel.from_pretrained(base(encoder), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode
    assert not any(p.requires_grad for p in loaded.parameters())


@every
def test_several_are_loaded(encoder: str, kind: str, tmp_path: Path):
    attach(encoder, kind).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(encoder), tmp_path)
    for name in ("other", "yet-another"):
        assert loaded.load_adapter(tmp_path, name).missing_keys == []
    expected = still(loaded)
    loaded.set_adapter("yet-another")
    assert torch.equal(still(loaded.eval()), expected)
