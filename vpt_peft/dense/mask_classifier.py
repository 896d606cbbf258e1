"""EoMT for semantic segmentation with the interface of transformers' other segmenters: labels in, logits out.

transformers' class is for all kinds of segmentation: it takes a mask for each segment, and gives a class and a mask for
each query.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForSemanticSegmentation,
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from .segmenter import enlarge


IGNORED = 255
_TINY = 1e-6


class _SemanticMixin:
    """`forward` over the queries of a universal segmenter."""

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> SemanticSegmenterOutput:
        """Classify the pixels of images.

        Args:
            pixel_values: `(batch, channels, height, width)`, normalised.
            labels: `(batch, height, width)`; 255 does not count.
            kwargs: as of the universal class.

        Returns:
            Logits `(batch, classes, height, width)`: the logarithm of what the queries of a class say about a pixel; and
            the loss of the universal class.
        """
        targets = {} if labels is None else split_labels(labels, pixel_values.dtype)
        output = super().forward(pixel_values=pixel_values, **targets, **kwargs)  # type: ignore[misc]
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = enlarge(output.masks_queries_logits, pixel_values.shape[-2:]).sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", classes, masks)
        return SemanticSegmenterOutput(loss=output.loss, logits=scores.clamp(min=_TINY).log())


def split_labels(labels: torch.Tensor, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Return a mask for each class in an image, and its number, as universal segmenters take them."""
    found = [each.unique() for each in labels]
    found = [each[each != IGNORED] for each in found]
    masks = [(each[None] == numbers[:, None, None]).to(dtype) for each, numbers in zip(labels, found, strict=True)]
    return {"mask_labels": masks, "class_labels": found}


class EomtForSemanticSegmentation(_SemanticMixin, EomtForUniversalSegmentation):
    """EoMT, whose queries run through the last blocks of a ViT."""


class EomtDinov3ForSemanticSegmentation(_SemanticMixin, EomtDinov3ForUniversalSegmentation):
    """EoMT on DINOv3."""


# Without exist_ok transformers ignores classes for its own configurations
AutoModelForSemanticSegmentation.register(EomtConfig, EomtForSemanticSegmentation, exist_ok=True)
AutoModelForSemanticSegmentation.register(EomtDinov3Config, EomtDinov3ForSemanticSegmentation, exist_ok=True)
