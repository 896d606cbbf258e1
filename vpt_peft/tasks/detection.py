"""Object detection: boxes of several classes in each image.

Average precision is COCO's, by faster-coco-eval. DETR-like models of transformers train as they are; a plain ViT gets the
dense head of `vpt_peft.dense.detector`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForObjectDetection, EvalPrediction, PreTrainedModel

from ..data.arguments import DataArguments
from ..data.canvas import Canvas, JointAugmentation, canvas_size
from ..data.detection import read_detection
from ..data.images import to_rgb
from ..data.objects import object_classes
from ..dense import need_dense
from ..dense.boxes import centres, corners
from ..dense.detector import ViTFCOSForObjectDetection
from ..dense.plain_vit import check_image_size
from ..dense.yolos import FrozenYolosForObjectDetection
from ..plots.overlay import captions, draw_findings
from .average_precision import METRICS, AveragePrecision
from .loading import load_pretrained, quiet_loading


# Findings of an image that count, as COCO has it
MOST_FINDINGS = 100
_THRESHOLD = 0.5
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def find_boxes(
    logits: torch.Tensor, boxes: torch.Tensor, num_labels: int, canvas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best findings of each image, the best first.

    One more logit than classes means that the last one stands for no object, and all are exclusive (DETR, YOLOS);
    otherwise each class is a question of its own.

    Args:
        logits: `(batch, queries, classes)`.
        boxes: `(batch, queries, 4)`, centre, width and height relative to the canvas.
        num_labels: number of classes.
        canvas: `(batch, 2)`, height and width of the canvas in pixels of the image.

    Returns:
        Scores and classes `(batch, findings)`, and corners in pixels of the image `(batch, findings, 4)`.
    """
    exclusive = logits.shape[-1] == num_labels + 1
    scores = logits.float().softmax(-1)[..., :-1] if exclusive else logits.float().sigmoid()
    scores, order = scores.flatten(1).topk(min(MOST_FINDINGS, scores[0].numel()))
    queries, classes = order // num_labels, order % num_labels
    height, width = canvas.to(boxes).unbind(-1)
    found = torch.gather(boxes.float(), 1, queries[..., None].expand(-1, -1, 4))
    return scores, classes, corners(found) * torch.stack([width, height, width, height], -1)[:, None]


@dataclass(frozen=True)
class DetectionTransform:
    """A transform of {"image", "objects"} to {"pixel_values", "labels"}; "objects" may be absent.

    Labels are those of transformers' detection models: "class_labels" and "boxes" (centre, width and height, relative).
    Crowds, which nothing is trained on, have keys of their own. "canvas" is the height and width of the canvas in
    pixels of the image.
    """

    canvas: Canvas
    augmentation: JointAugmentation | None = None

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        images = [to_rgb(image) for image in batch["image"]]
        pixels = list(self.canvas.pixel_values(images))
        if "objects" not in batch:
            return {"pixel_values": pixels}
        labels = []
        for index, (image, objects) in enumerate(zip(images, batch["objects"], strict=True)):
            extent = torch.tensor(self.canvas.extent(image))
            scale = self.canvas.height / extent[0]
            boxes = torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4) * scale
            boxes[:, 2:] += boxes[:, :2]
            classes = torch.tensor(objects["category"], dtype=torch.long)
            areas = torch.tensor(objects["area"], dtype=torch.float32)
            crowd = torch.tensor(objects["iscrowd"], dtype=torch.bool)
            if self.augmentation is not None:
                pixels[index], boxes, stays = self.augmentation(pixels[index], boxes)
                boxes, classes, areas, crowd = boxes[stays], classes[stays], areas[stays], crowd[stays]
            sheet = boxes.new_tensor([self.canvas.width, self.canvas.height] * 2)
            boxes = centres(boxes / sheet)
            labels.append(
                {
                    "class_labels": classes[~crowd],
                    "boxes": boxes[~crowd],
                    "area": areas[~crowd],
                    "crowd_labels": classes[crowd],
                    "crowd_boxes": boxes[crowd],
                    "crowd_area": areas[crowd],
                    "canvas": extent,
                    "orig_size": torch.tensor([image.height, image.width]),
                }
            )
        return {"pixel_values": pixels, "labels": labels}


class DetectionMetrics:
    """Average precision of batches that come one by one, as `Trainer` wants them with `batch_eval_metrics`.

    Its predictions are what `ObjectDetection.measurable` makes of outputs and labels.
    """

    def __init__(self) -> None:
        self._precision = AveragePrecision()

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; return the measures of all batches since the last result, or {} before the last one."""
        found, targets = map(torch.as_tensor, eval_prediction.predictions)
        for of_image, expected in zip(found.double(), targets.double(), strict=True):
            size = (int(expected[0, 0]), int(expected[0, 1]))
            objects = [
                {"category_id": int(row[0]), "bbox": row[1:5].tolist(), "area": float(row[5]), "iscrowd": int(row[6])}
                for row in expected[1:]
                if row[0] >= 0
            ]
            findings = [
                {"category_id": int(row[0]), "score": float(row[1]), "bbox": row[2:6].tolist()}
                for row in of_image
                if row[0] >= 0
            ]
            self._precision.add(size, objects, findings)
        if not compute_result:
            return {}
        result = self._precision.result()
        self._precision.reset()
        return result


class ObjectDetection:
    """Boxes of several classes in each image."""

    pipeline_tag = hub_tag = "object-detection"
    auto_class = AutoModelForObjectDetection
    metrics = METRICS
    best_metric = "map"
    higher_is_better = True
    label_names = ("labels",)
    has_cached_features = False
    finds_many = True
    decoders = ()
    refused_methods = ("mlp", "sidetune")
    example = (
        "from vpt_peft.tasks import get_task\n"
        'for found in get_task("object-detection").predict(model, processor, [image])[0]:\n'
        "    print(found)"
    )
    limits = "The model finds only objects of the classes above; it misses some, and small ones most."

    def read(
        self,
        data: DataArguments,
        token: str | None = None,
        cache_dir: str | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> datasets.DatasetDict:
        """Read a data set with the columns "image" and "objects"; see `vpt_peft.data.detection.read_detection`."""
        need_dense()
        return read_detection(data, token, cache_dir, id2label)

    def load_model(
        self,
        path: str,
        id2label: Mapping[int, str],
        source: Mapping[str, Any],
        image_processor: Any = None,
        decoder: str | None = None,
    ) -> PreTrainedModel:
        """Load a detector of transformers, or a plain ViT with the head of `ViTFCOSForObjectDetection`."""
        config = AutoConfig.from_pretrained(path, **source)
        if type(config) in AutoModelForObjectDetection._model_mapping:
            loader: Any = (
                FrozenYolosForObjectDetection if config.model_type == "yolos" else AutoModelForObjectDetection
            )
            return load_pretrained(loader, path, config, id2label, source)[0]
        if image_processor is not None:
            check_image_size(config, canvas_size(image_processor))
        with quiet_loading():
            return ViTFCOSForObjectDetection.from_backbone(path, id2label, source)

    def prepare_processor(self, image_processor: Any, data: DataArguments) -> Any:
        """Return the image processor with the size of the canvas: `image_size`, else its own."""
        height, width = data.image_size or canvas_size(image_processor)
        image_processor.size = {"height": height, "width": width}
        return image_processor

    def id2label(self, split: datasets.Dataset) -> dict[int, str]:
        """Return the classes of a split by their numbers."""
        return dict(enumerate(object_classes(split.features["objects"]).names))

    def targets(self, split: datasets.Dataset) -> list[dict[str, Any]]:
        """Features of a dense task are not cached.

        Raises:
            ValueError: always.
        """
        raise ValueError("cache_features: the positions of boxes follow each image's augmentation; leave it out.")

    def transform(
        self, image_processor: Any, augmentation: str = "none", train: bool = False, seed: int = 0
    ) -> DetectionTransform:
        """Return a transform of {"image", "objects"} to {"pixel_values", "labels"}.

        Args:
            image_processor: normalises; its size is that of the canvas.
            augmentation: "resize_crop_flip": in training images are flipped, scaled and shifted at random.
            train: draw them.
            seed: of the draws.
        """
        random = JointAugmentation(seed) if train and augmentation == "resize_crop_flip" else None
        return DetectionTransform(Canvas(image_processor, *canvas_size(image_processor)), random)

    def rows(
        self,
        split: datasets.Dataset,
        image_processor: Any,
        augmentation: str = "none",
        train: bool = False,
        seed: int = 0,
    ) -> datasets.Dataset:
        """Return a split whose rows are model input, one for each image."""
        return split.with_transform(self.transform(image_processor, augmentation, train, seed))

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """Stack pixels `(batch, 3, height, width)`; labels stay a list, as images differ in their number of objects."""
        batch: dict[str, Any] = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
        if "labels" in examples[0]:
            batch["labels"] = [example["labels"] for example in examples]
        return batch

    def measurable(
        self, model: Any, predictions: Sequence[Any], labels: Sequence[Mapping[str, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs and labels of a batch as tensors in pixels of the images.

        Trainer would cut the lists of labels in the last batch.

        Args:
            model: gives the number of classes.
            predictions: the outputs; the first two that fit each other are logits and boxes.
            labels: as `transform` gives them.

        Returns:
            `(batch, findings, 6)`: class, score and box ([x, y, width, height] in pixels of the image); and
            `(batch, 1 + most objects, 7)`: a row with the image's height and width, then class, box, area and crowd of
            each object. Rows of a negative class fill up.
        """
        logits, boxes = _logits_and_boxes(predictions)
        canvas = torch.stack([label["canvas"] for label in labels])
        sizes = torch.stack([label["orig_size"] for label in labels]).to(boxes)
        scores, classes, found = find_boxes(logits, boxes, model.config.num_labels, canvas)
        limit = sizes.flip(-1).repeat(1, 2)[:, None]
        found = torch.minimum(found.clamp(min=0), limit)
        found = torch.cat([classes[..., None], scores[..., None], found[..., :2], found[..., 2:] - found[..., :2]], -1)
        rows = [_expected(label) for label in labels]
        expected = boxes.new_full((len(rows), max(len(row) for row in rows), 7), -1.0)
        for index, row in enumerate(rows):
            expected[index, : len(row)] = row
        return found, expected

    def compute_metrics(self) -> DetectionMetrics:
        """Return a fresh function for `Trainer(compute_metrics=...)` with `batch_eval_metrics`."""
        return DetectionMetrics()

    @torch.no_grad()
    def predict(
        self,
        model: Any,
        image_processor: Any,
        images: Sequence[Image.Image],
        augmentation: str = "none",
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Return [{"label", "score", "xmin", "ymin", "xmax", "ymax"}, ...] in pixels for each RGB image, the best first."""
        canvas = Canvas(image_processor, *canvas_size(image_processor))
        device = next(model.parameters()).device
        output = model(pixel_values=canvas.pixel_values(images).to(device))
        extents = torch.tensor([canvas.extent(image) for image in images])
        results = find_boxes(output.logits, output.pred_boxes, model.config.num_labels, extents.to(device))
        names = {int(number): name for number, name in model.config.id2label.items()}
        rows = []
        for image, scores, classes, boxes in zip(images, *results, strict=True):
            count = int((scores >= (_THRESHOLD if threshold is None else threshold)).sum())
            count = count if top_k is None else min(count, top_k)
            limit = boxes.new_tensor([image.width, image.height] * 2)
            sides = torch.minimum(boxes.clamp(min=0), limit)[:count].tolist()
            rows.append(
                [
                    {"label": names[number], "score": score, **dict(zip(_SIDES, box, strict=True))}
                    for number, score, box in zip(
                        classes[:count].tolist(), scores[:count].tolist(), sides, strict=True
                    )
                ]
            )
        return rows

    def draw(self, image: Image.Image, findings: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Image.Image:
        """Return the image with a box for each finding, in the colour of its class."""
        numbers = {name: number for number, name in names.items()}
        return draw_findings(
            image,
            [[found[side] for side in _SIDES] for found in findings],
            [numbers[found["label"]] for found in findings],
            captions(findings, names),
        )


TASK = ObjectDetection()


def _logits_and_boxes(predictions: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    for logits, boxes in pairwise(predictions):
        if torch.is_tensor(logits) and torch.is_tensor(boxes) and logits.ndim == boxes.ndim == 3:
            if logits.shape[:2] == boxes.shape[:2] and boxes.shape[-1] == 4:
                return logits, boxes
    raise ValueError("the model's output has no logits with pred_boxes behind them; it is not an object detector.")


def _expected(label: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the targets of one image `(1 + objects, 7)`; see `ObjectDetection.measurable`."""
    height, width = label["canvas"]
    rows = [torch.tensor([*label["orig_size"].tolist(), *[0.0] * 5], device=label["boxes"].device)[None]]
    for crowd, prefix in ((0.0, ""), (1.0, "crowd_")):
        boxes = corners(label[f"{prefix}boxes"]) * torch.stack([width, height, width, height])
        classes = label["crowd_labels" if crowd else "class_labels"].to(boxes)
        sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], -1)
        areas = label[f"{prefix}area"]
        rows.append(torch.cat([classes[:, None], sides, areas[:, None], torch.full_like(areas[:, None], crowd)], -1))
    return torch.cat(rows)
