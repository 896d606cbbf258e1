"""Blocks whose output nobody reads are found, cheaply and without a trace; nothing that is read is called unread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from composites import COMPOSITES, IMAGE, SIZES, TEXT, clip, llava, siglip, swin_config, vit
from encoder_fixtures import build, require_installed, timm_wrapper
from test_encoder import assert_untouched, fingerprint
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    DPTModel,
    HieraBackbone,
    HieraConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SwinBackbone,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vpt_peft.encoder import find_encoder, read_blocks, submodule


def read(model: nn.Module) -> str:
    """One letter per block: x for read, . for unread."""
    spec = find_encoder(model)
    return "".join("x" if each else "." for each in read_blocks(model, submodule(model, spec.path), spec))


def language_model(name: str, layer: Any) -> nn.Module:
    """A tiny LLaVA with four blocks in its tower."""
    parts = {"vision_config": CLIPVisionConfig(**SIZES, **IMAGE), "text_config": LlamaConfig(**SIZES, **TEXT)}
    parts["image_token_index"] = 3
    if name == "next":
        tiles = [[32, 64], [64, 32], [64, 64]]
        config = LlavaNextConfig(**parts, vision_feature_layer=layer, image_grid_pinpoints=tiles)
        return LlavaNextForConditionalGeneration(config)
    if name == "vip":
        return VipLlavaForConditionalGeneration(VipLlavaConfig(**parts, vision_feature_layers=layer))
    return LlavaForConditionalGeneration(LlavaConfig(**parts, vision_feature_layer=layer))


@pytest.mark.parametrize(
    "layer, expected",
    [(-1, "xxxx"), (-2, "xxx."), (4, "xxxx"), (2, "xx.."), ([-2, -5], "xxx."), ([1, -3], "xx.."), ([-1, 0], "xxxx")],
    ids=str,
)
@pytest.mark.parametrize("name", ["llava", "next", "vip"])
def test_language_model_reads_the_layers_it_selects(name: str, layer: Any, expected: str):
    assert read(language_model(name, layer)) == expected
    assert read(language_model(name, layer).model) == expected


@pytest.mark.parametrize("name", ["llava", "vip"])
def test_unread_blocks_are_those_without_a_gradient(name: str):
    model = language_model(name, [-3, 1])
    spec = find_encoder(model)
    encoder = submodule(model, spec.path)
    expected = read_blocks(model, encoder, spec)
    ids = torch.tensor([[0, *[3] * 16, 5]])
    model(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 32, 32)
    ).logits.sum().backward()
    weights = [next(submodule(encoder, block.path).parameters()) for block in spec.blocks]
    assert tuple(weight.grad is not None for weight in weights) == expected == (True, True, False, False)


DINO: dict[str, Any] = {**SIZES, **IMAGE, "mlp_ratio": 2}


@pytest.mark.parametrize(
    "stages, expected",
    [(["stage4"], "xxxx"), (["stage2"], "xx.."), (["stage1", "stage3"], "xxx."), (["stem", "stage4"], "xxxx")],
    ids=str,
)
def test_backbone_reads_up_to_its_last_stage(stages: list[str], expected: str):
    assert read(Dinov2Backbone(Dinov2Config(**DINO, out_features=stages))) == expected
    config = UperNetConfig(
        backbone_config=Dinov2Config(**DINO, out_features=stages, reshape_hidden_states=True),
        hidden_size=16, num_labels=3, use_auxiliary_head=False, pool_scales=[1],
    )  # fmt: skip
    assert read(UperNetForSemanticSegmentation(config)) == expected


@pytest.mark.parametrize(
    "stages, expected", [(["stage4"], "xxxxx"), (["stage1", "stage3"], "xxxx."), (["stage1"], "x....")], ids=str
)
def test_backbone_in_stages(stages: list[str], expected: str):
    assert read(SwinBackbone(swin_config(out_features=stages))) == expected


@pytest.mark.parametrize(
    "stages, expected", [(["stage1"], "x..."), (["stage2"], "xxx."), (["stage3"], "xxxx")], ids=str
)
def test_blocks_that_change_shape_are_not_repeated(stages: list[str], expected: str):
    config = HieraConfig(**ARCHITECTURES["hiera"].config, out_features=stages)
    assert read(HieraBackbone(config)) == expected


@pytest.mark.parametrize("cls", [DPTForDepthEstimation, DPTForSemanticSegmentation, DPTModel])
@pytest.mark.parametrize(
    "indices, expected", [([0, 1, 2, 3], "xxxx.."), ([0, 1, 2, 4], "xxxxx."), ([1, 2, 3, 5], "x" * 6)]
)
def test_dense_prediction_reads_its_indices(cls: type, indices: list[int], expected: str):
    sizes = {**SIZES, "num_hidden_layers": 6}
    config = DPTConfig(
        **sizes, **IMAGE, backbone_out_indices=indices, fusion_hidden_size=16, neck_hidden_sizes=[8] * 4, num_labels=3
    )
    # The plain model returns what the last block makes
    assert read(cls(config)) == ("xxxxxx" if cls is DPTModel else expected)


@pytest.mark.parametrize("name", [name for name in COMPOSITES if name != "llava"])
def test_composites_read_everything(name: str):
    make, _, depth, _ = COMPOSITES[name]
    assert read(make()) == "x" * depth


@pytest.mark.parametrize(
    "make",
    [clip, siglip, vit, timm_wrapper, lambda: Dinov2ForImageClassification(Dinov2Config(**DINO, num_labels=3))],
    ids=["clip", "siglip", "vit", "timm", "dinov2 classifier"],
)
def test_heads_and_pairs_read_everything(make: Callable[[], nn.Module]):
    assert set(read(make())) == {"x"}


@pytest.mark.parametrize(
    "name",
    ["vit", "beit", "hiera", "vjepa2", "videomae", "siglip2_vision_model", "sam_vision_model", "sam2_hiera_det_model",
     "groupvit_vision_model", "pixtral", "videoprism_vision_model", "timesformer", "eomt", "vit_mae_pretrain"],
)  # fmt: skip
def test_encoder_by_itself_reads_everything(name: str):
    require_installed(name)
    assert set(read(build(name, dtype=torch.float32))) == {"x"}


class Own(nn.Module):
    """A user's own model around an encoder, with an argument of its own name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.net, self.head = way, vit(), nn.Linear(32, 3)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.calls += 1
        self.last = images
        if self.way == "without gradients":
            with torch.no_grad():
                return [self.head(self.net(images).last_hidden_state)]
        if self.way == "attention maps":
            outputs = self.net(images, output_attentions=True, output_hidden_states=True)
            return [outputs.attentions[-1], outputs.hidden_states[1]]
        if self.way == "two blocks by hand":
            hidden = self.net.embeddings(images)
            return [self.net.layers[1](self.net.layers[0](hidden))]
        outputs = self.net(images, output_hidden_states=True)
        if self.way == "fails":
            raise ValueError
        if self.way == "first block by hand":
            return [self.net.layers[0](outputs.hidden_states[0])]
        return [self.head(outputs.hidden_states[-3][:, 0]), outputs.hidden_states[1].mean()]


@pytest.mark.parametrize(
    "way, expected",
    [
        ("hidden states", "xx.."),
        ("first block by hand", "x..."),
        ("two blocks by hand", "xxxx"),  # blocks that never run are not known to be unread
        ("attention maps", "xxxx"),
        ("without gradients", "xxxx"),
        ("fails", "xxxx"),
    ],
)
def test_own_model(way: str, expected: str):
    model = Own(way)
    model.net.set_attn_implementation("eager")
    assert read(model) == expected


@pytest.mark.parametrize("make", [lambda: Own("hidden states"), llava, vit, lambda: COMPOSITES["upernet"][0]()])
def test_reading_leaves_the_model_untouched(make: Callable[[], nn.Module]):
    model = make().train()
    next(model.children()).eval()
    spec = find_encoder(model)
    before = fingerprint(model)
    calls = getattr(model, "calls", None)
    read_blocks(model, submodule(model, spec.path), spec)
    assert_untouched(model, before)
    assert getattr(model, "calls", None) == calls
    assert not hasattr(model, "last")


@pytest.mark.parametrize("make", [vit, llava, lambda: language_model("next", -2)], ids=["vit", "llava", "next"])
def test_one_block_runs(make: Callable[[], nn.Module]):
    """The rest of the encoder's work is left out."""
    model = make()
    spec = find_encoder(model)
    encoder = submodule(model, spec.path)
    runs = []
    for block in spec.blocks:
        attention = submodule(encoder, f"{block.path}.{block.attention.path}")
        attention.register_forward_hook(lambda module, args, output: runs.append(module))
    read_blocks(model, encoder, spec)
    attempts = 1 if make in (vit, llava) else 2  # a single image is tried before tiles
    assert len(runs) == attempts


def test_no_gradients_are_left():
    model = vit()
    spec = find_encoder(model)
    with torch.no_grad():
        assert read_blocks(model, model, spec) == (True,) * 4
        assert not torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
