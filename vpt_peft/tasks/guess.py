"""The task that a data set is for, as far as its layout and columns tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import datasets

from ..data.arguments import DataArguments
from ..data.coco import find_coco_files
from ..data.digits import DIGITS
from ..data.errors import DataError
from ..data.mask_folders import find_pairs
from ..data.objects import has_boxes
from ..data.sources import read_source
from .base import DEFAULT_TASK


_DETECTION, _SEMANTIC, _INSTANCE = "object-detection", "semantic-segmentation", "instance-segmentation"
_CLASS_NAMES = ("label", "labels", "fine_label", "class", "target", "category")
_ID_NAMES = ("instances", "instance", "instance_mask", "instance_masks")
_MASK_NAMES = (
    "annotation", "annotations", "mask", "masks", "segmentation", "segmentation_mask", "semantic_segmentation", "label",
    "labels", "ground_truth", "gt", "target",
)  # fmt: skip
# Called so for both kinds of masks
_SHARED_NAMES = ("annotation", "mask", "masks")


def guess_task(data: DataArguments, token: str | None = None, cache_dir: str | None = None) -> str:
    """Return the pipeline tag of the one task that the data can be for; image classification where nothing tells.

    Folders of images and masks are for semantic segmentation, COCO JSON without segmentations and columns of boxes for
    detection, columns of images beside the image for segmentation, and labels for classification.

    Args:
        data: the data set; `label_column_name` is the only column looked at, where it is given.
        token: Hub token.
        cache_dir: where `datasets` keeps its files.

    Raises:
        DataError: the data can be for several tasks; the message names them.
    """
    name, folder = data.dataset_name, Path(data.dataset_name).expanduser()
    if name in DIGITS or folder.is_file():
        return DEFAULT_TASK
    if folder.is_dir():
        files = find_coco_files(folder)
        if files:
            outlined = any(_has_segmentations(path) for path in files.values())
            return _only({_DETECTION: "boxes", **({_INSTANCE: "segmentations"} if outlined else {})}, name)
        if find_pairs(folder):
            return _SEMANTIC
    try:
        source, named = read_source(name, data.dataset_config_name, data.dataset_revision, token, cache_dir)
    except DataError:
        # Reading it for the task says what is wrong
        return DEFAULT_TASK
    features = next(iter(source.values())).features
    return _only(_tasks_of(features, data, named), name) or DEFAULT_TASK


def _tasks_of(features: Mapping[str, object], data: DataArguments, named: Mapping[int, str] | None) -> dict[str, str]:
    """Return the tasks that columns are for, each with its column."""
    wanted = data.label_column_name
    found: dict[str, str] = {}
    for column, feature in features.items():
        if column == data.image_column_name or wanted not in (None, column):
            continue
        known = column.lower()
        if has_boxes(feature):
            found.setdefault(_DETECTION, column)
        elif isinstance(feature, datasets.Image):
            # The classes of an id mask are not in it
            several = named is not None and len(named) > 1
            if known in _ID_NAMES or (known in _SHARED_NAMES and not several):
                found.setdefault(_INSTANCE, column)
            if known in _MASK_NAMES:
                found.setdefault(_SEMANTIC, column)
        elif isinstance(feature, datasets.ClassLabel) or known in _CLASS_NAMES:
            found.setdefault(DEFAULT_TASK, column)
    return found


def _only(tasks: Mapping[str, str], name: str) -> str:
    if len(tasks) > 1:
        could = " or ".join(f"{task} ({column})" for task, column in tasks.items())
        flags = " or ".join(f"--task {task}" for task in tasks)
        raise DataError(f"dataset_name={name!r} can be for {could}; say {flags}.")
    return next(iter(tasks), "")


def _has_segmentations(path: Path) -> bool:
    content = json.loads(path.read_text(encoding="utf-8"))
    return any(annotation.get("segmentation") for annotation in content["annotations"])
