"""Tiny models with a vision encoder inside, and one with two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    DetrConfig,
    Dinov2Config,
    GitConfig,
    GitForCausalLM,
    GroupViTConfig,
    GroupViTModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)


SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}


def vit() -> ViTModel:
    return ViTModel(ViTConfig(**SIZES, **IMAGE))


def classifier() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, num_labels=3))


def clip() -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config={**SIZES, **TEXT}, vision_config={**SIZES, **IMAGE}, projection_dim=16))


def siglip() -> SiglipModel:
    return SiglipModel(SiglipConfig(text_config={**SIZES, **TEXT}, vision_config={**SIZES, **IMAGE}))


def llava() -> LlavaForConditionalGeneration:
    vision, text = CLIPVisionConfig(**SIZES, **IMAGE), LlamaConfig(**SIZES, **TEXT)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


def captioner() -> VisionEncoderDecoderModel:
    decoder = BertLMHeadModel(BertConfig(**SIZES, **TEXT, is_decoder=True, add_cross_attention=True))
    return VisionEncoderDecoderModel(encoder=vit(), decoder=decoder)


def text() -> BertModel:
    return BertModel(BertConfig(**SIZES, **TEXT))


def git() -> GitForCausalLM:
    return GitForCausalLM(GitConfig(**SIZES, **TEXT, vision_config={**SIZES, **IMAGE}))


def groupvit() -> GroupViTModel:
    groups = {"depths": [2, 2], "num_group_tokens": [4, 0], "num_output_groups": [4, 2]}
    return GroupViTModel(GroupViTConfig(text_config={**SIZES, **TEXT}, vision_config={**SIZES, **IMAGE, **groups}))


def upernet(backbone: Any = None) -> UperNetForSemanticSegmentation:
    backbone = backbone or Dinov2Config(**SIZES, **IMAGE, **STAGES, mlp_ratio=2, reshape_hidden_states=True)
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=3, use_auxiliary_head=False)
    )


def upernet_swin() -> UperNetForSemanticSegmentation:
    return upernet(swin_config(**STAGES))


def swin_config(**more: Any) -> SwinConfig:
    sizes = {"image_size": 64, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    return SwinConfig(num_heads=[2] * 4, depths=[1, 1, 2, 1], **sizes, **more)


def mask2former() -> Mask2FormerForUniversalSegmentation:
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward"), 32)
    config = Mask2FormerConfig(
        backbone_config=swin_config(**STAGES), num_attention_heads=2, num_queries=4, encoder_layers=1,
        encoder_feedforward_dim=32, decoder_layers=2, num_labels=3, **sizes,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def maskformer() -> MaskFormerForInstanceSegmentation:
    sizes: dict[str, Any] = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    config = MaskFormerConfig(
        backbone_config=swin_config(**STAGES), decoder_config=DetrConfig(**sizes, **heads), fpn_feature_size=32,
        mask_feature_size=32,
    )  # fmt: skip
    return MaskFormerForInstanceSegmentation(config)


class Towers(nn.Module):
    """A model with two vision encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = vit(), vit()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = [tower(pixel_values=pixel_values).last_hidden_state for tower in (self.left, self.right)]
        return torch.cat(outputs, dim=-1)


# Name: (maker, path of the encoder, number of its blocks, parts of the head).
COMPOSITES: dict[str, tuple[Callable[[], nn.Module], str, int, set[str]]] = {
    "clip": (clip, "vision_model", 4, set()),
    "siglip": (siglip, "vision_model", 4, set()),
    "groupvit": (groupvit, "vision_model", 4, set()),
    "llava": (llava, "model.vision_tower", 4, set()),
    "git": (git, "git.image_encoder", 4, set()),
    "captioner": (captioner, "encoder", 4, set()),
    "classifier": (classifier, "vit", 4, {"classifier"}),
    "upernet": (upernet, "backbone", 4, {"decode_head"}),
    "upernet_swin": (upernet_swin, "backbone.swin", 5, {"decode_head", "backbone.hidden_states_norms.stage4"}),
    "maskformer": (
        maskformer,
        "model.pixel_level_module.encoder",
        5,
        {"class_predictor", "mask_embedder", "model.transformer_module", "model.pixel_level_module.decoder"},
    ),
    "mask2former": (
        mask2former,
        "model.pixel_level_module.encoder",
        5,
        {"class_predictor", "model.transformer_module", "model.pixel_level_module.decoder"},
    ),
}
