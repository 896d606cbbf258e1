"""Heads of a segmenter on a plain ViT: what they read is one map of the patch tokens of all blocks, side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTNeck


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


class DPTDecoder(nn.Module):
    """DPT (Ranftl et al., ICCV 2021): maps of four blocks at four sizes, fused from the coarsest to the finest.

    Reassembling and fusing are transformers' own. Class tokens are not read.

    Args:
        hidden: width of a block.
        channels: of the maps that are fused.
        num_labels: number of classes.
        dropout: before the last convolution.
    """

    def __init__(self, hidden: int, channels: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.neck = DPTNeck(
            DPTConfig(
                hidden_size=hidden,
                is_hybrid=False,
                readout_type="ignore",
                # In proportion as those of DPT on a ViT-Base or -Large
                neck_hidden_sizes=[max(1, hidden * part // 8) for part in (1, 2, 4, 8)],
                fusion_hidden_size=channels,
            )
        )
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            PixelClassifier(channels, num_labels),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features `(batch, 4 * hidden, height, width)` into logits, about eight times as high and wide."""
        height, width = features.shape[-2:]
        # The neck drops the first token of each block
        tokens = [F.pad(each.flatten(2).transpose(1, 2), (0, 0, 1, 0)) for each in features.chunk(4, dim=1)]
        return self.head(self.neck(tokens, height, width)[-1])
