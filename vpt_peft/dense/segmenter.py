"""A plain ViT with a small head for semantic segmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput

from .plain_vit import build_backbone, load_backbone, patch_maps, vision_config


DECODERS = ("linear", "setr_pup")


class ViTSegmenterConfig(PreTrainedConfig):
    """Configuration of `ViTForSemanticSegmentation`.

    Args:
        backbone_config: of the plain ViT, or a dict of it.
        decoder: "linear" (batch norm, dropout, 1x1 convolution, as DINOv3's evaluation) or "setr_pup".
        blocks: 0-based numbers of the blocks whose patch tokens the head reads; None: the last one.
        channels: width of the convolutions of "setr_pup".
        dropout: before the last convolution, of whole channels.
        semantic_loss_ignore_index: label of pixels that do not count.
        kwargs: as of `PreTrainedConfig`.

    Raises:
        ValueError: a field is out of range, or the backbone is not a plain ViT.
    """

    model_type = "vit_segmenter"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: Any = None,
        decoder: str = "linear",
        blocks: Sequence[int] | None = None,
        channels: int = 256,
        dropout: float = 0.1,
        semantic_loss_ignore_index: int = 255,
        **kwargs: Any,
    ) -> None:
        if decoder not in DECODERS:
            raise ValueError(f"decoder={decoder!r} is unknown; choose one of {', '.join(DECODERS)}.")
        if channels < 1 or not 0 <= dropout < 1:
            raise ValueError(f"channels={channels} must be 1 or more, and dropout={dropout} lie in [0, 1).")
        if isinstance(backbone_config, dict):
            values = dict(backbone_config)
            backbone_config = AutoConfig.for_model(values.pop("model_type", "vit"), **values)
        self.backbone_config = vision_config(backbone_config or AutoConfig.for_model("vit"))
        depth = self.backbone_config.num_hidden_layers
        self.blocks = [depth - 1] if blocks is None else list(blocks)
        if (
            not self.blocks
            or self.blocks != sorted(set(self.blocks))
            or not 0 <= self.blocks[0] <= max(self.blocks) < depth
        ):
            raise ValueError(f"blocks={self.blocks} must be some of the {depth} blocks 0..{depth - 1}, in order.")
        self.decoder, self.channels, self.dropout = decoder, channels, dropout
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


class PixelClassifier(nn.Conv2d):
    """A 1x1 convolution onto the classes, which starts at zero: a random one would send its noise into the prompts."""

    def __init__(self, channels: int, num_labels: int) -> None:
        super().__init__(channels, num_labels, 1)


class LinearDecoder(nn.Sequential):
    """Batch norm, dropout and a 1x1 convolution.

    Args:
        width: channels of the features.
        num_labels: number of classes.
        dropout: of whole channels.
    """

    def __init__(self, width: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = PixelClassifier(width, num_labels)


class SetrPupDecoder(nn.Module):
    """Progressive upsampling of SETR (Zheng et al., CVPR 2021): a 3x3 convolution and twice the size, up to the image's.

    Args:
        width: channels of the features.
        channels: of the convolutions.
        num_labels: number of classes.
        dropout: of whole channels, before the last convolution.
        steps: number of times.
    """

    def __init__(self, width: int, channels: int, num_labels: int, dropout: float, steps: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        widths = [width, *[channels] * max(steps, 1)]
        self.convolutions = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
            )
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = PixelClassifier(channels, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features `(batch, width, height, width)` into logits, twice as high and wide with each step."""
        features = self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for convolution in self.convolutions:
            features = F.interpolate(convolution(features), scale_factor=2, mode="bilinear", align_corners=False)
        return self.classifier(self.dropout(features))


class ViTForSemanticSegmentation(PreTrainedModel):
    """A plain ViT with a head for semantic segmentation. Images may have any size; those of one batch have the same.

    Args:
        config: its configuration; `config.num_labels` classes.
    """

    config_class = ViTSegmenterConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ViTSegmenterConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self.patch_size = config.backbone_config.patch_size
        width = config.backbone_config.hidden_size * len(config.blocks)
        num_labels = int(config.num_labels or 0)
        self.decode_head: nn.Module = (
            LinearDecoder(width, num_labels, config.dropout)
            if config.decoder == "linear"
            else SetrPupDecoder(width, config.channels, num_labels, config.dropout, round(math.log2(self.patch_size)))
        )
        self.post_init()

    @classmethod
    def from_backbone(
        cls, name_or_path: str, id2label: Mapping[int, str], source: Mapping[str, Any] | None = None, **fields: Any
    ) -> ViTForSemanticSegmentation:
        """Return a segmenter on a pre-trained ViT, with a fresh head.

        Args:
            name_or_path: Hub id or folder of a ViT, DeiT, DINOv2, MAE, CLIP, ...
            id2label: the classes.
            source: `revision`, `token` and `cache_dir`, as of `from_pretrained`.
            fields: as of `ViTSegmenterConfig`.

        Raises:
            OSError: there is no such model.
            ValueError: it is not a plain ViT, or a field is out of range.
        """
        backbone = load_backbone(name_or_path, **(source or {}))
        names = dict(id2label)
        model = cls(
            ViTSegmenterConfig(
                backbone_config=backbone.config,
                id2label=names,
                label2id={name: number for number, name in names.items()},
                **fields,
            )
        )
        model.backbone.load_state_dict(backbone.state_dict())
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PixelClassifier):
            init.zeros_(module.weight)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> SemanticSegmenterOutput:
        """Classify the pixels of images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised.
            labels: `(batch, height, width)`, the class of each pixel.
            kwargs: unused; here for the interface of transformers.

        Returns:
            Logits `(batch, classes, rows, columns)` that cover the image, one per patch or finer; with labels the mean
            cross-entropy of the pixels, from bilinearly enlarged logits.
        """
        size = pixel_values.shape[-2:]
        logits = self.decode_head(torch.cat(patch_maps(self.backbone, pixel_values, self.config.blocks), 1))
        # An image that was filled up to whole patches is cut out again
        whole = [-(-side // self.patch_size) * self.patch_size for side in size]
        if whole != list(size):
            logits = enlarge(logits, whole)[..., : size[0], : size[1]]
        loss = None if labels is None else pixel_loss(logits, labels, self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(loss=loss, logits=logits)


def enlarge(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return logits `(batch, classes, rows, columns)` in float32, bilinearly brought to `size` (height, width)."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def pixel_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return the mean cross-entropy of the pixels that count; 0 where none does.

    Args:
        logits: `(batch, classes, rows, columns)`; they are enlarged to the labels.
        labels: `(batch, height, width)`.
        ignore_index: label of pixels that do not count.
    """
    counted = (labels != ignore_index).sum().clamp(min=1)
    enlarged = enlarge(logits, labels.shape[-2:])
    return F.cross_entropy(enlarged, labels, ignore_index=ignore_index, reduction="sum") / counted


AutoConfig.register(ViTSegmenterConfig.model_type, ViTSegmenterConfig)
AutoModelForSemanticSegmentation.register(ViTSegmenterConfig, ViTForSemanticSegmentation)
