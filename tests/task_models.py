"""A tiny model of every `...ForX` class of transformers that takes prompts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, BATCH, IMAGE, PLAIN, RATIO, WIDTH, draw
from composites import mask2former, maskformer, upernet, upernet_swin
from encoder_fixtures import model_class
from torch import nn


Inputs = Callable[[], dict[str, Any]]
DPT = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
FOUR = {"num_hidden_layers": 4}
BACKBONE = {**RATIO, **FOUR, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
SAPIENS_HEAD = {
    "upsample_out_channels": [8],
    "upsample_kernel_sizes": [4],
    "conv_out_channels": [8],
    "conv_kernel_sizes": [1],
}
SCALE_HEAD = {
    "scale_conv_out_channels": [8], "scale_conv_kernel_sizes": [1], "scale_final_input_size": 32,
    "scale_final_hidden_sizes": [8, 3],
}  # fmt: skip
DETR = {
    "d_model": 32, "decoder_ffn_dim": 32, "decoder_layers": 1, "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2, "num_queries": 4, "group_detr": 1, "decoder_n_points": 2, "c2f_num_blocks": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TaskModel:
    """One class.

    Args:
        make: Builds the model with random weights, of so many labels where it has labels.
        inputs: Makes its inputs, the same at every call.
    """

    make: Callable[[int], nn.Module]
    inputs: Inputs


def plain(architecture: str, name: str, inputs: Inputs | None = None, **more: Any) -> TaskModel:
    """A class whose configuration is its encoder's."""

    def make(num_labels: int) -> nn.Module:
        encoder = model_class(architecture)
        if encoder is None:
            pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
        cls = getattr(importlib.import_module(encoder.__module__), name)
        config_class = getattr(encoder, "config_class", None) or encoder.config
        return cls(config_class(**{**ARCHITECTURES[architecture].config, "num_labels": num_labels, **more}))

    return TaskModel(make, inputs or ARCHITECTURES[architecture].inputs)


def nested(name: str, config: str, inputs: Inputs | None = None, **fields: Any) -> TaskModel:
    """A class whose configuration holds its encoder's."""

    def make(num_labels: int) -> nn.Module:
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        made = {
            key: transformers.AutoConfig.for_model(**value) if "model_type" in value else value
            for key, value in fields.items()
            if isinstance(value, dict)
        }
        return getattr(transformers, name)(
            getattr(transformers, config)(**{**fields, **made, "num_labels": num_labels})
        )

    return TaskModel(make, inputs or image)


def composite(make: Callable[[], Any]) -> TaskModel:
    return TaskModel(lambda num_labels: make(), lambda: {"pixel_values": draw(BATCH, 3, 64, 64)})


def image() -> dict[str, Any]:
    return {"pixel_values": draw(BATCH, 3, IMAGE, IMAGE)}


def prompted_depth() -> dict[str, Any]:
    return {**image(), "prompt_depth": draw(BATCH, 1, 8, 8).abs()}


def masked_video() -> dict[str, Any]:
    mask = (torch.arange(32) % 2 == 0).expand(BATCH, -1)
    return {"pixel_values": draw(BATCH, 4, 3, IMAGE, IMAGE).sigmoid(), "bool_masked_pos": mask}


def long_video() -> dict[str, Any]:
    return {"pixel_values_videos": draw(BATCH, 4, 3, IMAGE, IMAGE)}


# fmt: off
TASK_MODELS: dict[str, TaskModel] = {
    name: plain(architecture, name)
    for architecture, names in {
        "vit": "ViTForMaskedImageModeling ViTForImageClassification",
        "deit": "DeiTForMaskedImageModeling DeiTForImageClassification DeiTForImageClassificationWithTeacher",
        "vit_msn": "ViTMSNForImageClassification",
        "vit_mae_pretrain": "ViTMAEForPreTraining",
        "dinov2": "Dinov2ForImageClassification",
        "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
        "ijepa": "IJepaForImageClassification",
        "beit": "BeitForMaskedImageModeling BeitForImageClassification",
        "data2vec-vision": "Data2VecVisionForImageClassification",
        "seggpt": "SegGptForImageSegmentation",
        "mgp-str": "MgpstrForSceneTextRecognition",
        "yolos": "YolosForObjectDetection",
        "eomt": "EomtForUniversalSegmentation",
        "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
        "videomt": "VideomtForUniversalSegmentation",
        "swin": "SwinForMaskedImageModeling SwinForImageClassification",
        "swinv2": "Swinv2ForMaskedImageModeling Swinv2ForImageClassification",
        "donut-swin": "DonutSwinForImageClassification",
        "hiera": "HieraForImageClassification",
        "vivit": "VivitForVideoClassification",
        "videomae": "VideoMAEForVideoClassification",
        "timesformer": "TimesformerForVideoClassification",
        "videoprism_vision_model": "VideoPrismForVideoClassification",
    }.items()
    for name in names.split()
}
TASK_MODELS |= {
    "VideoMAEForPreTraining": plain("videomae", "VideoMAEForPreTraining", masked_video),
    "VJEPA2ForVideoClassification": plain("vjepa2", "VJEPA2ForVideoClassification", long_video),
    "BeitForSemanticSegmentation": plain("beit", "BeitForSemanticSegmentation", **FOUR, out_indices=[1, 2, 3, 4], pool_scales=[1, 2]),
    "Data2VecVisionForSemanticSegmentation": plain(
        "data2vec-vision", "Data2VecVisionForSemanticSegmentation", **FOUR, out_indices=[1, 2, 3, 4], pool_scales=[1, 2],
    ),
    "DPTForDepthEstimation": plain("dpt", "DPTForDepthEstimation", **DPT, **FOUR, backbone_out_indices=[0, 1, 2, 3]),
    "DPTForSemanticSegmentation": plain(
        "dpt", "DPTForSemanticSegmentation", **DPT, **FOUR, backbone_out_indices=[0, 1, 2, 3],
    ),
    "Sapiens2ForSemanticSegmentation": plain("sapiens2", "Sapiens2ForSemanticSegmentation", head_config=SAPIENS_HEAD),
    "Sapiens2ForPoseEstimation": plain("sapiens2", "Sapiens2ForPoseEstimation", head_config=SAPIENS_HEAD),
    "Sapiens2ForNormalEstimation": plain("sapiens2", "Sapiens2ForNormalEstimation", head_config=SAPIENS_HEAD),
    "Sapiens2ForPointmapEstimation": plain(
        "sapiens2", "Sapiens2ForPointmapEstimation", head_config={**SAPIENS_HEAD, **SCALE_HEAD},
    ),
    "Sapiens2ForImageMatting": plain("sapiens2", "Sapiens2ForImageMatting", head_config=SAPIENS_HEAD),
    "HieraForPreTraining": plain(
        "hiera", "HieraForPreTraining", decoder_hidden_size=16, decoder_depth=1, decoder_num_heads=2, mask_ratio=0.5,
    ),
    "CLIPForImageClassification": nested("CLIPForImageClassification", "CLIPConfig", vision_config=PLAIN),
    "SiglipForImageClassification": nested("SiglipForImageClassification", "SiglipConfig", vision_config=PLAIN),
    "Siglip2ForImageClassification": nested(
        "Siglip2ForImageClassification", "Siglip2Config", ARCHITECTURES["siglip2_vision_model"].inputs,
        vision_config=ARCHITECTURES["siglip2_vision_model"].config,
    ),
    "MetaClip2ForImageClassification": nested("MetaClip2ForImageClassification", "MetaClip2Config", vision_config=PLAIN),
    "DepthAnythingForDepthEstimation": nested(
        "DepthAnythingForDepthEstimation", "DepthAnythingConfig", backbone_config={"model_type": "dinov2", **BACKBONE},
        **DPT, reassemble_hidden_size=WIDTH, head_hidden_size=8, patch_size=8,
    ),
    "PromptDepthAnythingForDepthEstimation": nested(
        "PromptDepthAnythingForDepthEstimation", "PromptDepthAnythingConfig", prompted_depth,
        backbone_config={"model_type": "dinov2", **BACKBONE}, **DPT, reassemble_hidden_size=WIDTH, head_hidden_size=8,
        patch_size=8,
    ),
    "ZoeDepthForDepthEstimation": nested(
        "ZoeDepthForDepthEstimation", "ZoeDepthConfig", backbone_config={
            "model_type": "beit", **PLAIN, **FOUR, "use_relative_position_bias": True, "reshape_hidden_states": False,
            "out_indices": [1, 2, 3, 4],
        }, **DPT, num_relative_features=8, bottleneck_features=8, bin_embedding_dim=8, num_attractors=[2, 2, 2, 1],
        bin_configurations=[{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0}],
    ),
    "CHMv2ForDepthEstimation": nested(
        "CHMv2ForDepthEstimation", "CHMv2Config", backbone_config={
            "model_type": "dinov3_vit", **PLAIN, **FOUR, "num_register_tokens": 2, "out_indices": [1, 2, 3, 4],
            "reshape_hidden_states": True, "apply_layernorm": True, "return_class_token": True,
        }, post_process_channels=[8] * 4, reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=8, head_hidden_size=8,
        number_output_channels=8, patch_size=8,
    ),
    "VitPoseForPoseEstimation": nested(
        "VitPoseForPoseEstimation", "VitPoseConfig", backbone_config={
            "model_type": "vitpose_backbone", **ARCHITECTURES["vitpose_backbone"].config, "out_indices": [3],
        },
    ),
    "LwDetrForObjectDetection": nested(
        "LwDetrForObjectDetection", "LwDetrConfig", backbone_config={
            "model_type": "lw_detr_vit", **ARCHITECTURES["lw_detr_vit"].config,
        }, projector_scale_factors=[1.0], **DETR,
    ),
    "RfDetrForObjectDetection": nested(
        "RfDetrForObjectDetection", "RfDetrConfig", backbone_config={
            "model_type": "rf_detr_dinov2", **ARCHITECTURES["rf_detr_dinov2"].config,
        }, **DETR,
    ),
    "UperNetForSemanticSegmentation": composite(upernet),
    "UperNetForSemanticSegmentation on Swin": composite(upernet_swin),
    "Mask2FormerForUniversalSegmentation": composite(mask2former),
    "MaskFormerForInstanceSegmentation": composite(maskformer),
} | {
    name: nested(
        name, "Tipsv2DptConfig", backbone_config={
            "model_type": "tipsv2_vision_model", **RATIO, **FOUR, "num_register_tokens": 1, "out_indices": [1, 2, 3, 4],
            "apply_layernorm": True, "reshape_hidden_states": False,
        }, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5], num_depth_bins=8,
    )
    for name in ("Tipsv2DptForDepthEstimation", "Tipsv2DptForNormalEstimation", "Tipsv2DptForSemanticSegmentation")
}
# fmt: on
