"""Biases that train with an adapter: offsets that act like biases of the backbone changed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from encoder_fixtures import build, inputs_of
from peft import PeftModel, get_peft_model
from small_models import images, randomize, tiny_vit
from transformers import SwinConfig, SwinForImageClassification

from vpt_peft import EncoderError, VPTConfig
from vpt_peft.encoder import Projection
from vpt_peft.encoder.biases import BiasTarget
from vpt_peft.tuners.vpt.parameters import find_parameters


PLACES = {
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "mlp": "mlp.fc2",
    "norm": "layernorm_after",
}


def attach(bias: Any, **given: Any) -> PeftModel:
    model = get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3, bias=bias, **given))
    return randomize(model).eval()


def offsets(model: PeftModel, name: str = "default") -> Any:
    return find_parameters(model).adapter(name).parts["biases"]


def logits(model: torch.nn.Module, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=images(), **given).logits


def by_hand(model: PeftModel, name: str = "default") -> torch.Tensor:
    """Logits of a copy whose own biases hold the offsets, which are zero in turn."""
    model = copy.deepcopy(model)
    model.set_adapter(name)
    layers = model.get_base_model().vit.layers
    for key in offsets(model, name).names:
        index, *path = key.split("/")
        module = layers[int(index)] if index.isdigit() else model.get_base_model().vit.get_submodule(index)
        for part in path:
            module = getattr(module, part)
        with torch.no_grad():
            module.bias += offsets(model, name)[key]
            offsets(model, name)[key].zero_()
    return logits(model)


@pytest.mark.parametrize("bias", ["all", *([place] for place in PLACES), ["value", "output", "mlp", "norm"]])
@pytest.mark.parametrize("given", [{}, {"implementation": "token"}, {"deep": False}])
def test_as_biases_of_the_backbone(bias: Any, given: dict[str, Any]):
    model = attach(bias, **given)
    plain = logits(model)
    torch.testing.assert_close(plain, by_hand(model), rtol=0, atol=1e-12)
    assert all(offsets(model)[key].abs().max() > 1e-3 for key in offsets(model).names)


@pytest.mark.parametrize("place, path", PLACES.items())
def test_places(place: str, path: str):
    names = list(offsets(attach([place])).names)
    assert names == [f"{index}/{path.replace('.', '/')}" for index in range(3)]


def test_disabled_is_the_base_bit_for_bit():
    base = tiny_vit().eval()
    before = logits(base)
    model = randomize(get_peft_model(base, VPTConfig(num_virtual_tokens=3, bias="all"))).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert (logits(model) - before).abs().max() > 1e-3


def test_saved_and_loaded(tmp_path):
    model = attach(["value", "norm"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].bias == ["value", "norm"]


def test_mixed_batch_and_merged():
    model = attach("all", modules_to_save=[])
    model.add_adapter("other", VPTConfig(num_virtual_tokens=2, bias=["value"], modules_to_save=[]))
    model.add_adapter("none", VPTConfig(num_virtual_tokens=4, modules_to_save=[]))
    randomize(model, 5)
    alone = {}
    for name in ("default", "other", "none"):
        model.set_adapter(name)
        alone[name] = logits(model)
    names = ["other", "default", "none"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-12)
    model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(logits(model), alone["default"], rtol=0, atol=1e-12)


def test_mixed_batch_among_windows():
    """Rows of attention are windows there, several for each image."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4, "num_labels": 7}
    base = SwinForImageClassification(SwinConfig(depths=[2, 1], num_heads=[2, 4], **sizes)).double()
    model = get_peft_model(base, VPTConfig(num_virtual_tokens=2, bias="all"), adapter_name="a")
    model.add_adapter("b", VPTConfig(num_virtual_tokens=2, bias="all"))
    randomize(model).eval()
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = logits(model)
    mixed = logits(model, adapter_names=["b", "a", "b"])
    expected = torch.stack([alone["b"][0], alone["a"][1], alone["b"][2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-10)


def test_fused_projections():
    """Of a fused projection of query, key and value only the value's part moves."""
    model = randomize(
        get_peft_model(build("blip_vision_model"), VPTConfig(num_virtual_tokens=2, bias=["value"]))
    ).eval()
    inputs = inputs_of("blip_vision_model")
    plain = model(**inputs)[0]
    moved = copy.deepcopy(model)
    for index, block in enumerate(ARCHITECTURES["blip_vision_model"].blocks):
        values = offsets(moved)[f"{index}/self_attn/qkv/value"]
        assert values.abs().max() > 1e-3
        with torch.no_grad():
            moved.get_base_model().get_submodule(block).self_attn.qkv.bias[-len(values) :] += values
            values.zero_()
    torch.testing.assert_close(moved(**inputs)[0], plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "heads_first, expected",
    [(False, [0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0]), (True, [0, 0, 1, 2, 0, 0, 0, 0, 3, 4, 0, 0])],
)
def test_part_of_a_fused_bias(heads_first: bool, expected: list[int]):
    projection = Projection("qkv", parts=3, part=1, heads_first=heads_first)
    target = BiasTarget("0/qkv/value", torch.nn.Linear(1, 1), 4, projection, heads=2)
    assert target.widen(torch.tensor([1, 2, 3, 4])).tolist() == expected


@pytest.mark.parametrize("bias", ["some", [], ["keys"], 3])
def test_refused(bias: Any):
    with pytest.raises((TypeError, ValueError), match="bias"):
        VPTConfig(bias=bias)


def test_places_without_a_bias_are_refused():
    base = tiny_vit()
    for layer in base.vit.layers:
        layer.mlp.fc2.bias = None
    with pytest.raises(EncoderError, match="'mlp'.*bias='all'"):
        get_peft_model(base, VPTConfig(bias=["mlp"]))
    assert find_parameters(base) is None
