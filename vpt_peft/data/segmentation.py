"""Data for semantic segmentation: which columns hold images and masks, checked, split and numbered."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np

from .arguments import DataArguments
from .checks import warn_once
from .images import DataError, decode_image
from .mask_folders import find_pairs, read_pairs
from .masks import IGNORED, NUMBER_MODES, Mask
from .objects import image_size
from .sources import read_id2label, read_source
from .splits import as_checked_images, choose_splits, divide


logger = logging.getLogger(__name__)

_IMAGE_NAMES = ("image", "img", "images", "pixel_values", "picture", "photo")
_MASK_NAMES = (
    "annotation", "mask", "label", "segmentation", "segmentation_mask", "semantic_segmentation", "annotations", "masks",
    "labels", "ground_truth", "gt", "target",
)  # fmt: skip


def read_segmentation(
    data: DataArguments,
    token: str | None = None,
    cache_dir: str | None = None,
    id2label: Mapping[int, str] | None = None,
) -> datasets.DatasetDict:
    """Read a data set of images and masks.

    It is a folder of images with a folder of masks (see `find_pairs`), or has two columns of images. Classes are those
    of an `id2label.json` in the folder, else the numbers in the training masks. Without a validation split, one is
    drawn from the training split.

    Args:
        data: what to read.
        token: Hub token.
        cache_dir: where `datasets` keeps its files.
        id2label: the classes of a model; masks are then numbered as the model numbers them, matched by name.

    Returns:
        "train", "validation" and, where there is one, "test", with the columns "image", "annotation" (`Mask`), "height",
        "width" and "classes" (those that occur in the mask).

    Raises:
        DataNotFoundError: there is no such folder or Hub id, or it cannot be reached.
        DataError: a column is missing, or a mask does not fit its image or has wrong values; the message names it.
    """
    folder = Path(data.dataset_name).expanduser()
    pairs = find_pairs(folder) if folder.is_dir() else {}
    if pairs:
        source, named = read_pairs(pairs), read_id2label(folder / "id2label.json")
    else:
        source, named = read_source(
            data.dataset_name, data.dataset_config_name, data.dataset_revision, token, cache_dir
        )
    splits = choose_splits(source, data)
    columns = _find_columns(splits["train"].features, data)
    splits = {name: _two_columns(split, columns, name) for name, split in splits.items()}
    names = [named[number] for number in range(len(named))] if named else _numbers_as_names(splits["train"], data)
    if len(names) > IGNORED:
        raise DataError(f"{len(names)} classes are too many; {IGNORED} can be told apart.")
    feature = Mask(names=names, ignore_index=data.ignore_index, reduce=data.reduce_labels)
    checked = {name: _checked(split, feature, name) for name, split in splits.items()}
    if id2label is not None:
        feature = replace(feature, numbers=_known_numbers(names, id2label, checked))
    checked = {name: split.cast_column("annotation", feature) for name, split in checked.items()}

    if "validation" not in checked:
        train = checked["train"]
        count = min(max(1, round(len(train) * data.validation_fraction)), len(train) - 1)
        kept, held = divide([0] * len(train), count, data.split_seed)
        checked |= {"train": train.select(kept), "validation": train.select(held)}
        logger.info("Took %d of the %d training images for validation.", len(held), len(train))
    for name, limit in data.limits.items():
        if limit is not None and name in checked and limit < len(checked[name]):
            kept, _ = divide([0] * len(checked[name]), len(checked[name]) - limit, data.split_seed)
            checked[name] = checked[name].select(kept)
    for name, split in checked.items():
        if not any(split["classes"]):
            raise DataError(f"split {name!r} has no pixel that counts in any of its {len(split)} masks.")
    return datasets.DatasetDict({name: checked[name] for name in data.limits if name in checked})


def _find_columns(features: datasets.Features, data: DataArguments) -> tuple[str, str]:
    """Return the columns of images and of masks."""
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    there = ", ".join(f"{name} ({getattr(f, 'dtype', type(f).__name__)})" for name, f in features.items())

    def find(kind: str, wanted: str | None, usual: tuple[str, ...], other: str | None) -> str | None:
        if wanted is not None:
            if wanted not in typed:
                raise DataError(f"{kind}_column_name={wanted!r}: no such column of images; there is {there}.")
            return wanted
        named = sorted((usual.index(n.lower()), n) for n in typed if n.lower() in usual and n != other)
        return named[0][1] if named else None

    image = find("image", data.image_column_name, _IMAGE_NAMES, data.label_column_name)
    mask = find("label", data.label_column_name, _MASK_NAMES, image)
    if len(typed) == 2 and (image is None) != (mask is None):
        left = next(name for name in typed if name not in (image, mask))
        image, mask = image or left, mask or left
    if image is None or mask is None:
        raise DataError(
            f"no column of masks beside one of images found; there is {there}. Name them with image_column_name and "
            "label_column_name; a folder needs images and masks in folders of these names."
        )
    if image == mask:
        raise DataError(f"image_column_name and label_column_name are both {image!r}; they must differ.")
    return image, mask


def _two_columns(split: datasets.Dataset, columns: tuple[str, str], name: str) -> datasets.Dataset:
    for flag, column in zip(("image", "label"), columns, strict=True):
        if column not in split.column_names:
            raise DataError(f"{flag}_column_name={column!r}: split {name!r} has no such column.")
    split = as_checked_images(split.with_format(None).select_columns(list(columns)), columns[0])
    # By way of other names, as a mask may be called "image"
    for old, new in (
        *zip(columns, ("\0image", "\0mask"), strict=True),
        ("\0image", "image"),
        ("\0mask", "annotation"),
    ):
        split = split.rename_column(old, new)
    return split.cast_column("annotation", datasets.Image(decode=False))


def _numbers_as_names(train: datasets.Dataset, data: DataArguments) -> list[str]:
    """Return a name for each number up to the largest in the training masks."""
    most = 0
    for row in train.select_columns(["annotation"]):
        opened = decode_image(row["annotation"])
        if opened.mode in NUMBER_MODES:
            values = np.asarray(opened).astype(np.int64)
            most = max(most, int(values[values != data.ignore_index].max(initial=0)))
    count = most + (not data.reduce_labels)
    warn_once(f"There is no id2label.json, so the {count} classes of the masks are called by their numbers.")
    return [str(number) for number in range(count)]


def _checked(split: datasets.Dataset, feature: Mask, name: str) -> datasets.Dataset:
    """Return a split with sizes and the classes of each mask, after every mask was decoded."""
    raw = split.cast_column("image", datasets.Image(decode=False))

    def check(row: int) -> tuple[int, int, list[int]]:
        example = raw[row]
        path = (example["annotation"] or {}).get("path") or (example["image"] or {}).get("path")
        sample = f"row {row} of split {name!r}{f' ({path})' if path else ''}"
        try:
            width, height = image_size(example["image"])
        except Exception as error:
            raise DataError(f"{sample}: the image cannot be read ({type(error).__name__}: {error}).") from error
        try:
            mask = feature.read(example["annotation"])
        except Exception as error:
            raise DataError(f"{sample}: the mask cannot be used: {error}.") from error
        if mask.shape != (height, width):
            raise DataError(
                f"{sample}: the mask has {mask.shape[1]}x{mask.shape[0]} pixels, its image {width}x{height}; they must "
                "have the same size."
            )
        return height, width, [int(value) for value in np.unique(mask) if value != IGNORED]

    with ThreadPoolExecutor() as pool:
        heights, widths, classes = zip(*pool.map(check, range(len(raw))), strict=True)
    features = datasets.Features(
        {
            "height": datasets.Value("int64"),
            "width": datasets.Value("int64"),
            "classes": [datasets.Value("int64")],
        }
    )
    found = {"height": list(heights), "width": list(widths), "classes": list(classes)}
    return datasets.concatenate_datasets([split, datasets.Dataset.from_dict(found, features=features)], axis=1)


def _known_numbers(
    names: Sequence[str], id2label: Mapping[int, str], splits: Mapping[str, datasets.Dataset]
) -> list[int]:
    """Return the number that a model gives to each class of the data; `IGNORED` for one that does not occur."""
    known = {name: int(number) for number, name in id2label.items()}
    used = {number for split in splits.values() for row in split["classes"] for number in row}
    unknown = [names[number] for number in sorted(used) if names[number] not in known]
    if unknown:
        raise DataError(
            f"the model does not know the classes {', '.join(map(repr, unknown[:5]))}; it knows "
            f"{', '.join(map(repr, list(known)[:5]))}{' ...' if len(known) > 5 else ''}. Evaluate on data of its classes."
        )
    return [known.get(name, IGNORED) for name in names]
