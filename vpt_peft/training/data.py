"""Image classification data: read from the Hub, a folder or scikit-learn; checked, labelled and split.

Whatever comes in, `load_image_dataset` hands back the splits "train", "validation" and, where there is one, "test",
with the columns "image" and "label" and the class names in the label's feature.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np

from .images import CheckedImage, DataError, DataNotFoundError, ImageError, read_bytes
from .sources import read_source


__all__ = [
    "DataArguments",
    "DataError",
    "DataNotFoundError",
    "ImageError",
    "dataset_fingerprint",
    "load_image_dataset",
]

logger = logging.getLogger(__name__)

_VALIDATION_NAMES = ("validation", "val", "valid", "dev")
_IMAGE_NAMES = ("image", "img", "images", "picture", "photo")
_LABEL_DTYPES = ("int", "uint", "string", "large_string", "bool")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category")


@dataclass
class DataArguments:
    """Which data to train on and how to prepare it.

    Raises:
        DataError: if a fraction, a limit or the seed is out of range.
    """

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "A data set id on the Hub, a folder (parquet files in Hub layout, or one folder of images per "
            "class), or 'digits' for scikit-learn's handwritten digits."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of the data set, if it has several."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub."}
    )
    train_split: str = field(
        default="train", metadata={"help": "The split to train on; several are joined by '+', as in train+validation."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "The split to evaluate on. Default: validation, val, valid or dev, else a part of train."},
    )
    test_split: str | None = field(default=None, metadata={"help": "The split to test on. Default: test, if present."})
    validation_fraction: float = field(
        default=0.2,
        metadata={"help": "Share of the training split to evaluate on, in (0, 1), if there is no validation split."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of images. Default: found by its type, then by its name."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "The column of labels. Default: found by its type, then by its name."}
    )
    augmentation: Literal["none", "resize", "resize_crop_flip"] = field(
        default="none",
        metadata={
            "help": "none: the checkpoint's own image processor; resize: straight to the input size (VTAB protocol); "
            "resize_crop_flip: shorter side to 256/224 of the input size, random crop and flip (FGVC protocol)."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many images."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Test on at most so many images."})
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the draw of a validation split and of the max_*_samples images."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1, as in 0.2.")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise DataError(f"{name}={limit} must be 1 or more; leave it out to use all images.")
        if not 0 <= self.split_seed < 2**32:
            raise DataError(f"split_seed={self.split_seed} must lie in 0..{2**32 - 1}.")


def load_image_dataset(
    args: DataArguments, token: str | None = None, cache_dir: str | None = None
) -> datasets.DatasetDict:
    """Read a data set and bring it into the form the training program expects.

    Classes are those of the `ClassLabel` feature, else of an `id2label.json` in the data folder ({"0": "cat", ...}),
    else the sorted distinct labels of the training split. Without a validation split, one is drawn from the training
    split, stratified by label; where a class is too small for that, one image of every class stays in training and
    the draw among the rest is plain. A found (not asked for) test split without labels is left out with a warning.

    Args:
        args: what to read.
        token: Hub token; default: `HF_TOKEN` or the stored login.
        cache_dir: where `datasets` keeps its files; default: `HF_DATASETS_CACHE`.

    Returns:
        "train", "validation" and, if there is one, "test", with columns "image" (an Image feature; decoding errors
        are `ImageError`s that name the file) and "label" (`ClassLabel`).

    Raises:
        DataNotFoundError: if there is no such folder or Hub id, or it cannot be reached.
        DataError: if a split or column is missing, a split is empty, the training split has one class only, or a
            label is missing or out of range.
    """
    source, id2label = read_source(
        args.dataset_name, args.dataset_config_name, args.dataset_revision, token, cache_dir
    )
    splits, asked_test = _choose_splits(source, args)
    features = splits["train"].features
    image_column = _find_column(features, args.image_column_name, "image", datasets.Image, _IMAGE_NAMES)
    label_column = _find_column(features, args.label_column_name, "label", datasets.ClassLabel, _LABEL_NAMES)
    if image_column == label_column:
        raise DataError(f"image_column_name and label_column_name are both {image_column!r}; they must differ.")
    for name, split in splits.items():
        for column in (image_column, label_column):
            if column not in split.column_names:
                raise DataError(f"column {column!r} is missing in split {name!r}, which has {split.column_names}.")
        ours, theirs = (getattr(each[label_column], "names", None) for each in (features, split.features))
        if ours != theirs:
            raise DataError(
                f"split {name!r} numbers its classes otherwise than the training split: "
                f"{_shorten(theirs or ['none'])} against {_shorten(ours or ['none'])}. Give all splits one ClassLabel."
            )
    logger.info("Images from column %r, labels from column %r.", image_column, label_column)

    labels = {name: _labels_of(split, label_column, name) for name, split in splits.items()}
    if not asked_test and "test" in labels and all(value is None or value == -1 for value in labels["test"]):
        logger.warning("The test split has no labels and is left out; name it by test_split to get an error instead.")
        splits.pop("test")
        labels.pop("test")
    names, lookup = _find_classes(features[label_column], labels["train"], id2label)
    encoded = {name: _encode(values, lookup, names, name, label_column) for name, values in labels.items()}
    prepared = {
        name: _two_columns(split, image_column, label_column, encoded[name], names) for name, split in splits.items()
    }

    if "validation" not in prepared:
        count = min(max(1, round(len(prepared["train"]) * args.validation_fraction)), len(prepared["train"]) - 1)
        kept, held = _divide(encoded["train"], count, args.split_seed)
        prepared["validation"] = prepared["train"].select(held)
        prepared["train"] = prepared["train"].select(kept)
        logger.info("Took %d of the %d training images for validation.", len(held), len(held) + len(kept))
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    for name, limit in limits.items():
        if limit is not None and name in prepared and limit < len(prepared[name]):
            kept, _ = _divide(prepared[name]["label"][:], len(prepared[name]) - limit, args.split_seed)
            prepared[name] = prepared[name].select(kept)
    _check_two_classes(prepared["train"], names, label_column)
    return datasets.DatasetDict({name: prepared[name] for name in limits if name in prepared})


def dataset_fingerprint(split: datasets.Dataset) -> str:
    """32 hex digits that change with any image byte, label, class name or the order, and with nothing else.

    The same in every process and for every cache folder; formats and transforms play no part. Reads all files once.

    Raises:
        ImageError: if an image file is gone.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(getattr(split.features["label"], "names", None)).encode())
    raw = split.with_format(None).select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
    for row in raw:
        content = read_bytes(row["image"])
        digest.update(f"\n{row['label']} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()


def _choose_splits(source: datasets.DatasetDict, args: DataArguments) -> tuple[dict[str, datasets.Dataset], bool]:
    """The splits by their role, and whether the test split was asked for by name."""

    def get(flag: str, names: str) -> datasets.Dataset:
        parts = names.split("+")
        for part in parts:
            if part not in source:
                raise DataError(f"{flag}={names!r}: no split {part!r} in {args.dataset_name}; it has {list(source)}.")
            if len(source[part]) == 0:
                raise DataError(f"{flag}={names!r}: the split {part!r} of {args.dataset_name} is empty.")
        return source[parts[0]] if len(parts) == 1 else datasets.concatenate_datasets([source[part] for part in parts])

    splits = {"train": get("train_split", args.train_split)}
    trained = set(args.train_split.split("+"))
    found = next((name for name in _VALIDATION_NAMES if name in source and name not in trained), None)
    found_test = "test" if "test" in source and "test" not in trained else None
    for role, flag, wanted in (
        ("validation", "validation_split", args.validation_split or found),
        ("test", "test_split", args.test_split or found_test),
    ):
        if wanted is None:
            continue
        if trained & set(wanted.split("+")):
            raise DataError(f"{flag}={wanted!r} overlaps train_split={args.train_split!r}; leave one of them out.")
        splits[role] = get(flag, wanted)
    return splits, args.test_split is not None


def _find_column(
    features: datasets.Features, wanted: str | None, kind: str, feature_type: type, usual: tuple[str, ...]
) -> str:
    columns = ", ".join(f"{name} ({getattr(f, 'dtype', type(f).__name__)})" for name, f in features.items())
    if wanted is not None:
        if wanted not in features:
            raise DataError(f"{kind}_column_name={wanted!r}: no such column; there is {columns}.")
        return wanted
    typed = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if len(typed) == 1:
        return typed[0]
    named = sorted((usual.index(name.lower()), name) for name in typed or features if name.lower() in usual)
    if named:
        return named[0][1]
    fault = f"several columns may be the {kind} column" if typed else f"no {kind} column found"
    raise DataError(
        f"{fault}; there is {columns}. Name it by {kind}_column_name; a folder of images needs at least two class "
        "folders, all at the same depth."
    )


def _labels_of(split: datasets.Dataset, column: str, name: str) -> list:
    feature = split.features.get(column)
    dtype = getattr(feature, "dtype", type(feature).__name__)
    scalar = isinstance(feature, datasets.Value) and dtype.startswith(_LABEL_DTYPES)
    if not scalar and not isinstance(feature, datasets.ClassLabel):
        raise DataError(
            f"label column {column!r} of split {name!r} is {dtype}; it must hold one integer or string per image."
        )
    return split.with_format(None).select_columns([column])[:][column]


def _find_classes(
    feature: Any, train_labels: Sequence, id2label: dict[int, str] | None
) -> tuple[list[str], dict[Hashable, int]]:
    """The class names in order, and the class number of each label as it stands in the data."""
    by_file: dict[Hashable, int] = {}
    if id2label is not None:
        for number, name in id2label.items():
            by_file.update({name: number, str(number): number, number: number})
    own = list(getattr(feature, "names", None) or [])
    if own and not all(name in by_file for name in own):
        return own, {number: number for number in range(len(own))}
    if id2label is not None:
        names = [id2label[number] for number in range(len(id2label))]
        return names, {number: by_file[name] for number, name in enumerate(own)} if own else by_file
    # negative numbers mean "no label" by convention
    distinct = sorted({v for v in train_labels if v is not None and not (isinstance(v, int) and v < 0)})
    if distinct and isinstance(distinct[0], int) and distinct != list(range(len(distinct))):
        logger.warning("The labels %s are numbered anew from 0; the numbers stay as names.", _shorten(distinct))
    return [str(value) for value in distinct], {value: number for number, value in enumerate(distinct)}


def _encode(labels: Sequence, lookup: dict[Hashable, int], names: list[str], split: str, column: str) -> list[int]:
    wrong = [row for row, value in enumerate(labels) if value is None or value not in lookup]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(labels)} labels of split {split!r} (column {column!r}) are missing or out of "
            f"range, the first in row {wrong[0]}: {labels[wrong[0]]!r}. The {len(names)} classes are "
            f"{_shorten(names)}. Remove or correct these rows, or name all classes in an id2label.json beside the "
            "data."
        )
    return [lookup[value] for value in labels]


def _shorten(values: Sequence) -> str:
    shown = ", ".join(map(str, values[:10]))
    return f"{shown}, ... {values[-1]}" if len(values) > 10 else shown


def _two_columns(
    split: datasets.Dataset, image_column: str, label_column: str, labels: list[int], names: list[str]
) -> datasets.Dataset:
    feature = datasets.ClassLabel(names=names)
    same = split.features[label_column] == feature
    split = split.with_format(None).select_columns([image_column, label_column] if same else [image_column])
    renamed = {column: name for column, name in ((image_column, "image"), (label_column, "label")) if column != name}
    split = split.rename_columns({column: name for column, name in renamed.items() if column in split.column_names})
    if not same:
        split = split.add_column("label", labels, feature=feature)
    try:
        return split.cast_column("image", CheckedImage())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"image_column_name={image_column!r} does not hold images ({error}).") from error


def _divide(labels: Sequence[int], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (kept, held), sorted, with `count` held; stratified, else with every class kept where possible."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    try:
        kept, held = train_test_split(rows, test_size=count, stratify=labels, random_state=seed)
    except ValueError:
        # a class with one image, or fewer rows than classes on one side
        order = np.random.default_rng(seed).permutation(rows)
        _, first = np.unique(np.asarray(labels)[order], return_index=True)
        order = np.concatenate([order[np.sort(first)], np.delete(order, first)])
        kept, held = order[: len(rows) - count], order[len(rows) - count :]
    return np.sort(kept), np.sort(held)


def _check_two_classes(train: datasets.Dataset, names: list[str], column: str) -> None:
    present = sorted(set(train["label"][:]))
    if len(present) < 2:
        raise DataError(
            f"all {len(train)} training images have the label {names[present[0]]!r} (column {column!r}); a classifier "
            "needs two classes or more. Check label_column_name, max_train_samples and validation_fraction."
        )
