"""Instances: a number for every pixel (id masks), or COCO JSON with polygons or run lengths."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .arguments import DataArguments
from .coco import find_coco_files, read_coco
from .detection import check_any, complete_splits, match_classes
from .images import DataError, read_bytes
from .objects import image_size
from .sources import read_source
from .splits import as_checked_images, choose_splits, find_column


_IMAGE_NAMES = ("image", "img", "images", "picture", "photo")
_INSTANCE_NAMES = ("instances", "instance", "instance_mask", "instance_masks", "masks", "mask", "annotation")
_ID_MODES = ("I;16", "I;16L", "I;16B", "I", "L", "P", "1")
_ONLY_CLASS = "object"


def read_instances(
    data: DataArguments,
    token: str | None = None,
    cache_dir: str | None = None,
    id2label: Mapping[int, str] | None = None,
) -> datasets.DatasetDict:
    """Read a data set with masks of instances.

    It is a folder with COCO JSON, whose annotations have segmentations; or it has an image column of id masks (8 or 16
    bits: 0 is background, every other number one instance), all of one class: that of an `id2label.json` in the folder,
    else "object".

    Args:
        data: what to read; `label_column_name` is the column of id masks.
        token: Hub token.
        cache_dir: where `datasets` keeps its files.
        id2label: the classes of a model, matched by name.

    Returns:
        "train", "validation" and, where there is one, "test", with columns "image", and "instances" and "category", or
        "objects".

    Raises:
        DataNotFoundError: there is no such folder or Hub id, or it cannot be reached.
        DataError: a column is missing, a mask has another size than its image or is no id mask, an object has no
            segmentation (the message names the sample).
    """
    folder = Path(data.dataset_name).expanduser()
    files = find_coco_files(folder) if folder.is_dir() else {}
    if files:
        splits = choose_splits(read_coco(files, folder), data)
        prepared = {name: _with_polygons(split, name, id2label) for name, split in splits.items()}
    else:
        source, named = read_source(
            data.dataset_name, data.dataset_config_name, data.dataset_revision, token, cache_dir
        )
        splits = choose_splits(source, data)
        features = splits["train"].features
        column = find_column(features, data.label_column_name, "label", _NoType, _INSTANCE_NAMES)
        others = datasets.Features({name: feature for name, feature in features.items() if name != column})
        image_column = find_column(others, data.image_column_name, "image", datasets.Image, _IMAGE_NAMES)
        if named is not None and len(named) != 1:
            raise DataError(
                f"id2label.json names {len(named)} classes, but id masks are of one class; give COCO JSON for several."
            )
        names = {0: _ONLY_CLASS} if named is None else dict(named)
        prepared = {
            name: _with_ids(split, image_column, column, name, names, id2label) for name, split in splits.items()
        }
    complete = complete_splits(prepared, data)
    for name, split in complete.items():
        check_any(name, len(split), _objects_of(split))
    return complete


def _objects_of(split: datasets.Dataset) -> Iterator[bool]:
    """Whether there is an object, one by one; masks are decoded only as far as the first."""
    if "instances" in split.column_names:
        return (bool(np.asarray(row["instances"]).any()) for row in split.select_columns(["instances"]))
    return (not crowd for objects in split["objects"] for crowd in objects["iscrowd"])


class _NoType:
    """No column is told by its type: images have the same."""


def instance_masks(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the masks `(instances, height, width)`, boolean, and class numbers `(instances,)` of a row; no crowds."""
    if row.get("instances") is not None:
        ids = np.asarray(row["instances"])
        numbers = np.unique(ids)
        numbers = numbers[numbers != 0]
        return ids[None] == numbers[:, None, None], np.full(len(numbers), row["category"], dtype=np.int64)
    objects = row["objects"]
    width, height = row["image"].size
    kept = [index for index, crowd in enumerate(objects["iscrowd"]) if not crowd]
    masks = [_decode(json.loads(objects["segmentation"][index]), height, width) for index in kept]
    classes = np.array([objects["category"][index] for index in kept], dtype=np.int64)
    return np.stack(masks) if masks else np.zeros((0, height, width), bool), classes


def _decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the mask of a COCO segmentation: polygons, or run lengths as numbers or text."""
    from faster_coco_eval.core import mask as coco_mask

    if isinstance(segmentation, dict):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"its run lengths are of size {segmentation['size']}, the image is {[height, width]}")
    elif any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        raise ValueError("a polygon needs at least three points, each x and y")
    runs = coco_mask.frPyObjects(segmentation, height, width) if not _is_packed(segmentation) else segmentation
    mask = np.asarray(coco_mask.decode(coco_mask.merge(runs) if isinstance(runs, list) else runs), bool)
    if not mask.any():
        raise ValueError("it covers no pixel of the image")
    return mask


def _is_packed(segmentation: Any) -> bool:
    return isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes)


def _with_ids(
    split: datasets.Dataset, image: str, column: str, name: str, names: Mapping[int, str], id2label: Mapping | None
) -> datasets.Dataset:
    pair = split.with_format(None).select_columns([image, column])
    pair = as_checked_images(as_checked_images(pair, image), column)
    raw = pair.cast_column(image, datasets.Image(decode=False)).cast_column(column, datasets.Image(decode=False))
    for row, example in enumerate(raw):
        sample = f"row {row} of split {name!r}"
        try:
            size, mask_size = image_size(example[image]), image_size(example[column])
            mode = _mode(example[column])
        except Exception as error:
            raise DataError(f"{sample}: image or mask cannot be read ({type(error).__name__}: {error}).") from error
        if mode not in _ID_MODES:
            raise DataError(
                f"{sample}: the mask is {mode}, not one number for each pixel; give 8- or 16-bit id masks, 0 for "
                "background and another number for each instance."
            )
        if size != mask_size:
            raise DataError(
                f"{sample}: the image is {_by(size)} pixels and its mask {_by(mask_size)}; make them alike."
            )
    numbers, feature = match_classes(names, {0}, id2label)
    pair = pair.rename_columns({old: new for old, new in ((image, "image"), (column, "instances")) if old != new})
    return pair.add_column("category", [numbers[0]] * len(pair), feature=feature)


def _with_polygons(split: datasets.Dataset, name: str, id2label: Mapping | None) -> datasets.Dataset:
    rows = split.with_format(None)["objects"][:]
    images = as_checked_images(split.with_format(None).select_columns(["image"]), "image")
    raw = images.cast_column("image", datasets.Image(decode=False))
    for row, (objects, example) in enumerate(zip(rows, raw, strict=True)):
        if "" in objects["segmentation"]:
            raise DataError(
                f"row {row} of split {name!r}: object {objects['segmentation'].index('')} has no segmentation; export the "
                "masks too, or train object-detection on the boxes."
            )
        _check_segmentations(objects, example["image"], f"row {row} of split {name!r} ({example['image']['path']})")
    names = dict(enumerate(split.features["objects"]["category"].feature.names))
    numbers, feature = match_classes(names, {c for objects in rows for c in objects["category"]}, id2label)
    kept = ("iscrowd", "segmentation")
    columns = [
        {"category": [numbers[c] for c in objects["category"]], **{key: objects[key] for key in kept}}
        for objects in rows
    ]
    features = datasets.Features(
        {
            "objects": {
                "category": [feature],
                "iscrowd": [datasets.Value("bool")],
                "segmentation": [datasets.Value("string")],
            }
        }
    )
    return datasets.concatenate_datasets(
        [images, datasets.Dataset.from_dict({"objects": columns}, features=features)], axis=1
    )


def _check_segmentations(objects: Mapping[str, Any], image: Any, sample: str) -> None:
    """Decode every mask of an image, so that a wrong one does not end the training."""
    try:
        width, height = image_size(image)
    except Exception as error:
        raise DataError(f"{sample}: the image cannot be read ({type(error).__name__}: {error}).") from error
    for number, segmentation in enumerate(objects["segmentation"]):
        try:
            _decode(json.loads(segmentation), height, width)
        except KeyError as error:
            raise DataError(f"{sample}: the segmentation of object {number} lacks {error}.") from error
        except (ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{sample}: the segmentation of object {number} cannot be used ({error}); correct or remove it."
            ) from error


def _mode(image: Any) -> str:
    with Image.open(io.BytesIO(read_bytes(image))) as opened:
        return opened.mode


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
