"""Files and adapters that are refused halfway leave the model and its adapters as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_fixtures import CONFIGS, images, logits, randomize, vit
from safetensors.torch import load_file, save_file

from vpt_peft import VPTConfig
from vpt_peft.tuners.vpt.parameters import find_parameters


def attach(name: str) -> PeftModel:
    """A model with an adapter that holds values."""
    return randomize(get_peft_model(vit(), CONFIGS[name]()), 1, trainable_only=True).eval()  # type: ignore[return-value]


def damage(folder: Path) -> None:
    """Take the last prompt of each set out of a file."""
    path = folder / "adapter_model.safetensors"
    save_file({k: v[:-1].clone() if "prompts" in k else v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize("number", [1, 2])
def test_an_unfit_file_leaves_a_trained_adapter(number: int, tmp_path: Path):
    """Loaded under the name of an adapter that holds values: an error, and the values stay."""
    attach("deep").save_pretrained(tmp_path)
    damage(tmp_path)
    model = attach("deep")
    for other in range(1, number):
        model.add_adapter(f"other_{other}", VPTConfig(num_virtual_tokens=2))
    before, values = logits(model, images()), {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this model"):
        model.load_adapter(tmp_path, "default")
    assert list(model.peft_config)[0] == "default" and model.active_adapter == "default"
    assert torch.equal(logits(model, images()), before)
    after = model.state_dict()
    assert list(after) == list(values) and all(torch.equal(after[n], v) for n, v in values.items())


def test_an_unfit_file_for_prompts_as_drawn(tmp_path: Path):
    """The adapter stays as it was drawn; a file that fits loads into it."""
    attach("deep").save_pretrained(tmp_path / "bad")
    damage(tmp_path / "bad")
    good = attach("deep")
    good.save_pretrained(tmp_path / "good")
    model = get_peft_model(vit(), CONFIGS["deep"]()).eval()
    before = logits(model, images())
    with pytest.raises(ValueError, match="does not fit"):
        model.load_adapter(tmp_path / "bad", "default")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model, images()), before)
    model.load_adapter(tmp_path / "good", "default")
    assert torch.equal(logits(model, images()), logits(good, images()))


def test_a_name_that_ends_like_the_head(tmp_path: Path):
    """PEFT looks for heads by the ends of their paths and would take the adapter for one."""
    model = randomize(get_peft_model(vit(), CONFIGS["deep"](), adapter_name="bird_classifier"), 1, trainable_only=True)
    model.add_adapter("car_classifier", CONFIGS["deep"]())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path / "bird_classifier", adapter_name="bird_classifier")
    assert torch.equal(logits(loaded.eval(), images()), logits(model.eval(), images()))


@pytest.mark.parametrize("given", [{"modules_to_save": ["layers"]}])
def test_what_peft_would_stumble_over_halfway(given: dict[str, Any]):
    """A module that cannot be trained as a whole: nothing is attached, nothing added."""
    name = "birds"
    model = vit()
    before, keys = logits(model, images()), list(model.state_dict())
    config = CONFIGS["deep"](**given)
    with pytest.raises((TypeError, ValueError), match="cannot be applied"):
        get_peft_model(model, config, adapter_name=name)
    assert config.modules_to_save == given["modules_to_save"]
    assert find_parameters(model) is None and list(model.state_dict()) == keys
    assert torch.equal(logits(model, images()), before)
    prompted = get_peft_model(model, CONFIGS["deep"](), adapter_name="first")
    before, keys = logits(prompted, images()), list(prompted.state_dict())
    with pytest.raises((TypeError, ValueError), match="cannot be applied"):
        prompted.add_adapter(name, CONFIGS["deep"](**given))
    assert list(prompted.peft_config) == ["first"] and list(prompted.state_dict()) == keys
    assert torch.equal(logits(prompted, images()), before)
    prompted.add_adapter("birds", CONFIGS["deep"]())
