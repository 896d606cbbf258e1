"""A segmenter from an encoder: a plain ViT with a head of this package, or a backbone with UperNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from .plain_vit import vision_config
from .segmenter import ViTForSemanticSegmentation


SEGMENTATION_DECODERS = ("linear", "linear_4", "setr_pup", "upernet", "dpt")


def build_segmenter(
    path: str,
    config: Any,
    id2label: Mapping[int, str],
    decoder: str,
    ignore_index: int,
    source: Mapping[str, Any],
) -> PreTrainedModel:
    """Return a pre-trained encoder in float32 with a fresh head.

    Args:
        path: Hub id or folder of the encoder.
        config: its configuration.
        id2label: the classes.
        decoder: one of `SEGMENTATION_DECODERS`; "linear_4" and "dpt" read four blocks, evenly spaced.
        ignore_index: label of pixels that do not count.
        source: `revision`, `token` and `cache_dir`, as of `from_pretrained`.

    Raises:
        OSError: there is no such model.
        ValueError: it cannot have this head.
    """
    if decoder not in SEGMENTATION_DECODERS:
        raise ValueError(f"decoder={decoder!r} is unknown; choose one of {', '.join(SEGMENTATION_DECODERS)}.")
    if decoder != "upernet":
        return ViTForSemanticSegmentation.from_backbone(
            path,
            id2label,
            source,
            decoder=decoder.removesuffix("_4"),
            blocks=_four(vision_config(config).num_hidden_layers) if decoder in ("linear_4", "dpt") else None,
            semantic_loss_ignore_index=ignore_index,
        )
    if type(config) not in AutoBackbone._model_mapping:
        raise ValueError(
            f"decoder={decoder!r} needs a backbone of transformers (DINOv2, DINOv3, Swin, BEiT, ...), and "
            f"model_type={config.model_type!r} is none; choose linear, linear_4, setr_pup or dpt."
        )
    names = {int(number): name for number, name in id2label.items()}
    # AutoBackbone itself asks the Hub first, and takes a folder for the name of a repository
    loader: Any = AutoBackbone._model_mapping[type(config)]
    backbone = loader.from_pretrained(path, config=_with_maps(config), dtype=torch.float32, **source)
    model: Any = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone.config,
            auxiliary_in_channels=backbone.channels[2],
            id2label=names,
            label2id={name: number for number, name in names.items()},
            loss_ignore_index=ignore_index,
        )
    )
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def _four(depth: int) -> list[int]:
    """Return the last blocks of four equal parts of an encoder, 0-based: 2, 5, 8 and 11 of 12."""
    return sorted({round(depth * part / 4) - 1 for part in (1, 2, 3, 4)} - {-1})


def _with_maps(config: Any) -> Any:
    """Return a backbone's configuration that gives the four maps that UperNet reads."""
    values = config.to_dict()
    values.pop("out_features", None)
    if getattr(config, "depths", None) is not None:
        values["out_indices"] = [1, 2, 3, 4]
    else:
        values["out_indices"] = [block + 1 for block in _four(config.num_hidden_layers)]
        if hasattr(config, "reshape_hidden_states"):
            values["reshape_hidden_states"] = True
    return AutoConfig.for_model(values.pop("model_type"), **values)
