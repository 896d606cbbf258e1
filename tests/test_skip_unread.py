"""`skip_unread`: the last block makes its class token only, where the head reads nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft_fixtures import bare_vit, dinov2
from small_models import images, randomize, tiny_vit
from transformers import BeitConfig, BeitForImageClassification

from vpt_peft import EncoderError, VPTConfig


def logits(model: torch.nn.Module, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images(), **given).logits


def tokens_in_last_block(model: torch.nn.Module) -> int:
    seen: list[int] = []
    last = model.get_base_model().vit.layers[-1].mlp.fc1
    handle = last.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    logits(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("fields", [{}, {"deep": False}, {"prompt_location": "add"}, {"layers_to_transform": [0]}])
def test_same_logits_from_the_class_token_alone(fields: dict[str, Any]):
    plain = randomize(get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3, **fields)))
    short = randomize(get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3, skip_unread=True, **fields)))
    torch.testing.assert_close(logits(short), logits(plain), rtol=0, atol=1e-12)
    assert tokens_in_last_block(short) == 1 and tokens_in_last_block(plain) == 17
    with short.disable_adapter():
        assert tokens_in_last_block(short) == 17


def test_all_tokens_are_made_where_they_are_pooled():
    found = []
    for skip in (False, True):
        config = VPTConfig(num_virtual_tokens=3, pooling="image", skip_unread=skip)
        model = randomize(get_peft_model(tiny_vit(), config))
        found.append(logits(model))
        assert tokens_in_last_block(model) == 17
    assert torch.equal(*found)


def test_gradients_are_the_same():
    found = []
    for skip in (False, True):
        model = randomize(get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=3, skip_unread=skip))).train()
        model(pixel_values=images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=1e-12)


def test_off_unless_asked_for_and_never_saved(tmp_path):
    assert VPTConfig().skip_unread is False
    model = get_peft_model(tiny_vit(), VPTConfig(skip_unread=True))
    model.save_pretrained(tmp_path)
    assert "skip_unread" not in json.loads((tmp_path / "adapter_config.json").read_text())


def beit() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BeitForImageClassification(BeitConfig(**sizes, image_size=32, patch_size=8, use_mean_pooling=True))


@pytest.mark.parametrize(
    "make, why", [(dinov2, "reads other tokens"), (beit, "takes masks, biases"), (bare_vit, "no head")]
)
def test_models_that_read_more_are_refused(make: Any, why: str):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(EncoderError, match=f"skip_unread=True.*({why})"):
        get_peft_model(model, VPTConfig(num_virtual_tokens=2, skip_unread=True))
    assert list(model.state_dict()) == keys and not model._forward_pre_hooks


def test_is_tried_out_with_the_first_adapter():
    model = get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=2, skip_unread=True))
    model.add_adapter("other", VPTConfig(num_virtual_tokens=3, skip_unread=True))
    model = get_peft_model(tiny_vit(), VPTConfig(num_virtual_tokens=2))
    with pytest.raises(EncoderError, match="first adapter"):
        model.add_adapter("other", VPTConfig(num_virtual_tokens=3, skip_unread=True))
    assert list(model.peft_config) == ["default"]
