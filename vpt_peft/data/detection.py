"""Detection data: which columns hold images and objects, checked, split and numbered."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

from .arguments import DataArguments
from .coco import find_coco_files, read_coco
from .images import DataError, ImageError
from .objects import OBJECTS, as_lists, check_objects, find_objects_column, image_size, number_classes, object_classes
from .sources import read_source
from .splits import as_checked_images, choose_splits, divide, find_column


logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "images", "picture", "photo")


def read_detection(
    data: DataArguments,
    token: str | None = None,
    cache_dir: str | None = None,
    id2label: Mapping[int, str] | None = None,
) -> datasets.DatasetDict:
    """Read a data set with the columns "image" and "objects".

    It is a folder with COCO JSON (see `find_coco_files`), or has a column of objects: lists with the boxes ([x, y, width,
    height] in pixels), the category of each, and where there are such "area" and "iscrowd". Classes are those of the
    `ClassLabel`, else of an `id2label.json` in the folder, else the sorted categories of the training split. Without a
    validation split, one is drawn from the training split. Images without objects stay: they teach what is none.

    Args:
        data: what to read.
        token: Hub token.
        cache_dir: where `datasets` keeps its files.
        id2label: the classes of a model; objects are then numbered as the model numbers them, matched by name.

    Returns:
        "train", "validation" and, where there is one, "test".

    Raises:
        DataNotFoundError: there is no such folder or Hub id, or it cannot be reached.
        DataError: a column is missing, a box or category is wrong (the message names the sample), or a split has no
            object at all.
    """
    folder = Path(data.dataset_name).expanduser()
    files = find_coco_files(folder) if folder.is_dir() else {}
    named: dict[int, str] | None = None
    if files:
        source = read_coco(files, folder)
    else:
        source, named = read_source(
            data.dataset_name, data.dataset_config_name, data.dataset_revision, token, cache_dir
        )
    splits = choose_splits(source, data)
    features = splits["train"].features
    image_column = find_column(features, data.image_column_name, "image", datasets.Image, _IMAGE_NAMES)
    column = find_objects_column(features, data.label_column_name)
    objects = {name: [as_lists(row) for row in split.with_format(None)[column]] for name, split in splits.items()}
    feature = object_classes(features[column])
    names, lookup = number_classes(feature, [c for row in objects["train"] for c in row["category"]], named)
    prepared = {}
    for name, split in splits.items():
        images = as_checked_images(split.with_format(None).select_columns([image_column]), image_column)
        rows = _checked(images, image_column, objects[name], lookup, names, name)
        if image_column != "image":
            images = images.rename_column(image_column, "image")
        prepared[name] = _with_objects(images, rows, names, id2label)

    prepared = complete_splits(prepared, data)
    for name, split in prepared.items():
        check_any(name, len(split), (not crowd for row in split["objects"] for crowd in row["iscrowd"]))
    return prepared


def check_any(split: str, images: int, objects: Iterable[bool]) -> None:
    """Check that a split has an object that is no crowd.

    Args:
        split: its name.
        images: its number of images.
        objects: whether something is such an object.

    Raises:
        DataError: nothing is.
    """
    if not any(objects):
        raise DataError(
            f"split {split!r} has no object in any of its {images} images (crowds are none), so nothing can be learned "
            "or measured on it; check label_column_name and the annotations."
        )


def complete_splits(splits: Mapping[str, datasets.Dataset], data: DataArguments) -> datasets.DatasetDict:
    """Draw a validation split where there is none, and keep so many images of each split as `data` says."""
    prepared = dict(splits)
    if "validation" not in prepared:
        train = prepared["train"]
        count = min(max(1, round(len(train) * data.validation_fraction)), len(train) - 1)
        kept, held = divide([0] * len(train), count, data.split_seed)
        prepared |= {"train": train.select(kept), "validation": train.select(held)}
        logger.info("Took %d of the %d training images for validation.", len(held), len(train))
    for name, limit in data.limits.items():
        if limit is not None and name in prepared and limit < len(prepared[name]):
            kept, _ = divide([0] * len(prepared[name]), len(prepared[name]) - limit, data.split_seed)
            prepared[name] = prepared[name].select(kept)
    return datasets.DatasetDict({name: prepared[name] for name in data.limits if name in prepared})


def match_classes(
    names: Mapping[int, str], used: Iterable[int], id2label: Mapping[int, str] | None
) -> tuple[dict[int, int], Any]:
    """Return the number each class of the data gets, and the feature of such numbers.

    Args:
        names: the classes of the data by number.
        used: numbers that occur.
        id2label: the classes of a model, which numbers them; None: the data's own numbers stay.

    Raises:
        DataError: a class that occurs is unknown to the model.
    """
    if id2label is None:
        return {number: number for number in names}, datasets.ClassLabel(names=list(names.values()))
    known = {name: int(number) for number, name in id2label.items()}
    unknown = [names[number] for number in sorted(used) if names[number] not in known]
    if unknown:
        raise DataError(
            f"the model does not know the classes {', '.join(map(repr, unknown[:5]))}; it knows "
            f"{', '.join(map(repr, list(known)[:5]))}. Evaluate on data of its classes."
        )
    return {n: known[name] for n, name in names.items() if name in known}, datasets.Value("int64")


def _checked(
    images: datasets.Dataset, column: str, objects: list[dict[str, list]], lookup: Mapping, names: Mapping, split: str
) -> list[dict[str, list]]:
    """Return the objects of a split with numbered categories and boxes cut to their images."""
    rows = []
    raw = images.cast_column(column, datasets.Image(decode=False))
    for row, (example, value) in enumerate(zip(raw, objects, strict=True)):
        image = example[column]
        path = image.get("path") if image else None
        sample = f"row {row} of split {split!r}{f' ({path})' if path else ''}"
        try:
            size = image_size(image)
        except Exception as error:
            raise ImageError(f"{sample}: the image cannot be read ({type(error).__name__}: {error}).") from error
        unknown = [category for category in value["category"] if category is None or category not in lookup]
        if unknown:
            raise DataError(
                f"{sample} has the category {unknown[0]!r}, which is not among the {len(names)} classes "
                f"{', '.join(map(str, list(names.values())[:10]))}; correct it, or name all classes in an id2label.json "
                "beside the data."
            )
        checked = check_objects(value, size, sample)
        rows.append({**checked, "category": [lookup[category] for category in value["category"]]})
    return rows


def _with_objects(
    images: datasets.Dataset, rows: list[dict[str, list]], names: Mapping[int, str], id2label: Mapping[int, str] | None
) -> datasets.Dataset:
    numbers, category = match_classes(names, {number for row in rows for number in row["category"]}, id2label)
    rows = [{**row, "category": [numbers[number] for number in row["category"]]} for row in rows]
    features = datasets.Features({"objects": {**OBJECTS, "category": [category]}})
    column = datasets.Dataset.from_dict({"objects": rows}, features=features)
    return datasets.concatenate_datasets([images, column], axis=1)
