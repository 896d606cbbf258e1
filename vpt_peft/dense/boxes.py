"""Boxes in plain torch: overlap, the generalised IoU and non-maximum suppression."""

from __future__ import annotations

import torch


_EXPORTED_TURNS = 16


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """Return boxes `(..., 4)` of centre, width and height as left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def centres(boxes: torch.Tensor) -> torch.Tensor:
    """Return boxes `(..., 4)` of left, top, right, bottom as centre, width and height."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def area(boxes: torch.Tensor) -> torch.Tensor:
    """Return the area `(...)` of boxes `(..., 4)` given by their corners; 0 where right is left of left."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def generalised_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return IoU - (hull - union) / hull of boxes that broadcast (Rezatofighi et al., CVPR 2019).

    Args:
        a: `(..., 4)`, corners.
        b: `(..., 4)`, corners.

    Returns:
        `(...)`, in [-1, 1].
    """
    overlap, union = _overlap_and_union(a, b)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    tiny = torch.finfo(hull.dtype).eps
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def pairwise_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the IoU `(..., n, m)` of boxes `(..., n, 4)` with boxes `(..., m, 4)`, given by their corners."""
    overlap, union = _overlap_and_union(a[..., :, None, :], b[..., None, :, :])
    return overlap / union.clamp(min=torch.finfo(union.dtype).eps)


def suppress(boxes: torch.Tensor, classes: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return which boxes greedy non-maximum suppression keeps in each class.

    A box goes if a kept one of its class that comes before it overlaps it by more than the threshold. Whether the n-th
    box stays depends on those before it alone, so repeating the rule for all at once settles. A graph that is exported
    has a fixed number of turns, which is as many as a chain of boxes, each beaten by the one before, can be long.

    Args:
        boxes: `(batch, n, 4)`, corners, the best first.
        classes: `(batch, n)`, integers.
        threshold: IoU in [0, 1].

    Returns:
        `(batch, n)`, boolean.
    """
    same = classes[:, :, None] == classes[:, None]
    beaten = ((pairwise_iou(boxes, boxes) > threshold) & same).triu(diagonal=1)
    kept = torch.ones_like(classes, dtype=torch.bool)
    exporting = torch.compiler.is_exporting()
    for _ in range(_EXPORTED_TURNS if exporting else classes.shape[1] + 1):
        updated = ~(beaten & kept[:, :, None]).any(1)
        if not exporting and torch.equal(updated, kept):
            break
        kept = updated
    return kept


def _overlap_and_union(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return overlap, area(a) + area(b) - overlap
