"""Tiny configurations of every vision encoder of transformers, and the names their parts have in transformers 5.23.

The names are an oracle for tests: the package finds them by looking at the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


IMAGE, PATCH, WIDTH, HEADS, DEPTH, MLP, BATCH = 32, 8, 32, 4, 3, 64, 2
Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """One encoder.

    Args:
        model: Class name, dotted from the module where transformers itself does not export it.
        config: Fields of its configuration.
        inputs: Makes its inputs, the same at every call.
        blocks: Dotted paths of its blocks, in the order they run.
        norm: Path of the norm in front of the attention, relative to a block; `None` for post-norm.
        attention: Path of the self-attention, relative to a block.
        key, value: Paths of the maps of keys and values, relative to the attention; equal for a fused `qkv`.
        key_norm: Path of a norm on the keys, relative to the attention.
        special: Positions of class, register and other special tokens at the first block's input.
        interface: The attention calls transformers' `AttentionInterface`.
        scaling: Without the interface, the queries are scaled "before" the product with the keys or "after" it;
            "cosine" means keys of unit length and a learned scale per head.
        mask_open: What the attention mask holds where attention is allowed.
        tokens: Prompt tokens may stand in the blocks' sequences.
    """

    model: str
    config: dict[str, Any]
    inputs: Inputs
    blocks: tuple[str, ...]
    norm: str | None
    attention: str
    key: str
    value: str
    key_norm: str | None = None
    special: tuple[int, ...] = ()
    interface: bool = True
    scaling: str = "after"
    mask_open: float = 0.0
    tokens: bool = True


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(size: int = IMAGE) -> Inputs:
    return lambda: {"pixel_values": draw(BATCH, 3, size, size)}


def video(frames: int, key: str = "pixel_values", **more: Any) -> Inputs:
    return lambda: {key: draw(BATCH, frames, 3, IMAGE, IMAGE), **more}


def flattened_patches() -> dict[str, Any]:
    """NaFlex input; the second image has a grid of 4 x 3 patches, so a quarter of its sequence is padding."""
    mask = torch.ones(BATCH, 16, dtype=torch.long)
    mask[1, 12:] = 0
    patches = draw(BATCH, 16, 3 * PATCH * PATCH)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4], [4, 3]])}


def image_pair() -> dict[str, Any]:
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: draw(BATCH, 3, IMAGE, IMAGE, seed=seed) for seed, name in enumerate(names)}


def one_image_with_size() -> dict[str, Any]:
    return {"pixel_values": draw(1, 3, IMAGE, IMAGE), "image_sizes": torch.tensor([[IMAGE, IMAGE]])}


def stack(path: str, depth: int = DEPTH) -> tuple[str, ...]:
    return tuple(f"{path}.{index}" for index in range(depth))


def stages(path: str, inner: str, *depths: int) -> tuple[str, ...]:
    return tuple(f"{path}.{i}.{inner}.{j}".replace("..", ".") for i, depth in enumerate(depths) for j in range(depth))


COMMON: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "patch_size": PATCH,
}  # fmt: skip
PLAIN = {**COMMON, "image_size": IMAGE, "intermediate_size": MLP}
RATIO = {**COMMON, "image_size": IMAGE, "mlp_ratio": 2}
SQUARE = {"image_size": [IMAGE, IMAGE], "patch_size": [PATCH, PATCH]}
QUERIES = {"num_blocks": 1, "num_queries": 5, "num_register_tokens": 2, "num_upscale_blocks": 1, "num_labels": 3}
SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "mlp_ratio": 2.0,
}  # fmt: skip
HIERARCHY = {
    "num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32], "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
}  # fmt: skip
HIERA = {
    "image_size": [64, 64], "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3], "embed_dim": 16,
    "depths": [1, 2, 1],
}  # fmt: skip
SAM2 = {
    "hidden_size": 16, "num_attention_heads": 1, "image_size": [64, 64], "patch_kernel_size": [7, 7],
    "patch_stride": [4, 4], "patch_padding": [3, 3], "query_stride": [2, 2], "mlp_ratio": 2.0,
    "window_positional_embedding_background_size": [7, 7], "num_query_pool_stages": 2, "blocks_per_stage": [1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64], "num_attention_heads_per_stage": [1, 2, 4],
    "window_size_per_stage": [8, 4, 4], "global_attention_blocks": [2],
}  # fmt: skip
CVT = {
    "embed_dim": [16, 32], "num_heads": [2, 4], "depth": [1, 2], "patch_sizes": [7, 3], "patch_stride": [4, 2],
    "patch_padding": [2, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0],
    "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
    "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2],
    "padding_q": [1, 1], "stride_q": [1, 1],
}  # fmt: skip

Names = tuple[str | None, str, str, str]
VIT: Names = ("layernorm_before", "attention", "k_proj", "v_proj")
OLD_VIT: Names = ("layernorm_before", "attention.attention", "key", "value")
OLD_SWIN: Names = ("layernorm_before", "attention.self", "key", "value")
DINO: Names = ("norm1", "attention", "k_proj", "v_proj")
CLIP: Names = ("layer_norm1", "self_attn", "k_proj", "v_proj")
AIM: Names = ("rms_norm1", "attention", "k_proj", "v_proj")
FUSED: Names = ("layer_norm1", "self_attn", "qkv", "qkv")
TIMESFORMER: Names = ("layernorm_before", "attention.attention", "qkv", "qkv")

LAYERS, LAYER, CLIP_LAYERS = stack("layers"), stack("encoder.layer"), stack("encoder.layers")
SWIN_BLOCKS = stages("encoder.layers", "blocks", 2, 2)
NO_TOKENS = {"tokens": False}
OWN = {"interface": False}


def row(
    model: str,
    config: dict[str, Any],
    blocks: tuple[str, ...],
    names: Names,
    special: str = "",
    inputs: Inputs | None = None,
    oracle: dict[str, Any] | None = None,
    **more: Any,
) -> Architecture:
    """One architecture; `special` lists positions, `oracle` further fields, `more` further configuration fields."""
    positions = tuple(int(position) for position in special.split())
    return Architecture(
        model, {**config, **more}, inputs or image(), blocks, *names, special=positions, **(oracle or {})
    )


# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    "vit": row("ViTModel", PLAIN, LAYERS, VIT, "0"),
    "deit": row("DeiTModel", PLAIN, LAYERS, VIT, "0 1"),
    "vit_msn": row("ViTMSNModel", PLAIN, LAYERS, VIT, "0"),
    "vit_mae": row("ViTMAEModel", PLAIN, LAYERS, VIT, "0", mask_ratio=0.0),
    "vit_mae_pretrain": row(
        "ViTMAEForPreTraining", PLAIN, stack("vit.layers"), VIT, "0", decoder_hidden_size=WIDTH,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=HEADS, decoder_intermediate_size=MLP,
    ),
    "dinov2": row("Dinov2Model", RATIO, LAYER, DINO, "0"),
    "dinov2_with_registers": row("Dinov2WithRegistersModel", RATIO, LAYER, DINO, "0 1 2", num_register_tokens=2),
    "dinov3_vit": row("DINOv3ViTModel", PLAIN, stack("model.layer"), DINO, "0 1 2", num_register_tokens=2),
    "ijepa": row("IJepaModel", PLAIN, LAYERS, VIT),
    "beit": row("BeitModel", PLAIN, LAYERS, VIT, "0", use_relative_position_bias=True),
    "beit_shared_bias": row("BeitModel", PLAIN, LAYERS, VIT, "0", use_shared_relative_position_bias=True),
    "data2vec-vision": row(
        "Data2VecVisionModel", PLAIN, LAYER, OLD_VIT, "0", oracle=OWN, use_relative_position_bias=True,
    ),
    "pixio": row("PixioModel", RATIO, LAYERS, VIT, "0 1", n_cls_tokens=2),
    "tipsv2_vision_model": row("Tipsv2VisionModel", RATIO, LAYER, DINO, "0 1", num_register_tokens=1),
    "radio": row(
        "RadioModel", {**COMMON, "mlp_ratio": 2.0}, LAYER, DINO, "0 1 2 3", max_img_size=IMAGE, num_cls_tokens=1,
        num_registers=3, summary_idxs=[0],
    ),
    "sapiens2": row(
        "Sapiens2Model", PLAIN, stack("model.layer"), DINO, "0 1 2", oracle={"key_norm": "k_norm"},
        num_register_tokens=2, num_key_value_attention_heads=2, num_first_full_attention_layers=1,
        num_last_full_attention_layers=0,
    ),
    "vitpose_backbone": row("VitPoseBackbone", {**RATIO, **SQUARE}, LAYER, OLD_VIT, num_experts=1, part_features=0),
    "seggpt": row(
        "SegGptModel", {**COMMON, "num_hidden_layers": 4}, stack("encoder.layers", 4),
        ("layernorm_before", "attention", "qkv", "qkv"), inputs=image_pair,
        oracle={**OWN, **NO_TOKENS, "scaling": "before"}, image_size=[64, 32], mlp_dim=MLP,
        intermediate_hidden_state_indices=[1, 2, 3], merge_index=1, pretrain_image_size=32,
    ),
    "mgp-str": row(
        "MgpstrModel", {**COMMON, **SQUARE, "mlp_ratio": 2.0}, stack("encoder.blocks"),
        ("norm1", "attn", "qkv", "qkv"), "0", oracle=OWN,
    ),
    "clip_vision_model": row("CLIPVisionModel", PLAIN, CLIP_LAYERS, CLIP, "0"),
    "siglip_vision_model": row("SiglipVisionModel", PLAIN, CLIP_LAYERS, CLIP),
    "siglip2_vision_model": row(
        "Siglip2VisionModel", {**COMMON, "intermediate_size": MLP}, CLIP_LAYERS, CLIP, inputs=flattened_patches,
        num_patches=16,
    ),
    "metaclip_2_vision_model": row("MetaClip2VisionModel", PLAIN, CLIP_LAYERS, CLIP, "0"),
    "aimv2_vision_model": row("Aimv2VisionModel", PLAIN, CLIP_LAYERS, AIM),
    "chinese_clip_vision_model": row("ChineseCLIPVisionModel", PLAIN, CLIP_LAYERS, CLIP, "0"),
    "altclip_vision_model": row("AltCLIPVisionModel", PLAIN, CLIP_LAYERS, CLIP, "0"),
    "clipseg_vision_model": row("CLIPSegVisionModel", PLAIN, CLIP_LAYERS, CLIP, "0"),
    "xclip_vision_model": row(
        "XCLIPVisionModel", PLAIN, CLIP_LAYERS, CLIP, "0", num_frames=2, mit_hidden_size=WIDTH,
        mit_intermediate_size=MLP, mit_num_attention_heads=HEADS, mit_num_hidden_layers=1,
    ),
    "git_vision_model": row("GitVisionModel", PLAIN, stack("vision_model.encoder.layers"), CLIP, "0"),
    "kosmos_2_vision_model": row(
        "transformers.models.kosmos2.modeling_kosmos2.Kosmos2VisionModel", PLAIN, stack("model.encoder.layers"), CLIP,
        "0",
    ),
    "mlcd_vision_model": row("MLCDVisionModel", PLAIN, CLIP_LAYERS, CLIP, "0", num_key_value_groups=1),
    "blip_vision_model": row("BlipVisionModel", PLAIN, CLIP_LAYERS, FUSED, "0", oracle=OWN),
    "blip_2_vision_model": row("Blip2VisionModel", PLAIN, CLIP_LAYERS, FUSED, "0"),
    "instructblip_vision_model": row("InstructBlipVisionModel", PLAIN, CLIP_LAYERS, FUSED, "0"),
    "flava_image_model": row("FlavaImageModel", PLAIN, LAYER, OLD_VIT, "0", oracle=OWN),
    "owlvit_vision_model": row("OwlViTVisionModel", PLAIN, stack("vision_model.encoder.layers"), CLIP, "0"),
    "owlv2_vision_model": row("Owlv2VisionModel", PLAIN, stack("vision_model.encoder.layers"), CLIP, "0"),
    "groupvit_vision_model": row(
        "GroupViTVisionModel", PLAIN, stages("vision_model.encoder.stages", "layers", 2, 2), CLIP, "16 17 18 19",
        oracle={**OWN, "scaling": "before"}, depths=[2, 2], num_group_tokens=[4, 0], num_output_groups=[4, 2],
    ),
    "internvl_vision": row("InternVLVisionModel", {**PLAIN, **SQUARE}, LAYER, VIT, "0"),
    "internvl_vision_qk_norm": row(
        "InternVLVisionModel", {**PLAIN, **SQUARE}, LAYER, VIT, "0", oracle={"key_norm": "k_norm"}, use_qk_norm=True,
    ),
    "janus_vision_model": row("JanusVisionModel", {**RATIO, "mlp_ratio": 2.0}, CLIP_LAYERS, CLIP),
    "idefics3_vision": row("Idefics3VisionTransformer", PLAIN, CLIP_LAYERS, CLIP),
    "smolvlm_vision": row("SmolVLMVisionTransformer", PLAIN, CLIP_LAYERS, CLIP),
    "pixtral": row(
        "PixtralVisionModel", PLAIN, stack("transformer.layers"), ("attention_norm", "attention", "k_proj", "v_proj"),
        inputs=one_image_with_size, oracle=NO_TOKENS,
    ),
    "ovis2_vision": row(
        "transformers.models.ovis2.modeling_ovis2.Ovis2VisionModel", PLAIN, stack("transformer.encoder.layers"), AIM,
        vocab_size=64, num_visual_indicator_tokens=5, hidden_stride=1,
    ),
    "llama4_vision_model": row(
        "Llama4VisionModel", PLAIN, stack("model.layers"), ("input_layernorm", "self_attn", "k_proj", "v_proj"), "16",
        intermediate_size=WIDTH * 4, vision_output_dim=WIDTH, projector_input_dim=WIDTH, projector_output_dim=WIDTH,
        pixel_shuffle_ratio=0.5,
    ),
    "yolos": row(
        "YolosModel", PLAIN, LAYER, OLD_VIT, "0 17 18 19 20 21", image_size=[IMAGE, IMAGE], num_detection_tokens=5,
        use_mid_position_embeddings=False,
    ),
    "yolos_mid_pos": row(
        "YolosModel", PLAIN, LAYER, OLD_VIT, "0 17 18 19 20 21", image_size=[IMAGE, IMAGE], num_detection_tokens=5,
        use_mid_position_embeddings=True,
    ),
    "dpt": row("DPTModel", PLAIN, LAYER, OLD_VIT, "0", backbone_out_indices=[0, 1, 2, 2]),
    "eomt": row(
        "EomtForUniversalSegmentation", {**RATIO, **QUERIES}, LAYERS, DINO, "0 1 2", oracle={"mask_open": 1.0},
    ),
    "eomt_dinov3": row(
        "EomtDinov3ForUniversalSegmentation", {**PLAIN, **QUERIES}, LAYERS, DINO, "0 1 2", oracle={"mask_open": 1.0},
    ),
    "videomt": row(
        "VideomtForUniversalSegmentation", {**RATIO, **QUERIES}, LAYERS, DINO, "0 1 2",
        video(2, "pixel_values_videos"), num_frames=2,
    ),
    "lw_detr_vit": row(
        "LwDetrViTBackbone", RATIO, LAYER, VIT, oracle=NO_TOKENS, pretrain_image_size=IMAGE,
        window_block_indices=[0, 2], num_windows=4, out_indices=[3],
    ),
    "rf_detr_dinov2": row(
        "RfDetrDinov2Backbone", RATIO, LAYER, DINO, "0", oracle=NO_TOKENS, num_windows=2, window_block_indexes=[0, 2],
        out_indices=[3],
    ),
    "vitdet": row(
        "VitDetModel", RATIO, LAYER, ("norm1", "attention", "qkv", "qkv"),
        oracle={**OWN, **NO_TOKENS, "scaling": "before"}, window_size=2, window_block_indices=[0, 2],
        use_relative_position_embeddings=True,
    ),
    "sam_vision_model": row(
        "SamVisionModel", {**RATIO, "mlp_ratio": 2.0}, stack("vision_encoder.layers"),
        ("layer_norm1", "attn", "qkv", "qkv"), oracle={**OWN, **NO_TOKENS, "scaling": "before"}, mlp_dim=MLP,
        output_channels=WIDTH, window_size=2, global_attn_indexes=[1], use_rel_pos=True,
    ),
    "sam3_vit_model": row(
        "Sam3ViTModel", PLAIN, LAYERS, ("layer_norm1", "attention", "k_proj", "v_proj"), oracle=NO_TOKENS,
        window_size=2, global_attn_indexes=[1], pretrain_image_size=IMAGE,
    ),
    "sam2_hiera_det_model": row(
        "Sam2HieraDetModel", SAM2, stack("blocks", 4), ("layer_norm1", "attn", "qkv", "qkv"), inputs=image(64),
        oracle=NO_TOKENS,
    ),
    "swin": row("SwinModel", SWIN, SWIN_BLOCKS, VIT, oracle=NO_TOKENS),
    "swinv2": row(
        "Swinv2Model", SWIN, SWIN_BLOCKS, (None, *OLD_SWIN[1:]), oracle={**OWN, **NO_TOKENS, "scaling": "cosine"},
    ),
    "donut-swin": row("DonutSwinModel", SWIN, SWIN_BLOCKS, OLD_SWIN, oracle={**OWN, **NO_TOKENS}),
    "maskformer-swin": row("MaskFormerSwinModel", SWIN, SWIN_BLOCKS, OLD_SWIN, oracle={**OWN, **NO_TOKENS}),
    "hiera": row(
        "HieraModel", HIERA, stages("encoder.stages", "layers", 1, 2, 1), ("layernorm_before", "attn", "qkv", "qkv"),
        inputs=image(64), oracle={**OWN, **NO_TOKENS, "scaling": "before"}, num_heads=[1, 2, 4],
        embed_dim_multiplier=2.0, num_query_pool=2, query_stride=[2, 2], masked_unit_size=[4, 4],
        masked_unit_attention=[True, True, False], mlp_ratio=2.0,
    ),
    "pvt": row(
        "PvtModel", HIERARCHY, stages("encoder.block", "", 2, 2), ("layer_norm_1", "attention.self", "key", "value"),
        inputs=image(64), image_size=64, sequence_reduction_ratios=[4, 1], patch_sizes=[4, 2], strides=[4, 2],
    ),
    "pvt_v2": row(
        "PvtV2Model", HIERARCHY, SWIN_BLOCKS, ("layer_norm_1", "attention", "key", "value"), inputs=image(64),
        image_size=[64, 64], sr_ratios=[4, 1], patch_sizes=[7, 3], strides=[4, 2],
    ),
    "segformer": row(
        "SegformerModel", HIERARCHY, stages("stages", "blocks", 2, 2), VIT, inputs=image(64), sr_ratios=[4, 1],
        patch_sizes=[7, 3], strides=[4, 2],
    ),
    "cvt": row("CvtModel", CVT, stages("encoder.stages", "layers", 1, 2), OLD_VIT, inputs=image(64)),
    "vivit": row("VivitModel", PLAIN, LAYERS, VIT, "0", video(4), num_frames=4, tubelet_size=[2, PATCH, PATCH]),
    "videomae": row("VideoMAEModel", PLAIN, LAYER, OLD_VIT, inputs=video(4), num_frames=4, tubelet_size=2),
    "timesformer": row(
        "TimesformerModel", PLAIN, LAYER, TIMESFORMER, "0", video(2), {**OWN, **NO_TOKENS}, num_frames=2,
        attention_type="divided_space_time",
    ),
    "timesformer_joint": row(
        "TimesformerModel", PLAIN, LAYER, TIMESFORMER, "0", video(2), OWN, num_frames=2,
        attention_type="joint_space_time",
    ),
    "vjepa2": row(
        "VJEPA2Model", {**COMMON, "mlp_ratio": 2.0}, LAYER, ("norm1", "attention", "key", "value"),
        inputs=video(4, "pixel_values_videos", skip_predictor=True), oracle=NO_TOKENS, hidden_size=48,
        crop_size=IMAGE, frames_per_clip=4, tubelet_size=2, pred_hidden_size=48, pred_num_hidden_layers=1,
        pred_num_attention_heads=HEADS, pred_mlp_ratio=2.0,
    ),
    "videoprism_vision_model": row(
        "VideoPrismVisionModel", {**COMMON, "intermediate_size": MLP},
        stack("spatial_layers", 2) + stack("temporal_layers", 2), VIT, inputs=video(4, "pixel_values_videos"),
        image_size=IMAGE, num_spatial_layers=2, num_temporal_layers=2, num_frames=4, tubelet_size=[1, PATCH, PATCH],
    ),
}
# fmt: on

# What prompts are not defined for, with words of the reason that is given.
REDUCED = "spatially reduced keys and values"
UNSUPPORTED = {"pvt": REDUCED, "pvt_v2": REDUCED, "segformer": REDUCED, "cvt": "no softmax attention"}
SUPPORTED = tuple(name for name in ARCHITECTURES if name not in UNSUPPORTED)

# These cast to float32 inside, whatever the dtype of the model.
CASTING = frozenset(
    {
        "aimv2_vision_model",
        "eomt",
        "git_vision_model",
        "internvl_vision_qk_norm",
        "llama4_vision_model",
        "mlcd_vision_model",
        "ovis2_vision",
        "sapiens2",
        "seggpt",
        "videoprism_vision_model",
    }
)
