"""COCO JSON beside image files, as COCO itself, CVAT and Roboflow lay them out, read as a data set with `objects`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from .images import DataError


logger = logging.getLogger(__name__)

_SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"}
_SPLIT_WORDS |= {"val": "validation", "dev": "validation", "test": "test", "testing": "test"}


def find_coco_files(folder: Path) -> dict[str, Path]:
    """Return the COCO annotation files of a folder by split; {} where there are none.

    They are looked for in the folder, in `annotations/` and in its other folders (Roboflow's
    `train/_annotations.coco.json`). The split is the word in the file's name, else in its folder's, else "train".

    Raises:
        DataError: two files are of one split.
    """
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        if not _is_coco(path):
            continue
        split = _split_of(path.stem) or _split_of(path.parent.name if path.parent != folder else "") or "train"
        if split in found:
            raise DataError(
                f"{found[split]} and {path} are both of the split {split!r}; keep one of them, or put train, val or "
                "test into the names."
            )
        found[split] = path
    return found


def read_coco(files: dict[str, Path], root: Path) -> datasets.DatasetDict:
    """Read COCO annotation files as a data set.

    Categories get numbers in the order of their ids. One without objects that is only the group of others, as Roboflow
    adds, is left out. Segmentations are kept for instance segmentation.

    Args:
        files: of `find_coco_files`.
        root: the folder that was searched.

    Returns:
        Splits with "image" (an Image feature of the files), "image_id" and "objects": lists "bbox" ([x, y, width,
        height] in pixels), "category" (`ClassLabel`), "area", "iscrowd" and "segmentation" (JSON text, "" for none).

    Raises:
        DataError: a file is damaged, splits differ in their categories, an annotation has no image or category, or
            image files are missing; the message names the file and the first of them.
    """
    contents = {split: _load(path) for split, path in files.items()}
    groups = {str(c.get("supercategory")) for content in contents.values() for c in content["categories"]}
    used = {a["category_id"] for content in contents.values() for a in content["annotations"]}
    names: dict[int, str] = {}
    for split, content in contents.items():
        own = {
            int(c["id"]): str(c["name"])
            for c in content["categories"]
            if c["id"] in used or str(c["name"]) not in groups or str(c["name"]) == str(c.get("supercategory"))
        }
        if names and own != names:
            raise DataError(
                f"{files[split]} has other categories than {next(iter(files.values()))}; give all the same."
            )
        names = own
    numbers = {identity: number for number, identity in enumerate(sorted(names))}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("int64"),
            "objects": {
                "bbox": [[datasets.Value("float32")]],
                "category": [datasets.ClassLabel(names=[names[identity] for identity in sorted(names)])],
                "area": [datasets.Value("float32")],
                "iscrowd": [datasets.Value("bool")],
                "segmentation": [datasets.Value("string")],
            },
        }
    )
    splits = {}
    for split, content in contents.items():
        rows = list(_rows(content, files[split], root, numbers))
        splits[split] = datasets.Dataset.from_list(rows, features=features)
    return datasets.DatasetDict(splits)


def _rows(content: dict[str, Any], path: Path, root: Path, numbers: dict[int, int]) -> Iterator[dict[str, Any]]:
    objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        where = f"{path}: annotation {annotation.get('id')!r}"
        if annotation["image_id"] not in objects:
            raise DataError(f"{where} is of image_id={annotation['image_id']!r}, which is not among the images.")
        if annotation["category_id"] not in numbers:
            raise DataError(f"{where} has category_id={annotation['category_id']!r}, which is not a category.")
        if len(annotation.get("bbox") or ()) != 4:
            raise DataError(f"{where} has no bbox [x, y, width, height]; export the boxes too.")
        objects[annotation["image_id"]].append(annotation)
    folders = _image_folders(path, root)
    files = {image["id"]: _locate(image["file_name"], folders) for image in content["images"]}
    missing = [image["file_name"] for image in content["images"] if files[image["id"]] is None]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(files)} images are missing, the first is {missing[0]!r}; they were looked "
            f"for in {', '.join(str(folder) for folder in folders)}. Put the images there."
        )
    for image in content["images"]:
        own = objects[image["id"]]
        yield {
            "image": str(files[image["id"]]),
            "image_id": int(image["id"]),
            "objects": {
                "bbox": [[float(value) for value in a["bbox"]] for a in own],
                "category": [numbers[a["category_id"]] for a in own],
                "area": [float(a.get("area") or a["bbox"][2] * a["bbox"][3]) for a in own],
                "iscrowd": [bool(a.get("iscrowd")) for a in own],
                "segmentation": [json.dumps(a["segmentation"]) if a.get("segmentation") else "" for a in own],
            },
        }


def _is_coco(path: Path) -> bool:
    # The parts may come in any order and hold most of the file: only a file that looks like it is read whole
    try:
        with path.open(encoding="utf-8") as file:
            start = file.read(4096)
        return (
            start.lstrip().startswith("{")
            and {"images", "annotations", "categories"} <= json.loads(path.read_text(encoding="utf-8")).keys()
        )
    except (OSError, ValueError):
        # A damaged file is named where its own name says what it should be
        return path.name.endswith(".coco.json") or path.name.startswith("instances_")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for annotation in content["annotations"]:
            annotation["image_id"], annotation["category_id"]  # noqa: B018
        for image in content["images"]:
            image["id"], image["file_name"]  # noqa: B018
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a COCO file ({type(error).__name__}: {error}); it needs images (id, file_name), "
            "annotations (image_id, category_id, bbox) and categories (id, name)."
        ) from error


def _split_of(name: str) -> str | None:
    words = [_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS]
    return words[-1] if words else None


def _image_folders(path: Path, root: Path) -> list[Path]:
    """Where the images of an annotation file may be, the likeliest first."""
    kind = path.stem.split("_", 1)[-1]
    candidates = [path.parent, root / "images", root / "images" / kind, root / kind, root / "images" / path.stem, root]
    return list(dict.fromkeys(folder for folder in candidates if folder.is_dir()))


def _locate(name: str, folders: list[Path]) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
