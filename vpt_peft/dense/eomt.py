"""EoMT (Kerssies et al., CVPR 2025) on the weights of a plain ViT: a ViT whose last blocks read queries too."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import EomtConfig, EomtForUniversalSegmentation

from .plain_vit import OnPlainViT, load_backbone


logger = logging.getLogger(__name__)

# Names of EoMT, and what other ViTs call them; tried one after the other
_NAMES = (
    (r"^layers\.", ("layers.", "encoder.layer.")),
    (r"\.norm1\.", (".norm1.", ".layernorm_before.")),
    (r"\.norm2\.", (".norm2.", ".layernorm_after.")),
    (r"\.out_proj\.", (".o_proj.", ".out_proj.")),
)
# What only the head has, or what a ViT may lack, and then starts as the identity
_OWN = re.compile(
    r"^(query|upscale_block|mask_head|class_predictor|criterion|attn_mask_probs)|layer_scale|register_tokens"
)


class ViTEomtForUniversalSegmentation(OnPlainViT, EomtForUniversalSegmentation):  # type: ignore[misc]
    """EoMT that was made of a plain ViT, and whose adapters name that ViT as their base."""


def eomt_from_backbone(
    name_or_path: str,
    id2label: Mapping[int, str],
    image_size: int,
    source: Mapping[str, Any] | None = None,
    **fields: Any,
) -> ViTEomtForUniversalSegmentation:
    """Return an EoMT with the weights of a plain ViT, as far as names and shapes fit, and a fresh head.

    Position embeddings are interpolated to the size of the image. What was copied and what was drawn is logged.

    Args:
        name_or_path: Hub id or folder of a ViT, DeiT, DINOv2 or MAE.
        id2label: the classes.
        image_size: height and width of the images in pixels, a multiple of the patch; EoMT takes squares of one size.
        source: `revision`, `token` and `cache_dir`, as of `from_pretrained`.
        fields: of `EomtConfig`.

    Raises:
        OSError: there is no such model.
        ValueError: it is not a plain ViT that EoMT can hold, or `image_size` does not fit.
    """
    backbone = load_backbone(name_or_path, **(source or {}))
    config = backbone.config
    if image_size % config.patch_size:
        raise ValueError(f"image_size={image_size} must be a multiple of the patches of {config.patch_size} pixels.")
    depth = config.num_hidden_layers
    values: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": depth,
        "num_attention_heads": config.num_attention_heads,
        "mlp_ratio": getattr(config, "mlp_ratio", 0) or config.intermediate_size // config.hidden_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "patch_size": config.patch_size,
        "image_size": image_size,
        "num_register_tokens": 0,
        # As in the paper, three blocks of a small or base ViT and four of a large one
        "num_blocks": min(depth, 4 if depth > 12 else 3),
        # One point for each pixel of a mask
        "train_num_points": (image_size // 4) ** 2,
        "id2label": dict(id2label),
        "label2id": {name: number for number, name in id2label.items()},
    }
    model = ViTEomtForUniversalSegmentation(EomtConfig(**{**values, **fields}))
    theirs, copied = dict(backbone.state_dict()), {}
    _split_positions(theirs, image_size // config.patch_size)
    for name, value in model.state_dict().items():
        found = next((other for other in _candidates(name) if other in theirs), None)
        if found is not None and theirs[found].shape == value.shape:
            copied[name] = theirs[found]
    lacking = [name for name in model.state_dict() if name not in copied and not _OWN.search(name)]
    if lacking:
        raise ValueError(
            f"EoMT cannot hold {name_or_path!r} ({config.model_type}): it lacks {', '.join(lacking[:3])}; choose a ViT, "
            "DeiT, DINOv2 or MAE, or a checkpoint of EoMT or Mask2Former."
        )
    model.load_state_dict(copied, strict=False)
    drawn = sorted(
        {name.split(".")[0] for name in model.state_dict() if name not in copied and "layer_scale" not in name}
    )
    logger.info("EoMT: copied %d tensors of %s; fresh are %s.", len(copied), name_or_path, ", ".join(drawn))
    return model


def _candidates(name: str) -> list[str]:
    names = [name]
    for pattern, others in _NAMES:
        names = [re.sub(pattern, other, each) for each in names for other in others]
    return list(dict.fromkeys(names))


def _split_positions(state: dict[str, torch.Tensor], grid: int) -> None:
    """Let positions be EoMT's: none for the class token, which has its own added, and one for each patch of the grid."""
    positions = state.pop("embeddings.position_embeddings")
    side = int((positions.shape[1] - 1) ** 0.5)
    of_patches = positions[0, -(side * side) :].T.reshape(1, -1, side, side)
    if side != grid:
        of_patches = F.interpolate(of_patches, size=(grid, grid), mode="bicubic", align_corners=False)
    state["embeddings.position_embeddings.weight"] = of_patches.flatten(2)[0].T.contiguous()
    state["embeddings.cls_token"] = state["embeddings.cls_token"] + positions[:, :1]
