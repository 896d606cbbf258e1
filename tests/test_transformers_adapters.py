"""transformers' own adapter methods on a model with prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_fixtures import CONFIGS, MAIN, images, logits, lora, needs_heads_to_load, randomize, trainable, vit
from torch import nn

from vpt_peft.tuners.vpt.parameters import find_parameters


def injected(name: str = "deep", adapter_name: str = "a", **given: Any) -> nn.Module:
    model = vit()
    model.add_adapter(CONFIGS[name](**given), adapter_name)
    return randomize(model, 1, trainable_only=True).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_add_and_disable(name: str):
    base = logits(vit(), images())
    # With modules_to_save transformers disables the head but does not enable it again.
    model = injected(name, modules_to_save=[])
    prompted = logits(model, images())
    assert (prompted - base).abs().max() > 0.1 and model.active_adapters() == ["a"]
    twin = get_peft_model(vit(), CONFIGS[name](modules_to_save=[]), adapter_name="a")
    randomize(twin, 1, trainable_only=True).eval()
    assert torch.equal(logits(twin, images()), prompted)
    model.disable_adapters()
    assert torch.equal(logits(model, images()), base)
    model.enable_adapters()
    assert torch.equal(logits(model, images()), prompted)


def test_add_trains_prompts_and_head_only():
    model = injected()
    assert {n.split(".")[0] for n in trainable(model)} == {"prompt_tuner", "classifier"}
    assert all("vpt_prompts" in n or "modules_to_save" in n for n in trainable(model))
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(CONFIGS["deep"](), "a")


def test_switch_and_delete():
    # The heads of inactive adapters stay trainable in transformers, so `randomize` would reach them.
    model = injected(modules_to_save=[])
    first = logits(model, images())
    model.add_adapter(CONFIGS["shallow"](modules_to_save=[]), "b")
    randomize(model, 2, trainable_only=True)
    assert model.active_adapters() == ["b"]
    second = logits(model, images())
    model.set_adapter("a")
    assert torch.equal(logits(model, images()), first)
    model.set_adapter("b")
    assert torch.equal(logits(model, images()), second)
    model.set_adapter("a")
    model.delete_adapter("b")
    assert torch.equal(logits(model, images()), first)
    assert not [key for key in model.state_dict() if ".b." in key] and "b" not in find_parameters(model).configs
    with pytest.raises(ValueError):
        model.delete_adapter("b")


def test_state_dict_of_an_adapter():
    model = injected()
    model.add_adapter(CONFIGS["shallow"](), "b")
    model.set_adapter("a")
    keys = {f"prompt_tuner.vpt_prompts.{index}" for index in range(3)}
    head = {"classifier.weight", "classifier.bias"}
    assert set(model.get_adapter_state_dict("a")) == keys | head
    assert set(model.get_adapter_state_dict("b")) == {"prompt_tuner.vpt_prompts.0"} | head
    assert torch.equal(
        model.get_adapter_state_dict("a")["prompt_tuner.vpt_prompts.1"],
        find_parameters(model).vpt_prompts["a"]["1"],
    )


@needs_heads_to_load
@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name: str, tmp_path: Path):
    """What transformers saved loads in transformers and in PEFT, under any name, bit by bit."""
    model = injected(name, "default")
    expected = logits(model, images())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "model.safetensors").exists()
    for adapter_name in ("default", "other"):
        again = vit()
        info = again.load_adapter(str(tmp_path), adapter_name)
        assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
        assert torch.equal(logits(again.eval(), images()), expected)
    peft = PeftModel.from_pretrained(vit(), tmp_path).eval()
    assert torch.equal(logits(peft, images()), expected)


@needs_heads_to_load
@pytest.mark.parametrize("name", MAIN)
def test_load_what_peft_saved(name: str, tmp_path: Path):
    source = randomize(get_peft_model(vit(), CONFIGS[name]()), 1, trainable_only=True).eval()
    source.save_pretrained(tmp_path)
    model = vit()
    info = model.load_adapter(str(tmp_path), "first", is_trainable=True)
    assert not info.missing_keys
    assert torch.equal(logits(model.eval(), images()), logits(source, images()))
    assert [n for n in trainable(model) if ".first." in n]


@pytest.mark.parametrize("other", ["gated", "lora"])
def test_load_beside_another_kind(other: str, tmp_path: Path):
    """A file of prompts loaded where another method already is: no keys are reported missing that are not."""
    source = randomize(get_peft_model(vit(), CONFIGS["deep"](modules_to_save=[])), 1, trainable_only=True).eval()
    source.save_pretrained(tmp_path)
    model = vit()
    model.add_adapter(lora() if other == "lora" else CONFIGS[other](modules_to_save=[]), "present")
    info = model.load_adapter(str(tmp_path), "loaded")
    assert not info.missing_keys and not info.mismatched_keys
    model.set_adapter("loaded")
    assert torch.equal(logits(model.eval(), images()), logits(source, images()))


@needs_heads_to_load
def test_load_one_after_the_other(tmp_path: Path):
    """Frozen adapters with heads: the head that is active is found, although a new tuner does not know of it."""
    model, expected = vit(), {}
    for number, name in enumerate(("a", "b", "c")):
        source = randomize(get_peft_model(vit(), CONFIGS["deep"]()), number, trainable_only=True).eval()
        source.save_pretrained(tmp_path / name)
        expected[name] = logits(source, images())
        model.load_adapter(str(tmp_path / name), name)
    for name in expected:
        model.set_adapter(name)
        assert torch.equal(logits(model.eval(), images()), expected[name])


def test_a_refused_adapter_leaves_the_model():
    model = vit()
    before, keys = logits(model, images()), list(model.state_dict())
    with pytest.raises(ValueError, match="layers_to_transform"):
        model.add_adapter(CONFIGS["deep"](layers_to_transform=[5]), "a")
    assert torch.equal(logits(model, images()), before) and list(model.state_dict()) == keys
    assert not find_parameters(model) and not getattr(model, "peft_config", {})
    model.add_adapter(CONFIGS["deep"](), "a")
    prompted = logits(model, images())
    with pytest.raises(ValueError, match="layers_to_transform"):
        model.add_adapter(CONFIGS["deep"](layers_to_transform=[5]), "b")
    assert torch.equal(logits(model, images()), prompted)


def test_no_hooks_are_doubled():
    """Adding adapters does not register hooks again: tokens come in once."""
    model = injected("deep_tokens")
    lengths: list[int] = []
    model.vit.layers[1].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.add_adapter(CONFIGS["deep_tokens"](num_virtual_tokens=6), "b")
    logits(model, images())
    assert lengths == [17 + 6]
