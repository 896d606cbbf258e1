"""Where image data comes from: handwritten digits, a folder, or the Hub."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

import datasets

from ..files import read_json
from .digits import DIGITS
from .images import IMAGE_SUFFIXES, DataError, DataNotFoundError
from .listed import is_listed, read_listed
from .table import read_table


# The words by which `datasets` tells split folders from class folders
SPLIT_NAMES = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
)


def read_source(
    name: str, config_name: str | None, revision: str | None, token: str | None, cache_dir: str | None
) -> tuple[datasets.DatasetDict, dict[int, str] | None]:
    """Read a data set as it comes, and the class names of an `id2label.json` beside it.

    Args:
        name: "digits", "digits-count", a folder, a .csv file of image files and labels, or an id on the Hub (a folder
            wins over an id).
        config_name: configuration of the data set.
        revision: branch, tag or commit on the Hub.
        token: Hub token; default: `HF_TOKEN` or the stored login.
        cache_dir: where `datasets` keeps its files; default: `HF_DATASETS_CACHE`.

    Raises:
        DataNotFoundError: if there is no such folder or Hub id, or it cannot be reached.
        DataError: if it is there and cannot be read.
    """
    if name in DIGITS:
        return DIGITS[name](), None
    folder = Path(name).expanduser()
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return read_table(folder), read_id2label(folder.parent / "id2label.json")
    options: dict[str, Any] = {"name": config_name, "cache_dir": cache_dir}
    if folder.is_dir():
        try:
            if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
                loaded = datasets.load_from_disk(str(folder))
            elif is_listed(folder):
                loaded = read_listed(folder)
            elif (class_folders := _class_folders(folder)) is not None:
                files = {"train": [os.path.join(glob.escape(str(folder / kind)), "**") for kind in class_folders]}
                loaded = datasets.load_dataset("imagefolder", data_files=files, **options)
            else:
                loaded = datasets.load_dataset(str(folder), **options)
        except DataError:
            raise
        except Exception as error:
            _check_for_empty_split(name, error)
            raise DataError(
                f"dataset_name={name!r}: the folder cannot be read as image data ({_root_cause(error)}). It needs "
                "parquet files (data/train-*.parquet), or one folder of images per class (train/<class>/*.png, or "
                "<class>/*.png), and you need the right to read it."
            ) from error
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict({"train": loaded})
        return loaded, read_id2label(folder / "id2label.json")
    is_path = folder.is_absolute() or folder.suffix.lower() == ".csv"
    if is_path or folder.exists() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        fault = "is a file, but not a .csv file" if folder.is_file() else "does not exist"
        raise DataNotFoundError(
            f"dataset_name={name!r} {fault}; give a folder, a .csv file of image files and labels, a Hub id, or "
            "'digits'."
        )
    try:
        return datasets.load_dataset(name, revision=revision, token=token, **options), None
    except Exception as error:
        _check_for_empty_split(name, error)
        where = f" at revision {revision!r}" if revision else ""
        kind = DataNotFoundError if isinstance(error, FileNotFoundError | ConnectionError) else DataError
        raise kind(
            f"dataset_name={name!r}{where}: no such folder here, and the Hub at {datasets.config.HF_ENDPOINT} did "
            f"not give it ({_root_cause(error)}). Check the id, the revision and dataset_config_name. If the data set "
            "is private or gated, HF_TOKEN must hold a token that may read it. Without a network, use data that is in "
            "the cache already (HF_HUB_OFFLINE=1 stops the retries), the path of a local folder, or 'digits'."
        ) from error


def _check_for_empty_split(name: str, error: Exception) -> None:
    # `datasets` refuses the whole data set for one empty split
    match = re.search(r'Instruction "(.+)" corresponds to no data', str(error))
    if match:
        raise DataError(f"dataset_name={name!r}: the split {match[1]!r} is empty; fill or remove it.") from error


def _root_cause(error: BaseException) -> str:
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _class_folders(folder: Path) -> list[str] | None:
    """The class folders right under `folder`, or None if it has another layout.

    `datasets` takes a class that is called "train" or "test", or a file with such a word in its name, for a split,
    and leaves the others out without a word; so this layout is named to it in full.
    """
    children = [
        child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith((".", "__"))
    ]
    classes = [
        child.name
        for child in children
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in child.iterdir() if file.is_file())
    ]
    has_table = any(file.suffix in (".csv", ".jsonl", ".parquet", ".arrow") for file in folder.iterdir())
    return classes if not has_table and not {name.lower() for name in classes} <= SPLIT_NAMES else None


def read_id2label(path: Path) -> dict[int, str] | None:
    """Return the classes of an `id2label.json` in order, or None where there is none."""
    if not path.exists():
        return None
    try:
        id2label = {int(key): str(value) for key, value in read_json(path).items()}
    except (OSError, ValueError) as error:
        raise DataError(f'{path} cannot be read ({error}); it must look like {{"0": "cat", "1": "dog"}}.') from error
    if sorted(id2label) != list(range(len(id2label))) or len(set(id2label.values())) < len(id2label):
        raise DataError(f"{path} must give each of the keys 0..{len(id2label) - 1} once, each with its own name.")
    return id2label
