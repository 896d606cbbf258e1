"""Images of any number of channels and any size: what the encoder takes is found and stated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES
from encoder_fixtures import build, model_class, require_installed, timm_wrapper
from torch import nn
from transformers import ViTConfig, ViTModel

from vpt_peft.encoder import EncoderSpec, find_encoder, submodule
from vpt_peft.encoder.inputs import image_size
from vpt_peft.encoder.projections import apply_projection


def spec_of(name: str, **fields: int) -> EncoderSpec:
    require_installed(name)
    cls = model_class(name)
    assert cls is not None
    torch.manual_seed(0)
    return find_encoder(cls(cls.config_class(**{**ARCHITECTURES[name].config, **fields})))


@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize(
    "name",
    ["vit", "dinov2", "clip_vision_model", "siglip2_vision_model", "beit", "dpt", "swin", "hiera", "vitdet", "videomae",
     "vivit", "llama4_vision_model"],
)  # fmt: skip
def test_any_number_of_channels(name: str, channels: int):
    spec = spec_of(name, num_channels=channels)
    assert spec.channels == channels
    usual = spec_of(name)
    assert usual.channels == 3
    assert [block.path for block in spec.blocks] == [block.path for block in usual.blocks]
    assert [block.attention.key for block in spec.blocks] == [block.attention.key for block in usual.blocks]
    assert replace(spec, channels=3, blocks=()) == replace(usual, blocks=())


def test_in_channels_are_the_channels():
    spec = find_encoder(build("vjepa2", dtype=torch.float32))
    assert spec.channels == 3
    assert spec_of("vjepa2", in_chans=4).channels == 4


def test_exchanged_patch_embedding_tells_the_channels():
    model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64))
    model.embeddings.patch_embeddings.projection = nn.Conv2d(5, 32, 16, 16)
    model.embeddings.patch_embeddings.num_channels = 5
    assert model.config.num_channels == 3
    assert find_encoder(model).channels == 5


@pytest.mark.parametrize("pretrained_size", [None, 224, 384])
@pytest.mark.parametrize("size, patch", [(384, 16), (336, 14), (518, 14), (96, 16)])
def test_timm_at_its_own_size(size: int, patch: int, pretrained_size: int | None):
    spec = find_encoder(timm_wrapper(pretrained_size, img_size=size, patch_size=patch))
    assert spec.image_size == (size, size)
    assert [block.tokens for block in spec.blocks] == [(size // patch) ** 2 + 1] * 3
    assert spec.special == (0,)
    assert spec.final_norm == "timm_model.norm"
    assert spec.patch_embedding == "timm_model.patch_embed.proj"


def test_pretrained_size_counts_where_the_patch_embedding_takes_any():
    model = timm_wrapper(64, img_size=64)
    del model.timm_model.patch_embed.img_size
    model.timm_model.patch_embed.forward = lambda x: model.timm_model.patch_embed.proj(x).flatten(2).transpose(1, 2)
    assert find_encoder(model).image_size == (64, 64)
    assert image_size(model.config) == (64, 64)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_timm_channels(channels: int):
    spec = find_encoder(timm_wrapper(32, in_chans=channels))
    assert spec.channels == channels and spec.image_size == (32, 32)


@pytest.mark.parametrize("fused", [False, True], ids=["softmax module", "fused"])
@pytest.mark.parametrize("separate_bias", [False, True], ids=["own bias", "separate biases"])
def test_timm_projections(separate_bias: bool, fused: bool):
    model = timm_wrapper(separate_bias=separate_bias, fused=fused)
    spec = find_encoder(model)
    for block in spec.blocks:
        attention = submodule(model, f"{block.path}.{block.attention.path}")
        tokens = torch.randn(2, 7, 32)
        bias = (
            torch.cat((attention.q_bias, attention.k_bias, attention.v_bias)) if separate_bias else attention.qkv.bias
        )
        expected = (
            nn.functional.linear(tokens, attention.qkv.weight, bias).reshape(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
        )
        for index, projection in enumerate((block.attention.query, block.attention.key, block.attention.value)):
            if projection is None:  # queries are scaled before the product
                assert index == 0 and not fused
                continue
            assert projection.path == "qkv" and projection.part == index and projection.exact
            assert projection.bias == (("q_bias", "k_bias", "v_bias") if separate_bias else ())
            made = apply_projection(attention, projection, tokens, block.attention.heads)
            torch.testing.assert_close(made, expected[index])


def project_by_hand(attention: nn.Module, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    qkv = nn.functional.linear(x, attention.qkv.weight, bias)
    q, k, v = qkv.reshape(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
    return attention.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "separate_bias, bias, found",
    [
        (True, None, True),
        (True, torch.zeros(96), True),
        (True, torch.arange(96.0), False),  # a bias that belongs to nothing
        (False, None, False),  # the layer itself would add its bias
        (False, torch.zeros(96), False),
    ],
    ids=["none", "zeros", "unknown", "own left out", "own replaced"],
)
def test_weight_used_without_its_layer(separate_bias: bool, bias: torch.Tensor | None, found: bool):
    """The layer is taken for the projection only if calling it gives the same numbers."""
    model = timm_wrapper(separate_bias=separate_bias)
    for block in model.timm_model.blocks:
        if block.attn.qkv.bias is not None:
            nn.init.normal_(block.attn.qkv.bias)
        block.attn.forward = partial(project_by_hand, block.attn, bias)
    key = find_encoder(model).blocks[0].attention.key
    assert (key is not None) == found
    assert key is None or (key.path, key.bias) == ("qkv", ())
