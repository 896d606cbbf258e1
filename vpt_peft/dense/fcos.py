"""FCOS (Tian et al., ICCV 2019): a dense head in which every location of a feature pyramid may find one object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .boxes import area, centres, corners, generalised_iou


# A location counts as central if it is within this many strides of the middle of an object
_CENTRE_RADIUS = 1.5
# A level finds objects whose farthest side is at most this many strides away
_REACH = 8.0


@dataclass(frozen=True)
class Predictions:
    """What the head says at every location of all levels, the finest level first.

    Args:
        logits: `(batch, locations, classes)`.
        distances: `(batch, locations, 4)`, to the left, top, right and bottom side in pixels, positive.
        centerness: `(batch, locations)`, logits.
    """

    logits: torch.Tensor
    distances: torch.Tensor
    centerness: torch.Tensor


class SimpleFeaturePyramid(nn.Module):
    """Feature maps of several strides from the last map of a plain ViT (Li et al., ECCV 2022, "ViTDet").

    Args:
        width: channels of the map.
        channels: channels of each level.
        scale_factors: size of each level relative to the map, from the finest down; powers of two.
    """

    def __init__(self, width: int, channels: int, scale_factors: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(width, channels, factor) for factor in scale_factors)

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Turn a map `(batch, width, height, width)` into one `(batch, channels, ...)` per level."""
        return [level(features) for level in self.levels]


def _level(width: int, channels: int, factor: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    while factor > 1:
        layers += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.GroupNorm(1, width), nn.GELU()]
        factor /= 2
    if factor < 1:
        layers.append(nn.MaxPool2d(round(1 / factor), ceil_mode=True))
    layers += [nn.Conv2d(width, channels, 1, bias=False), nn.GroupNorm(1, channels)]
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(1, channels))


class FCOSHead(nn.Module):
    """Class, box and centre-ness at every location, with the same weights on all levels.

    Args:
        channels: of the feature maps.
        num_labels: number of classes.
        num_convs: 3x3 convolutions before the predictions.
        num_levels: number of feature maps.
    """

    def __init__(self, channels: int, num_labels: int, num_convs: int, num_levels: int) -> None:
        super().__init__()
        groups = math.gcd(channels, 32)
        self.class_tower, self.box_tower = (
            nn.Sequential(
                *(
                    layer
                    for _ in range(num_convs)
                    for layer in (
                        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                        nn.GroupNorm(groups, channels),
                        nn.ReLU(),
                    )
                )
            )
            for _ in range(2)
        )
        self.class_predictor = nn.Conv2d(channels, num_labels, 3, padding=1)
        self.box_predictor = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness_predictor = nn.Conv2d(channels, 1, 3, padding=1)
        self.level_scales = nn.Parameter(torch.ones(num_levels))

    def forward(self, features: Sequence[torch.Tensor], strides: Sequence[float]) -> Predictions:
        """Predict from one map `(batch, channels, height, width)` per level and the levels' strides in pixels."""
        logits, distances, centerness = [], [], []
        for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
            of_class, of_box = self.class_tower(feature), self.box_tower(feature)
            logits.append(_flat(self.class_predictor(of_class)))
            # The bound keeps an early, wild prediction finite
            exponent = (self.level_scales[level] * _flat(self.box_predictor(of_box)).float()).clamp(max=8.0)
            distances.append(exponent.exp() * stride)
            centerness.append(_flat(self.centerness_predictor(of_box))[..., 0])
        return Predictions(torch.cat(logits, 1), torch.cat(distances, 1), torch.cat(centerness, 1))


def _flat(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Locations:
    """Where the locations of all levels are.

    Args:
        points: `(locations, 2)`, x and y in pixels.
        strides: `(locations,)`, in pixels.
        reach: `(locations, 2)`, the nearest and the farthest that the farthest side of an object may be, in pixels.
    """

    points: torch.Tensor
    strides: torch.Tensor
    reach: torch.Tensor

    @classmethod
    def of(cls, features: Sequence[torch.Tensor], strides: Sequence[float]) -> Locations:
        """Return the locations of feature maps `(batch, channels, height, width)`."""
        points, sizes, reach = [], [], []
        nearest = 0.0
        for level, (feature, stride) in enumerate(zip(features, strides, strict=True)):
            height, width = feature.shape[-2:]
            rows, columns = (
                (torch.arange(n, device=feature.device, dtype=torch.float32) + 0.5) * stride for n in (height, width)
            )
            points.append(torch.cartesian_prod(rows, columns).flip(-1))
            sizes.append(rows.new_full((height * width,), stride))
            farthest = math.inf if level == len(strides) - 1 else _REACH * stride
            reach.append(rows.new_tensor([nearest, farthest]).expand(height * width, 2))
            nearest = farthest
        return cls(torch.cat(points), torch.cat(sizes), torch.cat(reach))

    def boxes(self, distances: torch.Tensor) -> torch.Tensor:
        """Return corners in pixels `(batch, locations, 4)` of distances to the four sides."""
        return torch.cat([self.points - distances[..., :2], self.points + distances[..., 2:]], -1)

    def match(self, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give locations their objects: those near its middle, on the level that reaches its sides.

        Of several objects at a location, the smallest one is its own.

        Args:
            boxes: `(objects, 4)`, corners in pixels.

        Returns:
            Which locations have an object `(locations,)`, and the number of each location's object `(locations,)`.
        """
        if not len(boxes):
            none = torch.zeros(len(self.points), dtype=torch.long, device=self.points.device)
            return none.bool(), none
        points = self.points[:, None]
        distances = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], -1)
        farthest = distances.amax(-1)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        central = ((points - middle).abs() < _CENTRE_RADIUS * self.strides[:, None, None]).all(-1)
        fits = (farthest >= self.reach[:, :1]) & (farthest < self.reach[:, 1:])
        allowed = (distances.amin(-1) > 0) & central & fits
        cost, objects = torch.where(allowed, area(boxes), math.inf).min(-1)
        return cost.isfinite(), objects


def detection_loss(
    predictions: Predictions,
    locations: Locations,
    labels: Sequence[Mapping[str, torch.Tensor]],
    size: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """Return the focal loss of the classes, the GIoU loss of the boxes and the loss of the centre-ness.

    Args:
        predictions: of the head.
        locations: where they are.
        labels: "class_labels" `(objects,)` and "boxes" `(objects, 4)` (centre, width, height; relative to the image) of
            each image.
        size: height and width of the images in pixels.
    """
    device = predictions.logits.device
    height, width = size
    scale = torch.tensor([width, height, width, height], device=device, dtype=torch.float32)
    targets = torch.zeros_like(predictions.logits, dtype=torch.float32)
    positive = torch.zeros(targets.shape[:2], dtype=torch.bool, device=device)
    wanted = torch.zeros((*targets.shape[:2], 4), device=device)
    for image, label in enumerate(labels):
        boxes = corners(label["boxes"].to(device, torch.float32)) * scale
        has_object, objects = locations.match(boxes)
        positive[image] = has_object
        wanted[image, has_object] = boxes[objects[has_object]]
        targets[image, has_object, label["class_labels"].to(device)[objects[has_object]]] = 1.0
    count = positive.sum().clamp(min=1)
    points = locations.points.expand(len(targets), -1, -1)[positive]
    goal = wanted[positive]
    target_centerness = _centerness(torch.cat([points - goal[:, :2], goal[:, 2:] - points], -1))
    overlap = generalised_iou(locations.boxes(predictions.distances)[positive], goal)
    return {
        "loss_class": focal_loss(predictions.logits.float(), targets).sum() / count,
        "loss_box": (target_centerness * (1 - overlap)).sum() / target_centerness.sum().clamp(min=1e-6),
        "loss_centerness": F.binary_cross_entropy_with_logits(
            predictions.centerness.float()[positive], target_centerness, reduction="sum"
        )
        / count,
    }


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Return -alpha_t (1 - p_t)^gamma log(p_t), element by element (Lin et al., ICCV 2017)."""
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * (1 - torch.exp(-entropy)) ** gamma * entropy


def _centerness(distances: torch.Tensor) -> torch.Tensor:
    """Return sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of distances `(n, 4)` that are all positive."""
    across, down = distances[:, 0::2], distances[:, 1::2]
    return ((across.amin(-1) / across.amax(-1)) * (down.amin(-1) / down.amax(-1))).sqrt()


def relative(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return corners in pixels as centre, width and height relative to an image of a height and width, cut to it."""
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return centres(torch.minimum(boxes.clamp(min=0), limit) / limit)
