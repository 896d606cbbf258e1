"""Evaluate a model on a split of a data set, and predict image files to a table."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch.utils.data import DataLoader
from transformers import EvalPrediction

from ..data.arguments import DataArguments
from ..data.images import DataError, ImageError, to_rgb
from ..methods.structure import Classifier, base_model
from ..tasks import Task, get_task


logger = logging.getLogger(__name__)

# A batch of decoded images ends here, at some 100 MB
_MOST_PIXELS = 2**25


@torch.no_grad()
def evaluate_model(
    model: Classifier,
    image_processor: Any,
    data: DataArguments,
    split: str | None = None,
    batch_size: int = 64,
    token: str | None = None,
    task: Task | None = None,
) -> dict[str, float]:
    """Return the task's metrics, "loss" and "samples" of a model on a split of a data set.

    Classes are matched by name, so their order in the data may differ from that in training.

    Args:
        model: a model for the task, or a `PeftModel` of one.
        image_processor: prepares its images.
        data: the data, as for training.
        split: "train", "validation", "test", or any split of the data set by its own name; default: test, or
            validation where there is none, which is said.
        batch_size: images per forward pass.
        token: Hub token.
        task: default: image classification.

    Raises:
        DataError: no such split, or classes that the model does not know.
    """
    task = task or get_task()
    if split not in (None, "train", "validation", "test"):
        data, split = replace(data, test_split=split), "test"
    names = {int(number): name for number, name in (base_model(model).config.id2label or {}).items()}
    splits = task.read(data, token=token, id2label=names)
    if split is None:
        split = "test" if "test" in splits else "validation"
        if split == "validation":
            logger.warning("There is no test split, so these are the validation images, by which weights are chosen.")
    if split not in splits:
        raise DataError(f"split={split!r} is not in {data.dataset_name!r}, which has {', '.join(splits)}.")
    rows = task.rows(splits[split], image_processor, data.augmentation)
    device, compute_metrics = next(model.parameters()).device, task.compute_metrics()
    model.eval()
    total, seen = 0.0, 0
    metrics: dict[str, float] = {}
    loader: DataLoader = DataLoader(rows, batch_size=batch_size, collate_fn=task.collate)
    for batch in loader:
        inputs = send_to_device(batch, device)
        output = model(**inputs)
        count = len(next(iter(batch.values())))
        total, seen = total + output.loss.item() * count, seen + count
        predictions = tuple(value for name, value in output.items() if name != "loss")
        targets = tuple(inputs[name] for name in task.label_names)
        predictions = task.measurable(base_model(model), predictions, targets[0] if len(targets) == 1 else targets)
        metrics = compute_metrics(EvalPrediction(predictions, targets), compute_result=seen == len(rows))
    return {**metrics, "loss": total / seen, "samples": len(splits[split])}


def predict_images(
    model: Classifier,
    image_processor: Any,
    paths: Sequence[str | Path],
    top_k: int | None = 5,
    batch_size: int = 32,
    augmentation: str = "none",
    task: Task | None = None,
    threshold: float | None = None,
    pictures: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Predict image files to rows {"image", "predictions", "error"}; see `Task.predict` for the predictions.

    A file that cannot be read gets a row without predictions and the reason as its error. Where a task finds many
    things in an image, rows have its "width" and "height" too.

    Args:
        model: a model for the task with label names in its config.
        image_processor: prepares its images.
        paths: image files.
        top_k: most predictions per image; None: all.
        batch_size: images per forward pass; fewer of large ones, so that memory stays bounded.
        augmentation: as in training; its evaluation form decides between resizing and cropping.
        task: default: image classification.
        threshold: lowest score of a prediction; None: the task's own.
        pictures: folder for a PNG of each image with what was found in it; the row's "picture" is its path.

    Raises:
        ValueError: top_k is below 1, threshold is not in [0, 1], or the task draws no pictures.
    """
    task = task or get_task()
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must lie in 0..1.")
    if pictures is not None and not task.finds_many:
        raise ValueError(f"pictures={str(pictures)!r}: task={task.pipeline_tag!r} finds nothing that could be drawn.")
    names = {int(number): name for number, name in (base_model(model).config.id2label or {}).items()}
    drawn = Pictures(Path(pictures)) if pictures is not None else None
    model.eval()
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], Image.Image]] = []

    def predict_waiting() -> None:
        if waiting:
            images = [image for _, image in waiting]
            found = task.predict(model, image_processor, images, augmentation, top_k, threshold)
            for (row, image), predictions in zip(waiting, found, strict=True):
                row["predictions"] = predictions
                if task.finds_many:
                    row["width"], row["height"] = image.size
                if drawn is not None:
                    row["picture"] = str(drawn.save(task.draw(image, predictions, names), row["image"]))
            waiting.clear()

    for path in paths:
        rows.append({"image": _printable(path), "predictions": [], "error": None})
        try:
            image = to_rgb(str(path))
        except ImageError as error:
            logger.warning("%s", error)
            rows[-1]["error"] = str(error)
            continue
        waiting.append((rows[-1], image))
        if len(waiting) == batch_size or sum(each.width * each.height for _, each in waiting) > _MOST_PIXELS:
            predict_waiting()
    predict_waiting()
    return rows


def _printable(path: str | Path) -> str:
    """A path for a table; bytes that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Pictures:
    """A folder of PNGs named after the images they show; names that occur again are numbered.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._names = folder, Counter[str]()

    def save(self, picture: Image.Image, path: str) -> Path:
        """Write a picture of the image at `path`, and return where it is."""
        stem = Path(path).stem
        self._names[stem] += 1
        number = f"-{self._names[stem]}" if self._names[stem] > 1 else ""
        target = self.folder / f"{stem}{number}.png"
        picture.save(target)
        return target
