"""Folders whose images and labels stand in lists: the layouts of VTAB-1k and FGVC that are in circulation."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import datasets

from .images import DataError


logger = logging.getLogger(__name__)

# Of each split: lines of "path label", or a mapping of paths to labels
_TEXT = {"train": "train800.txt", "validation": "val200.txt", "test": "test.txt"}
_JOINED = "train800val200.txt"
_JSON = {"train": "train.json", "validation": "val.json", "test": "test.json"}
# Where the images of a mapping may be
_IMAGE_FOLDERS = ("", "images", "Images", "jpg")


def is_listed(folder: Path) -> bool:
    """Whether a folder has one of the layouts."""
    return any((folder / names["train"]).is_file() for names in (_TEXT, _JSON))


def read_listed(folder: Path) -> datasets.DatasetDict:
    """Read a folder with lists of "image" and "label".

    Labels are numbered in their order over all splits, as a class may be missing in a small one.

    Raises:
        DataError: a list cannot be read, or an image in it is not there.
    """
    is_text = (folder / _TEXT["train"]).is_file()
    lists = {
        split: _read_text(folder / name) if is_text else _read_json(folder / name)
        for split, name in (_TEXT if is_text else _JSON).items()
        if (folder / name).is_file()
    }
    if is_text and (folder / _JOINED).is_file():
        _check_joined(folder, lists)
    labels = {label for rows in lists.values() for _, label in rows}
    # Numbers by their value, also where they are written as text
    numbers = all(str(label).lstrip("-").isdigit() for label in labels)
    order = sorted(labels, key=int if numbers else str)  # type: ignore[arg-type]
    lookup = {label: number for number, label in enumerate(order)}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(label) for label in order])}
    )
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": _locate(folder, [path for path, _ in rows]), "label": [lookup[label] for _, label in rows]},
                features=features,
            )
            for split, rows in lists.items()
        }
    )


def _read_text(path: Path) -> list[tuple[str, int | str]]:
    rows: list[tuple[str, int | str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            name, _, label = line.strip().rpartition(" ")
            if not name or not label.isdigit():
                raise DataError(f"{path}, line {number}: {line!r} is not a path and the number of a class.")
            rows.append((name, int(label)))
    return rows


def _read_json(path: Path) -> list[tuple[str, int | str]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return list(values.items())
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}); it must map paths of images to classes.") from error


def _check_joined(folder: Path, lists: dict[str, list[tuple[str, int | str]]]) -> None:
    both = {row for split in ("train", "validation") for row in lists.get(split, ())}
    if both != set(_read_text(folder / _JOINED)):
        logger.warning("%s is not the images of the training and the validation list.", folder / _JOINED)


def _locate(folder: Path, names: Iterable[str]) -> list[str]:
    found, missing = [], []
    for name in names:
        path = next((path for sub in _IMAGE_FOLDERS if (path := folder / sub / name).is_file()), None)
        if path is None:
            missing.append(name)
        else:
            found.append(str(path))
    if missing:
        raise DataError(f"{folder}: {len(missing)} images of its lists are not there, the first is {missing[0]!r}.")
    return found
