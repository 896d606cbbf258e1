"""Mean IoU of semantic segmentation, by torchmetrics' confusion matrices."""

from __future__ import annotations

import torch
from transformers import EvalPrediction

from .base import Metric


METRICS = (
    Metric("mean_iou", "Mean IoU", "mean_iou"),
    Metric("mean_accuracy", "Mean accuracy", "mean_accuracy"),
    Metric("pixel_accuracy", "Pixel accuracy", "accuracy"),
)


def count_pixels(predicted: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_index: int) -> torch.Tensor:
    """Return a confusion matrix for each image, `(batch, true classes, predicted classes)`.

    Args:
        predicted: `(batch, height, width)`, integers.
        labels: `(batch, height, width)`, integers.
        num_labels: number of classes.
        ignore_index: label of pixels that do not count.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return torch.stack(
        [
            multiclass_confusion_matrix(found, expected, num_labels, ignore_index=ignore_index, validate_args=False)
            for found, expected in zip(predicted, labels, strict=True)
        ]
    )


class SegmentationMetrics:
    """Mean IoU of batches that come one by one, as `Trainer` wants them with `batch_eval_metrics`.

    Pixels are counted over all images first. IoU is taken over the classes that occur in labels or predictions, accuracy
    over those that occur in labels.
    """

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; return the metrics of all batches since the last result, or {} before the last one.

        Args:
            eval_prediction: its predictions are matrices of `count_pixels`.
            compute_result: this batch is the last.
        """
        counts = torch.as_tensor(eval_prediction.predictions).sum(0).cpu()
        self._counts = counts if self._counts is None else self._counts + counts
        if not compute_result:
            return {}
        counts, self._counts = self._counts.double(), None
        hits, true, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        union = true + predicted - hits
        return {
            "mean_iou": _mean(hits, union),
            "mean_accuracy": _mean(hits, true),
            "pixel_accuracy": float(hits.sum() / true.sum().clamp(min=1)),
        }


def _mean(part: torch.Tensor, whole: torch.Tensor) -> float:
    counted = whole > 0
    return float((part[counted] / whole[counted]).mean()) if counted.any() else 0.0
