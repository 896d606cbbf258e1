"""Semantic segmentation: the class of every pixel.

Models of transformers train as they are; a plain ViT gets a small head of `vpt_peft.dense.segmenter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedModel

from ..data.arguments import DataArguments
from ..data.canvas import canvas_size
from ..data.masks import IGNORED
from ..data.segmentation import read_segmentation
from ..data.windows import SegmentationTransform, Tiled, tiles
from ..dense.build import SEGMENTATION_DECODERS, build_segmenter
from ..dense.mask_classifier import EomtForSemanticSegmentation  # noqa: F401 - registers itself
from ..dense.plain_vit import check_image_size
from ..dense.segmenter import enlarge
from ..plots.segments import draw_classes
from .instance import run_lengths
from .loading import load_pretrained, quiet_loading
from .mean_iou import METRICS, SegmentationMetrics, count_pixels


# Windows in one forward pass of prediction
_WINDOWS = 16


class SemanticSegmentation:
    """The class of every pixel."""

    pipeline_tag = "semantic-segmentation"
    hub_tag = "image-segmentation"
    auto_class = AutoModelForSemanticSegmentation
    metrics = METRICS
    best_metric = "mean_iou"
    higher_is_better = True
    label_names = ("labels",)
    has_cached_features = False
    finds_many = True
    decoders = SEGMENTATION_DECODERS
    refused_methods = ("mlp", "sidetune")
    example = (
        "from vpt_peft.tasks import get_task\n"
        'for found in get_task("semantic-segmentation").predict(model, processor, [image])[0]:\n'
        '    print(found["label"], round(found["share"], 3))'
    )
    limits = "The model gives every pixel one of the classes above, and misses small and thin things most."

    def read(
        self,
        data: DataArguments,
        token: str | None = None,
        cache_dir: str | None = None,
        id2label: Mapping[int, str] | None = None,
    ) -> datasets.DatasetDict:
        """Read a data set with images and masks; see `vpt_peft.data.segmentation.read_segmentation`."""
        return read_segmentation(data, token, cache_dir, id2label)

    def load_model(
        self,
        path: str,
        id2label: Mapping[int, str],
        source: Mapping[str, Any],
        image_processor: Any = None,
        decoder: str | None = None,
    ) -> PreTrainedModel:
        """Load a segmenter of transformers, or an encoder with a fresh head.

        Args:
            path: Hub id or folder.
            id2label: the classes.
            source: `revision`, `token` and `cache_dir`.
            image_processor: of the run; its size must hold a patch.
            decoder: the head of an encoder: "linear", "linear_4" (over four blocks), "setr_pup", "upernet" or "dpt";
                default: "linear".

        Raises:
            ValueError: a segmenter has a head already, or the encoder cannot have this one.
            OSError: there is no such model.
        """
        config = AutoConfig.from_pretrained(path, **source)
        if type(config) not in AutoModelForSemanticSegmentation._model_mapping or decoder is not None:
            decoder = decoder or "linear"
            if image_processor is not None and decoder != "upernet":
                check_image_size(config, canvas_size(image_processor))
            with quiet_loading():
                return build_segmenter(path, config, id2label, decoder, IGNORED, source)
        config.semantic_loss_ignore_index = IGNORED
        return load_pretrained(AutoModelForSemanticSegmentation, path, config, id2label, source)[0]

    def prepare_processor(self, image_processor: Any, data: DataArguments) -> Any:
        """Return the image processor with the size of the windows: `image_size`, else its own."""
        height, width = data.image_size or canvas_size(image_processor)
        image_processor.size = {"height": height, "width": width}
        return image_processor

    def id2label(self, split: datasets.Dataset) -> dict[int, str]:
        """Return the classes of a split by their numbers."""
        return dict(enumerate(split.features["annotation"].names))

    def targets(self, split: datasets.Dataset) -> list[dict[str, Any]]:
        """Features of a dense task are not cached.

        Raises:
            ValueError: always.
        """
        raise ValueError("cache_features: masks follow the windows of each image; leave it out.")

    def transform(
        self, image_processor: Any, augmentation: str = "none", train: bool = False, seed: int = 0
    ) -> SegmentationTransform:
        """Return a transform of {"image", "annotation", "tile"} to {"pixel_values", "labels"}."""
        return SegmentationTransform(image_processor, canvas_size(image_processor), augmentation, train, seed)

    def rows(
        self,
        split: datasets.Dataset,
        image_processor: Any,
        augmentation: str = "none",
        train: bool = False,
        seed: int = 0,
    ) -> datasets.Dataset | Tiled:
        """Return a split as model input: in training a window of each image, in evaluation every tile of it."""
        transform = self.transform(image_processor, augmentation, train, seed)
        if train or transform.is_scaled:
            return split.with_transform(transform)
        return Tiled(split, transform)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """Stack pixels `(batch, 3, height, width)` and labels `(batch, height, width)`."""
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def measurable(self, model: Any, predictions: Any, labels: torch.Tensor) -> torch.Tensor:
        """Return the confusion matrix of each window, `(batch, classes, classes)`, at the size of the labels."""
        # Trainer unpacks what stands alone
        given = (predictions,) if torch.is_tensor(predictions) else predictions
        logits = next(value for value in given if torch.is_tensor(value) and value.ndim == 4)
        classes = enlarge(logits, labels.shape[-2:]).argmax(1)
        return count_pixels(classes, labels, model.config.num_labels, IGNORED)

    def compute_metrics(self) -> SegmentationMetrics:
        """Return a fresh function for `Trainer(compute_metrics=...)` with `batch_eval_metrics`."""
        return SegmentationMetrics()

    @torch.no_grad()
    def probabilities(
        self, model: Any, image_processor: Any, image: Image.Image, augmentation: str = "none"
    ) -> torch.Tensor:
        """Return the probability of each class for each pixel, `(classes, height, width)`, on the CPU.

        Args:
            model: in eval mode.
            image_processor: as saved with the model.
            image: RGB, of any size.
            augmentation: as in training; "resize" sees the image whole.
        """
        transform = self.transform(image_processor, augmentation)
        device, shape = next(model.parameters()).device, (image.height, image.width)
        if transform.is_scaled:
            pixels = torch.stack(transform({"image": [image]})["pixel_values"]).to(device)
            return enlarge(model(pixel_values=pixels).logits, shape)[0].softmax(0).cpu()
        found = torch.empty(model.config.num_labels, *shape)
        covering = tiles(shape, transform.size)
        for start in range(0, len(covering), _WINDOWS):
            some = covering[start : start + _WINDOWS]
            batch = transform({"image": [image] * len(some), "tile": list(range(start, start + len(some)))})
            logits = model(pixel_values=torch.stack(batch["pixel_values"]).to(device)).logits
            for tile, scores in zip(some, enlarge(logits, transform.size).softmax(1).cpu(), strict=True):
                rows, columns = slice(*tile.rows), slice(*tile.columns)
                found[:, rows, columns] = scores[
                    :,
                    rows.start - tile.top : rows.stop - tile.top,
                    columns.start - tile.left : columns.stop - tile.left,
                ]
        return found

    def predict(
        self,
        model: Any,
        image_processor: Any,
        images: Sequence[Image.Image],
        augmentation: str = "none",
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Return the classes in each RGB image, the largest first.

        Returns:
            [{"label", "score", "share", "area", "xmin", "ymin", "xmax", "ymax", "segmentation"}, ...]: the mean probability of
            its pixels, their share of the image and number, the box around them, and COCO's run lengths of them.
        """
        names = {int(number): name for number, name in model.config.id2label.items()}
        rows = []
        for image in images:
            best = self.probabilities(model, image_processor, image, augmentation).max(0)
            found = [
                _finding(names[number], best.indices.numpy() == number, best.values.numpy())
                for number in best.indices.unique().tolist()
            ]
            found = [each for each in found if threshold is None or each["score"] >= threshold]
            rows.append(sorted(found, key=lambda each: -each["share"])[:top_k])
        return rows

    def draw(self, image: Image.Image, findings: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> Image.Image:
        """Return the image with its classes in colours and their names on their largest parts."""
        numbers = {name: number for number, name in names.items()}
        classes = np.full((image.height, image.width), -1)
        for found in findings:
            classes[decode_mask(found["segmentation"])] = numbers[found["label"]]
        return draw_classes(image, classes, names)


TASK = SemanticSegmentation()


def _finding(label: str, mask: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return {
        "label": label,
        "score": float(scores[mask].mean()),
        "share": float(mask.mean()),
        "area": int(mask.sum()),
        "xmin": int(columns[0]),
        "ymin": int(rows[0]),
        "xmax": int(columns[-1]) + 1,
        "ymax": int(rows[-1]) + 1,
        "segmentation": run_lengths(torch.from_numpy(mask)[None])[0],
    }


def decode_mask(encoded: Mapping[str, Any]) -> np.ndarray:
    """Return the boolean mask `(height, width)` of run lengths."""
    from faster_coco_eval.core import mask as coco

    return coco.decode({**encoded, "counts": encoded["counts"].encode("ascii")}).astype(bool)
