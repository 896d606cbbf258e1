"""The task head is found by itself, trains with the prompts and is saved with them."""

from __future__ import annotations

import warnings

import pytest
import torch
from composites import captioner, clip, git, llava, siglip, text
from peft import LoraConfig, get_peft_model
from peft_fixtures import BLOCKS, VIT, WIDTH, bare_vit, dinov2, trainable, vit
from torch import nn
from transformers import (
    Dinov2Config,
    DPTConfig,
    DPTForSemanticSegmentation,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
    YolosConfig,
    YolosForObjectDetection,
)

from vpt_peft import VPTConfig
from vpt_peft.encoder import EncoderError, find_encoder
from vpt_peft.heads import check_task_type, find_task_head, modules_to_wrap


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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    """The children of timm's VisionTransformer, in its order."""

    def __init__(self, head: str = "head") -> None:
        super().__init__()
        self.patch_embed, self.norm_pre = nn.Conv2d(3, WIDTH, 8, 8), nn.LayerNorm(WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.fc_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.add_module(head, nn.Linear(WIDTH, 5))
        self.last = head

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.norm_pre(self.patch_embed(pixel_values).flatten(2).transpose(1, 2))
        return getattr(self, self.last)(self.fc_norm(self.norm(self.blocks(x)).mean(1)))


class WrapperForImageClassification(PreTrainedModel):
    """What TimmWrapperForImageClassification looks like: the head is in the same child as the blocks."""

    config_class, main_input_name, _supports_sdpa = ViTConfig, "pixel_values", True

    def __init__(self, config: ViTConfig, head: str = "head") -> None:
        super().__init__(config)
        self.timm_model = TimmViT(head)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.timm_model(pixel_values)


class Own(nn.Module):
    """A module of the user's own around an encoder; its parts run in the order in which they are defined."""

    def __init__(self, before: dict[str, nn.Module], after: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in before.items():
            self.add_module(name, module)
        self.vit = bare_vit(torch.float32)
        for name, module in after.items():
            self.add_module(name, module)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vit(pixel_values=pixel_values).last_hidden_state


class OwnPreTrained(PreTrainedModel):
    config_class, main_input_name = ViTConfig, "pixel_values"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.vit, self.linear = ViTModel(config), nn.Linear(WIDTH, 5)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.linear(self.vit(pixel_values=pixel_values).last_hidden_state[:, 0])


class OwnForCaptioning(OwnPreTrained):
    """A task model with a language model in it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.text = text()


class Towers(nn.Module):
    """Two classifiers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = vit(torch.float32), vit(torch.float32), nn.Linear(10, 2)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, 5)


def dpt() -> nn.Module:
    config = DPTConfig(
        **VIT | {"num_hidden_layers": 4, "num_labels": 3}, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
    )  # fmt: skip
    return DPTForSemanticSegmentation(config)


class Head(nn.Module):
    """A head with a child of its own name in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.classifier = nn.Dropout(), linear()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(hidden))


def nested_head() -> nn.Module:
    model = vit(torch.float32)
    model.classifier = Head()
    return model


def siglip_tower() -> nn.Module:
    sizes = {key: value for key, value in VIT.items() if key != "num_labels"}
    return SiglipVisionModel(SiglipVisionConfig(**sizes))


def found(model: nn.Module, backbone: str | None = None) -> list[str]:
    spec = find_encoder(model, backbone)
    return find_task_head(model, spec.path, spec)


@pytest.mark.parametrize(
    "make, backbone, expected",
    [
        (lambda: WrapperForImageClassification(ViTConfig(**VIT)), None, ["timm_model.head"]),
        (lambda: Own({}, {"head": linear()}), None, ["head"]),
        (lambda: Own({"head": linear()}, {}), None, ["head"]),
        (lambda: Own({"stem": nn.Conv2d(1, 3, 1)}, {"neck": linear(), "out": linear()}), None, ["neck", "out"]),
        (lambda: Own({"teacher": bare_vit(torch.float32)}, {"fc": linear()}), "vit", ["fc"]),
        (lambda: Own({}, {"text": text(), "projection": linear(), "classifier": linear()}), None, ["classifier"]),
        (lambda: Own({}, {"heads": nn.ModuleList([linear(), linear()])}), None, ["heads.0", "heads.1"]),
        (lambda: OwnPreTrained(ViTConfig(**VIT)), None, ["linear"]),
        (Towers, "left.vit", ["head", "left.classifier"]),
        (dpt, None, ["neck", "head", "auxiliary_head"]),
        (nested_head, None, ["classifier"]),
        (siglip_tower, None, []),
        (clip, None, []),
        (siglip, None, []),
        (git, None, []),
        (llava, None, []),
        (captioner, None, []),
        (lambda: OwnForCaptioning(ViTConfig(**VIT)), None, []),
    ],
)  # fmt: skip
def test_heads_stand_anywhere(make, backbone: str | None, expected: list[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = make()
        assert found(model, backbone) == expected
        if backbone is None:
            assert find_task_head(model) == expected


@pytest.mark.parametrize("make, message", [(linear, "has no vision encoder"), (Towers, "has several vision encoders")])
def test_the_encoder_is_found_where_it_is_the_only_one(make, message: str):
    with pytest.raises(EncoderError, match=message):
        find_task_head(make())


def test_heads_in_a_peft_model():
    model = get_peft_model(vit(torch.float32), LoraConfig(target_modules=["q_proj"]))
    assert found(model) == ["classifier"]


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: Own({"stem": nn.Conv2d(1, 3, 1)}, {}), r"stem stay frozen.*modules_to_save=\['stem'\]"),
        (lambda: WrapperForImageClassification(ViTConfig(**VIT), "out"), "timm_model.out stay frozen"),
    ],
)
def test_parts_that_stay_frozen_are_named(make, named: str):
    with pytest.warns(UserWarning, match=named):
        assert found(make()) == []


@pytest.mark.parametrize(
    "make, names, task_type, expected",
    [
        (vit, None, None, ["classifier"]),
        (vit, [], None, []),
        (vit, ["classifier"], None, ["classifier"]),
        (vit, ["classifier", "score"], "SEQ_CLS", ["classifier"]),
        (vit, ["classifier", "score"], "TOKEN_CLS", ["classifier"]),
        (vit, ["qa_outputs"], "QUESTION_ANS", ["classifier"]),
        (vit, ["layernorm", "classifier", "score"], "SEQ_CLS", ["vit.layernorm", "classifier"]),
        (dpt, ["head"], None, ["head"]),
        (dpt, ["head.head"], None, ["head.head"]),
        (dpt, ["head", "head.head"], None, ["head"]),
        (lambda: Own({}, {"head": linear()}), ["head"], None, ["head"]),
        (lambda: WrapperForImageClassification(ViTConfig(**VIT)), ["head"], None, ["timm_model.head"]),
    ],
)
def test_names_of_modules_to_save(make, names, task_type, expected: list[str]):
    model = make()
    assert modules_to_wrap(model, names, found(model), task_type) == expected


def test_misspelt_names():
    for task_type in (None, "SEQ_CLS"):
        with pytest.raises(ValueError, match="no module clasifier; its head is .'classifier'"):
            modules_to_wrap(vit(), ["clasifier", "score"][: 1 if task_type is None else 2], ["classifier"], task_type)
    with pytest.raises(ValueError, match="score"):
        modules_to_wrap(vit(), ["score"], ["classifier"])
    with pytest.warns(UserWarning, match="no classifier; left out"):
        assert modules_to_wrap(bare_vit(), ["classifier"], []) == []


def test_names_that_peft_would_wrap_twice():
    check_task_type(vit(), ["classifier"], "SEQ_CLS")
    check_task_type(nested_head(), ["classifier"], None)
    check_task_type(upernet(), ["decode_head", "auxiliary_head"], "SEQ_CLS")
    for model, paths, task_type, named in (
        (nested_head(), ["classifier"], "SEQ_CLS", "classifier.classifier"),
        (dpt(), ["head"], "SEQ_CLS", "head.head"),
        (upernet(), ["decode_head"], "TOKEN_CLS", "decode_head.classifier"),
    ):
        with pytest.raises(ValueError, match=f"task_type='{task_type}'.*{named}"):
            check_task_type(model, paths, task_type)
