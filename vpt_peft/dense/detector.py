"""A plain ViT with a feature pyramid and an FCOS head: learns small data within minutes, with or without a frozen ViT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .boxes import corners, suppress
from .fcos import FCOSHead, Locations, SimpleFeaturePyramid, detection_loss, relative
from .plain_vit import OnPlainViT, build_backbone, load_backbone, patch_map, vision_config


# Share of locations that a fresh head takes for an object of a class (focal loss)
_PRIOR = 0.01
_CANDIDATES = 1000


class ViTFCOSConfig(PreTrainedConfig):
    """Configuration of `ViTFCOSForObjectDetection`.

    Args:
        backbone_config: of the plain ViT, or a dict of it.
        channels: width of neck and head.
        num_convs: 3x3 convolutions of the head before its predictions.
        scale_factors: sizes of the levels relative to the ViT's map, powers of two from the largest down.
        nms_threshold: overlap above which the weaker of two boxes of a class goes.
        kwargs: as of `PreTrainedConfig`.

    Raises:
        ValueError: a field is out of range, or the backbone is not a plain ViT.
    """

    model_type = "vit_fcos"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: Any = None,
        channels: int = 128,
        num_convs: int = 2,
        scale_factors: Sequence[float] = (2.0, 1.0, 0.5),
        nms_threshold: float = 0.6,
        **kwargs: Any,
    ) -> None:
        if channels < 1 or num_convs < 0:
            raise ValueError(f"channels={channels} must be 1 or more, and num_convs={num_convs} 0 or more.")
        factors = list(scale_factors)
        if not factors or factors != sorted(factors, reverse=True) or any(math.log2(f) % 1 for f in factors):
            raise ValueError(
                f"scale_factors={factors} must be powers of two, the largest first, as in [2.0, 1.0, 0.5]."
            )
        if not 0 <= nms_threshold <= 1:
            raise ValueError(f"nms_threshold={nms_threshold} must lie in 0..1.")
        if isinstance(backbone_config, dict):
            values = dict(backbone_config)
            backbone_config = AutoConfig.for_model(values.pop("model_type", "vit"), **values)
        self.backbone_config = vision_config(backbone_config or AutoConfig.for_model("vit"))
        self.channels, self.num_convs, self.nms_threshold = channels, num_convs, nms_threshold
        self.scale_factors = factors
        super().__init__(**kwargs)


@dataclass
class DetectionOutput(ModelOutput):
    """Output of `ViTFCOSForObjectDetection`, as `post_process_object_detection` of Deformable DETR's processor reads it.

    Args:
        loss: sum of the losses, where labels were given.
        loss_dict: its parts.
        logits: `(batch, locations, classes)`; their sigmoid is sqrt(class probability * centre-ness). Suppressed ones are
            lowest.
        pred_boxes: `(batch, locations, 4)`, centre, width and height relative to the image.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None


class ViTFCOSForObjectDetection(OnPlainViT, PreTrainedModel):  # type: ignore[misc]
    """A plain ViT with a dense detection head. Images may have any size; those of one batch have the same.

    Args:
        config: its configuration; `config.num_labels` classes.
    """

    config_class = ViTFCOSConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ViTFCOSConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        width = config.backbone_config.hidden_size
        self.neck = SimpleFeaturePyramid(width, config.channels, config.scale_factors)
        self.head = FCOSHead(
            config.channels, cast(int, config.num_labels), config.num_convs, len(config.scale_factors)
        )
        self.post_init()

    @classmethod
    def from_backbone(
        cls, name_or_path: str, id2label: Mapping[int, str], source: Mapping[str, Any] | None = None, **fields: Any
    ) -> ViTFCOSForObjectDetection:
        """Return a detector on a pre-trained ViT, with a fresh neck and head.

        Args:
            name_or_path: Hub id or folder of a ViT, DeiT, DINOv2, MAE, CLIP, ...
            id2label: the classes.
            source: `revision`, `token` and `cache_dir`, as of `from_pretrained`.
            fields: as of `ViTFCOSConfig`.

        Raises:
            OSError: there is no such model.
            ValueError: it is not a plain ViT, or a field is out of range.
        """
        backbone = load_backbone(name_or_path, **(source or {}))
        names = dict(id2label)
        model = cls(
            ViTFCOSConfig(
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
        if isinstance(module, FCOSHead):
            init.constant_(module.level_scales, 1.0)
            init.constant_(cast(torch.Tensor, module.class_predictor.bias), math.log(_PRIOR / (1 - _PRIOR)))

    def forward(
        self, pixel_values: torch.Tensor, labels: Sequence[Mapping[str, torch.Tensor]] | None = None, **kwargs: Any
    ) -> DetectionOutput:
        """Detect objects.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised.
            labels: for each image "class_labels" `(objects,)` and "boxes" `(objects, 4)`, centre, width and height
                relative to the image.
            kwargs: unused; here for the interface of transformers.
        """
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        features = self.neck(patch_map(self.backbone, pixel_values))
        strides = [self.config.backbone_config.patch_size / factor for factor in self.config.scale_factors]
        predictions = self.head(features, strides)
        locations = Locations.of(features, strides)
        losses = None if labels is None else detection_loss(predictions, locations, labels, size)
        boxes = relative(locations.boxes(predictions.distances), size)
        scores = (predictions.logits.float().sigmoid() * predictions.centerness.float().sigmoid()[..., None]).sqrt()
        # A step of training reads the loss alone
        if losses is None or not torch.is_grad_enabled():
            scores = self._suppress(boxes, scores)
        return DetectionOutput(
            loss=None if losses is None else torch.stack(list(losses.values())).sum(),
            loss_dict=losses,
            logits=torch.logit(scores, eps=1e-6).masked_fill(scores == 0, torch.finfo(scores.dtype).min),
            pred_boxes=boxes,
        )

    @torch.no_grad()
    def _suppress(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Set the scores of boxes that a better one of their class covers, and of all but the best candidates, to 0."""
        classes = scores.shape[-1]
        found, best = scores.flatten(1).topk(min(_CANDIDATES, scores.shape[1] * classes))
        of_best = torch.gather(corners(boxes), 1, (best // classes)[..., None].expand(-1, -1, 4))
        kept = suppress(of_best, best % classes, self.config.nms_threshold)
        return torch.zeros_like(scores).flatten(1).scatter(1, best, found * kept).view_as(scores)


AutoConfig.register(ViTFCOSConfig.model_type, ViTFCOSConfig)
AutoModelForObjectDetection.register(ViTFCOSConfig, ViTFCOSForObjectDetection)
