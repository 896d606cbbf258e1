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

from .decoders import DPTDecoder, LinearDecoder, PixelClassifier, SetrPupDecoder
from .plain_vit import OnPlainViT, build_backbone, load_backbone, patch_maps, vision_config


DECODERS = ("linear", "setr_pup", "dpt")


class ViTSegmenterConfig(PreTrainedConfig):
    """Configuration of `ViTForSemanticSegmentation`.

    Args:
        backbone_config: of the plain ViT, or a dict of it.
        decoder: "linear" (batch norm, dropout, 1x1 convolution, as DINOv3's evaluation), "setr_pup" or "dpt".
        blocks: 0-based numbers of the blocks whose patch tokens the head reads; None: the last one. "dpt" reads four.
        channels: width of the convolutions of "setr_pup" and "dpt".
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
        if decoder == "dpt" and len(self.blocks) != 4:
            raise ValueError(f"blocks={self.blocks}: decoder='dpt' reads four blocks.")
        self.decoder, self.channels, self.dropout = decoder, channels, dropout
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        super().__init__(**kwargs)


class ViTForSemanticSegmentation(OnPlainViT, PreTrainedModel):  # type: ignore[misc]
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
        self.decode_head = self._make_decoder(int(config.num_labels or 0))
        self.post_init()

    def _make_decoder(self, num_labels: int) -> nn.Module:
        config, hidden = self.config, self.config.backbone_config.hidden_size
        width = hidden * len(config.blocks)
        if config.decoder == "linear":
            return LinearDecoder(width, num_labels, config.dropout)
        if config.decoder == "setr_pup":
            steps = round(math.log2(self.patch_size))
            return SetrPupDecoder(width, config.channels, num_labels, config.dropout, steps)
        return DPTDecoder(hidden, config.channels, num_labels, config.dropout)

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
