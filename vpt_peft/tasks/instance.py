"""Instance segmentation: a mask and a class for each object.

EoMT and Mask2Former train as transformers has them; a plain ViT becomes an EoMT. Average precision is COCO's, measured on
the canvas that the model sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoModelForUniversalSegmentation, EvalPrediction, PreTrainedModel

from ..data.arguments import DataArguments
from ..data.canvas import Canvas, JointAugmentation, canvas_size
from ..data.images import to_rgb
from ..data.instances import instance_masks, read_instances
from ..dense import need_dense
from ..dense.eomt import eomt_from_backbone
from ..plots.overlay import captions, draw_findings
from .average_precision import METRICS, AveragePrecision
from .loading import load_pretrained, quiet_loading


MOST_FINDINGS = 100
_THRESHOLD = 0.5
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def find_masks(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, num_labels: int, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best findings of one image, the best first.

    A score is the probability of the class times the mean probability of the pixels in the mask (Mask2Former).

    Args:
        class_logits: `(queries, classes + 1)`; the last one stands for no object.
        mask_logits: `(queries, height, width)`.
        num_labels: number of classes.
        size: height and width of the masks that are returned.

    Returns:
        Scores and classes `(findings,)`, and logits of the masks `(findings, *size)`. Empty masks are left out.
    """
    scores = class_logits.float().softmax(-1)[:, :-1].flatten()
    scores, order = scores.topk(min(MOST_FINDINGS, len(scores)))
    masks = mask_logits.float()[order // num_labels]
    masks = F.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    pixels = inside.sum((-2, -1))
    scores = scores * (masks.sigmoid() * inside).sum((-2, -1)) / pixels.clamp(min=1)
    scores, best = scores.masked_fill(pixels == 0, -1.0).sort(descending=True)
    best = best[scores >= 0]
    return scores[: len(best)], order[best] % num_labels, masks[best]


def run_lengths(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Return masks `(n, height, width)` as COCO's run lengths, {"size", "counts"}, with counts as text."""
    from faster_coco_eval.core import mask as coco_mask

    found = coco_mask.encode(np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": list(map(int, each["size"])), "counts": _text(each["counts"])} for each in found]


def _text(counts: str | bytes) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


@dataclass(frozen=True)
class InstanceTransform:
    """A transform of rows of `read_instances` to {"pixel_values", "mask_labels", "class_labels"}, or pixels alone.

    Args:
        canvas: places images and masks.
        augmentation: draws how both change.
    """

    canvas: Canvas
    augmentation: JointAugmentation | None = None

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        images = [to_rgb(image) for image in batch["image"]]
        output: dict[str, Any] = {"pixel_values": list(self.canvas.pixel_values(images))}
        if set(batch) == {"image"}:
            return output
        output |= {"mask_labels": [], "class_labels": []}
        for index, image in enumerate(images):
            row = {name: values[index] for name, values in batch.items()}
            masks, classes = instance_masks({**row, "image": image})
            on_canvas, numbers = self.canvas.masks(image, masks), torch.from_numpy(classes)
            if self.augmentation is not None:
                pixels, on_canvas, stays = self.augmentation.with_masks(output["pixel_values"][index], on_canvas)
                output["pixel_values"][index] = pixels
            else:
                stays = on_canvas.flatten(1).any(-1)
            output["mask_labels"].append(on_canvas[stays])
            output["class_labels"].append(numbers[stays])
        return output


class InstanceMetrics:
    """Average precision of masks of batches that come one by one, as `Trainer` wants it with `batch_eval_metrics`.

    Its predictions are what `InstanceSegmentation.measurable` makes of outputs and labels.
    """

    def __init__(self) -> None:
        self._precision = AveragePrecision("segm")

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; return the measures of all batches since the last result, or {} before the last one."""
        found, found_codes, expected, expected_codes, sizes = map(np.asarray, eval_prediction.predictions)
        for index, (height, width) in enumerate(sizes.tolist()):
            size = [int(height), int(width)]
            objects = [
                {"category_id": int(kind), "area": float(area), "iscrowd": 0, **_segmentation(codes, size)}
                for (kind, area), codes in zip(expected[index], expected_codes[index], strict=True)
                if kind >= 0
            ]
            findings = [
                {
                    "category_id": int(kind),
                    "score": float(score),
                    "segmentation": _segmentation(codes, size)["segmentation"],
                }
                for (kind, score), codes in zip(found[index], found_codes[index], strict=True)
                if kind >= 0
            ]
            self._precision.add((size[0], size[1]), objects, findings)
        if not compute_result:
            return {}
        result = self._precision.result()
        self._precision.reset()
        return result


def _segmentation(codes: np.ndarray, size: list[int]) -> dict[str, Any]:
    from faster_coco_eval.core import mask as coco_mask

    runs = {"size": size, "counts": codes[codes > 0].astype(np.uint8).tobytes()}
    return {"segmentation": runs, "bbox": np.asarray(coco_mask.toBbox(runs)).reshape(-1).tolist()}


class InstanceSegmentation:
    """A mask and a class for each object."""

    pipeline_tag = "instance-segmentation"
    hub_tag = "image-segmentation"
    auto_class = AutoModelForUniversalSegmentation
    metrics = METRICS
    best_metric = "map"
    higher_is_better = True
    label_names = ("mask_labels", "class_labels")
    has_cached_features = False
    finds_many = True
    decoders = ()
    refused_methods = ("mlp", "sidetune")
    example = (
        "from vpt_peft.tasks import get_task\n"
        'for found in get_task("instance-segmentation").predict(model, processor, [image])[0]:\n'
        '    print(found["label"], found["score"], found["xmin"], found["ymin"], found["xmax"], found["ymax"])'
    )
    limits = "The model finds only objects of the classes above, and may take two that touch for one."

    def read(
        self,
        data: DataArguments,
        token: str | None = None,
        cache_dir: str | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> datasets.DatasetDict:
        """Read a data set with masks; see `vpt_peft.data.instances.read_instances`."""
        need_dense()
        return read_instances(data, token, cache_dir, id2label)

    def load_model(
        self,
        path: str,
        id2label: Mapping[int, str],
        source: Mapping[str, Any],
        image_processor: Any = None,
        decoder: str | None = None,
    ) -> PreTrainedModel:
        """Load an EoMT, Mask2Former or MaskFormer of transformers, or make a plain ViT an EoMT."""
        config = AutoConfig.from_pretrained(path, **source)
        size = None if image_processor is None else canvas_size(image_processor)
        if type(config) in AutoModelForUniversalSegmentation._model_mapping:
            fixed = config.image_size if config.model_type.startswith("eomt") else None
            if None not in (fixed, size) and size != (fixed, fixed):
                raise ValueError(
                    f"image_size={list(size or ())}: {path!r} is built for {fixed} {fixed}; give that, or leave it out."
                )
            return load_pretrained(AutoModelForUniversalSegmentation, path, config, id2label, source)[0]
        if size is None:
            raise ValueError("an EoMT on a plain ViT is built for one size; give the image processor of the run.")
        height, width = size
        if height != width:
            raise ValueError(f"image_size={[height, width]}: EoMT takes squares; give one size twice, as in 256 256.")
        with quiet_loading():
            return eomt_from_backbone(path, id2label, height, source)

    def prepare_processor(self, image_processor: Any, data: DataArguments) -> Any:
        """Return the image processor with the size of the canvas: `image_size`, else its own."""
        height, width = data.image_size or canvas_size(image_processor)
        image_processor.size = {"height": height, "width": width}
        return image_processor

    def id2label(self, split: datasets.Dataset) -> dict[int, str]:
        """Return the classes of a split by their numbers."""
        features = split.features
        feature = features["category"] if "category" in features else features["objects"]["category"].feature
        return dict(enumerate(feature.names))

    def targets(self, split: datasets.Dataset) -> list[dict[str, Any]]:
        """Features of a dense task are not cached.

        Raises:
            ValueError: always.
        """
        raise ValueError("cache_features: masks follow each image's augmentation; leave it out.")

    def transform(
        self, image_processor: Any, augmentation: str = "none", train: bool = False, seed: int = 0
    ) -> InstanceTransform:
        """Return a transform of images and masks to model input.

        Args:
            image_processor: normalises; its size is that of the canvas.
            augmentation: "resize_crop_flip": in training images are flipped, scaled and shifted at random.
            train: draw them.
            seed: of the draws.
        """
        random = JointAugmentation(seed) if train and augmentation == "resize_crop_flip" else None
        return InstanceTransform(Canvas(image_processor, *canvas_size(image_processor)), random)

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
        """Stack pixels `(batch, 3, height, width)`; masks and classes stay lists, as images differ in their number."""
        batch: dict[str, Any] = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
        if "mask_labels" in examples[0]:
            batch |= {name: [example[name] for example in examples] for name in self.label_names}
        return batch

    def measurable(self, model: Any, predictions: Any, labels: Any) -> tuple[torch.Tensor, ...]:
        """Return outputs and labels of a batch as tensors, masks as codes of their run lengths.

        Args:
            model: gives the number of classes.
            predictions: the outputs; the first two that fit each other are of classes and masks.
            labels: masks and classes of each image, as `transform` gives them.

        Returns:
            Class and score of the findings `(batch, findings, 2)`, codes of their masks `(batch, findings, length)`, class
            and area of the objects `(batch, objects, 2)`, codes of theirs `(batch, objects, length)`, and height and
            width `(batch, 2)`. Rows of class -1 and codes of 0 fill up.
        """
        class_logits, mask_logits = _classes_and_masks(predictions)
        masks, classes = labels
        size = tuple(masks[0].shape[-2:])
        found, expected = [], []
        for of_classes, of_masks, true_masks, numbers in zip(class_logits, mask_logits, masks, classes, strict=True):
            scores, kinds, shapes = find_masks(of_classes, of_masks, model.config.num_labels, size)
            found.append((torch.stack([kinds.float(), scores], -1), shapes > 0))
            areas = true_masks.sum((-2, -1))
            expected.append((torch.stack([numbers.to(areas), areas], -1), true_masks > 0))
        sizes = torch.tensor([size] * len(found), device=class_logits.device)
        return *_filled(found), *_filled(expected), sizes

    def compute_metrics(self) -> InstanceMetrics:
        """Return a fresh function for `Trainer(compute_metrics=...)` with `batch_eval_metrics`."""
        return InstanceMetrics()

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
        """Return the findings of each RGB image, the best first.

        Each has "label", "score", the sides of its box "xmin", "ymin", "xmax" and "ymax" in pixels, its "area", and its
        mask as "segmentation", COCO's run lengths.
        """
        canvas = Canvas(image_processor, *canvas_size(image_processor))
        device = next(model.parameters()).device
        output = model(pixel_values=canvas.pixel_values(images).to(device))
        names = {int(number): name for number, name in model.config.id2label.items()}
        lowest, rows = _THRESHOLD if threshold is None else threshold, []
        for image, classes, masks in zip(
            images, output.class_queries_logits, output.masks_queries_logits, strict=True
        ):
            scores, kinds, found = find_masks(classes, masks, model.config.num_labels, (canvas.height, canvas.width))
            height, width = canvas.covered(image)
            count = int((scores >= lowest).sum())
            count = count if top_k is None else min(count, top_k)
            on_image = F.interpolate(
                found[None, :count, :height, :width], size=(image.height, image.width), mode="bilinear"
            )
            shapes = on_image[0] > 0 if count else torch.zeros(0, image.height, image.width, dtype=torch.bool)
            rows.append(
                [
                    {"label": names[kind], "score": score, **_outline(shape), "segmentation": runs}
                    for kind, score, shape, runs in zip(
                        kinds[:count].tolist(), scores[:count].tolist(), shapes, run_lengths(shapes), strict=True
                    )
                    if shape.any()
                ]
            )
        return rows

    def draw(self, image: Image.Image, findings: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Image.Image:
        """Return the image with the mask of each finding, in the colour of its class."""
        from faster_coco_eval.core import mask as coco_mask

        numbers = {name: number for number, name in names.items()}
        masks = [np.asarray(coco_mask.decode(found["segmentation"]), bool) for found in findings]
        return draw_findings(
            image,
            [[found[side] for side in _SIDES] for found in findings],
            [numbers[found["label"]] for found in findings],
            captions(findings, names),
            np.stack(masks) if masks else None,
        )


TASK = InstanceSegmentation()


def _classes_and_masks(predictions: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    for classes, masks in pairwise(predictions):
        if torch.is_tensor(classes) and torch.is_tensor(masks) and (classes.ndim, masks.ndim) == (3, 4):
            if classes.shape[:2] == masks.shape[:2]:
                return classes, masks
    raise ValueError("the model's output has no class and mask for each query; use EoMT, Mask2Former or MaskFormer.")


def _filled(rows: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values `(batch, most, 2)` and codes of masks `(batch, most, length)`, filled up with -1 and 0."""
    codes = [
        [runs["counts"].encode("ascii") for runs in run_lengths(masks)] if len(masks) else [] for _, masks in rows
    ]
    most = max(1, *(len(each) for each in codes))
    length = max([1, *(len(code) for each in codes for code in each)])
    values = rows[0][0].new_full((len(rows), most, 2), -1.0)
    packed = torch.zeros((len(rows), most, length), dtype=torch.uint8, device=values.device)
    for index, ((numbers, _), each) in enumerate(zip(rows, codes, strict=True)):
        values[index, : len(numbers)] = numbers
        for place, code in enumerate(each):
            packed[index, place, : len(code)] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
    return values, packed


def _outline(mask: torch.Tensor) -> dict[str, float]:
    """Return the sides of the box around a mask `(height, width)`, and its number of pixels."""
    rows, columns = torch.where(mask)
    if not len(rows):
        return {}
    sides = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return {**dict(zip(_SIDES, map(float, sides), strict=True)), "area": float(len(rows))}
