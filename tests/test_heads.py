"""The task head is found by itself, trains with the prompts and is saved with them."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from peft_fixtures import BLOCKS, WIDTH, bare_vit, dinov2, trainable, vit
from torch import nn
from transformers import (
    Dinov2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    YolosConfig,
    YolosForObjectDetection,
)

from vpt_peft import VPTConfig


def upernet() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2}
    backbone = Dinov2Config(**sizes, image_size=32, patch_size=8, out_indices=[1, 2, 3, 4])
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=3, pool_scales=[1, 2], auxiliary_channels=8
    )
    return UperNetForSemanticSegmentation(config)


def yolos() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 64}
    config = YolosConfig(
        **sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=5, use_mid_position_embeddings=False
    )
    return YolosForObjectDetection(config)


@pytest.mark.parametrize(
    "make, expected",
    [
        (vit, ["classifier"]),
        (dinov2, ["classifier"]),
        (bare_vit, []),
        (upernet, ["auxiliary_head", "decode_head"]),
        (yolos, ["bbox_predictor", "class_labels_classifier"]),
    ],
)
def test_heads_are_found(make, expected: list[str]):
    model = get_peft_model(make(), VPTConfig(num_virtual_tokens=2))
    assert sorted(model.peft_config["default"].modules_to_save or []) == expected
    heads = [name.split(".modules_to_save")[0] for name in trainable(model) if "modules_to_save" in name]
    assert {name.rsplit(".", 1)[-1] for name in heads} == set(expected)
    none = get_peft_model(make(), VPTConfig(num_virtual_tokens=2, modules_to_save=[]))
    assert not [n for n in trainable(none) if "prompt_tuner" not in n]


def test_misspelt_head():
    with pytest.raises(ValueError, match="clasifier.*classifier"):
        get_peft_model(vit(), VPTConfig(modules_to_save=["clasifier"]))
