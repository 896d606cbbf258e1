"""COCO's average precision of boxes and masks, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Metric


METRICS = (
    Metric("map", "Mean average precision (IoU 0.50 to 0.95)", "mean_average_precision"),
    Metric("map_50", "Mean average precision (IoU 0.50)", "mean_average_precision"),
    Metric("map_75", "Mean average precision (IoU 0.75)", "mean_average_precision"),
    Metric("map_small", "Mean average precision (small objects, below 32x32)", "mean_average_precision"),
    Metric("map_medium", "Mean average precision (medium objects)", "mean_average_precision"),
    Metric("map_large", "Mean average precision (large objects, above 96x96)", "mean_average_precision"),
    Metric("mar_100", "Mean average recall (100 findings per image)", "mean_average_recall"),
)
_PLACES = (0, 1, 2, 3, 4, 5, 8)


class AveragePrecision:
    """COCO's measures over images that come one by one.

    Args:
        kind: "bbox" or "segm".
    """

    def __init__(self, kind: str = "bbox") -> None:
        self.kind = kind
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._images: list[dict[str, Any]] = []
        self._objects: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(
        self, size: tuple[int, int], objects: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add an image.

        Args:
            size: (height, width) in pixels.
            objects: what is there: "category_id", "bbox" [x, y, width, height] in pixels, "area", "iscrowd", and for
                masks "segmentation" in COCO's run lengths.
            found: what was found: "category_id", "score", and "bbox" or "segmentation".
        """
        image = len(self._images) + 1
        self._images.append({"id": image, "height": size[0], "width": size[1]})
        for entry in objects:
            self._objects.append({**entry, "id": len(self._objects) + 1, "image_id": image})
        self._found += [{**entry, "image_id": image} for entry in found]

    def result(self) -> dict[str, float]:
        """Return the measures in [0, 1], and average precision per class as "map_class_<number>".

        Sizes and classes without objects are left out, as nothing can be said about them.
        """
        from faster_coco_eval import COCO, COCOeval_faster

        classes = sorted({entry["category_id"] for entry in self._objects})
        truth = COCO(
            {
                "images": self._images,
                "annotations": self._objects,
                "categories": [{"id": number, "name": str(number)} for number in classes],
            }
        )
        evaluation = COCOeval_faster(
            truth, truth.loadRes([f for f in self._found if f["category_id"] in classes]), self.kind
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        values = {metric.name: evaluation.stats[place] for metric, place in zip(METRICS, _PLACES, strict=True)}
        # (IoU thresholds, recalls, classes, sizes, numbers of findings); all sizes first, most findings last
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        for place, number in enumerate(evaluation.params.catIds):
            values[f"map_class_{number}"] = precision[:, :, place].mean()
        return {name: float(value) for name, value in values.items() if value > -1}
