"""The training, validation and test split of a data set, the columns in them, and what identifies their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import datasets
import numpy as np

from .arguments import DataArguments
from .images import CheckedImage, DataError, read_bytes


_VALIDATION_NAMES = ("validation", "val", "valid", "dev")


def choose_splits(source: datasets.DatasetDict, args: DataArguments) -> dict[str, datasets.Dataset]:
    """Return the splits of `source` as "train" and, where they are given or found, "validation" and "test".

    Raises:
        DataError: a split is missing or empty, or one overlaps the training split.
    """

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
    for name, flag, wanted in (
        ("validation", "validation_split", args.validation_split or found),
        ("test", "test_split", args.test_split or found_test),
    ):
        if wanted is None:
            continue
        if trained & set(wanted.split("+")):
            raise DataError(f"{flag}={wanted!r} overlaps train_split={args.train_split!r}; leave one of them out.")
        splits[name] = get(flag, wanted)
    return splits


def find_column(
    features: datasets.Features, wanted: str | None, kind: str, feature_type: type, usual: tuple[str, ...]
) -> str:
    """Return the column that is wanted, else the only one of the type, else the first with a usual name.

    Args:
        features: the columns there are.
        wanted: the column that the user named.
        kind: "image", "label", ...: the flag is `<kind>_column_name`.
        feature_type: class of the column's feature.
        usual: names to look for, the likeliest first.

    Raises:
        DataError: there is no such column, or there are several.
    """
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
        f"{fault}; there is {columns}. Name it with {kind}_column_name; a folder of images needs at least two class "
        "folders, all at the same depth, or a .csv file of images and labels, which is then the dataset_name."
    )


def as_checked_images(split: datasets.Dataset, column: str) -> datasets.Dataset:
    """Let the column decode to images whose errors name the file.

    Raises:
        DataError: it does not hold images.
    """
    try:
        return split.cast_column(column, CheckedImage())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(f"image_column_name={column!r} does not hold images ({error}).") from error


def divide(labels: Sequence[int], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row numbers (kept, held out), sorted, `count` of them held out.

    The draw is stratified by label. Where a class is too small for that, one row of every class is kept if possible,
    and the draw among the rest is plain.
    """
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    try:
        kept, held = train_test_split(rows, test_size=count, stratify=labels, random_state=seed)
    except ValueError:
        # A class with one image, or fewer rows than classes on one side
        order = np.random.default_rng(seed).permutation(rows)
        _, first = np.unique(np.asarray(labels)[order], return_index=True)
        order = np.concatenate([order[np.sort(first)], np.delete(order, first)])
        kept, held = order[: len(rows) - count], order[len(rows) - count :]
    return np.sort(kept), np.sort(held)


def dataset_fingerprint(split: datasets.Dataset) -> str:
    """32 hex digits that change with any byte of an image, any other value, class names and the order of rows.

    Nothing else matters: they are the same in every process and cache folder, whatever the format or transform. All
    files are read once.

    Raises:
        ImageError: an image file is gone.
    """
    raw, images = split.with_format(None), []
    names = {name: getattr(feature, "names", None) for name, feature in split.features.items()}
    for name, feature in split.features.items():
        if isinstance(feature, datasets.Image):
            images.append(name)
            raw = raw.cast_column(name, datasets.Image(decode=False))
    digest = hashlib.blake2b(json.dumps(names, sort_keys=True).encode(), digest_size=16)
    for row in raw:
        for name in sorted(row):
            content = read_bytes(row[name]) if name in images else json.dumps(row[name]).encode()
            digest.update(f"\n{len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()
