"""Folders of images with folders of masks beside them, paired by name."""

from __future__ import annotations

from pathlib import Path

import datasets

from .images import IMAGE_SUFFIXES, DataError
from .sources import SPLIT_NAMES


_IMAGES = ("images", "image", "imgs", "img", "jpegimages", "leftimg8bit")
_MASKS = ("masks", "mask", "annotations", "annotation", "labels", "segmentationclass", "gt", "gtfine")
# Endings that some data sets give one of the two
_ENDINGS = (
    "_mask",
    "_masks",
    "_seg",
    "_segmentation",
    "_label",
    "_labels",
    "_gt",
    "_leftimg8bit",
    "_gtfine_labeltrainids",
)


def find_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return {split: (folder of images, folder of masks)}; empty if the folder has another layout.

    Layouts: `images` + `masks`, `<split>/images` + `<split>/masks`, `images/<split>` + `masks/<split>`. Both words have
    the usual synonyms.
    """
    children = _folders(folder)
    images, masks = _first(children, _IMAGES), _first(children, _MASKS)
    if images is not None and masks is not None:
        inner, other = _folders(images), _folders(masks)
        splits = {name: (inner[name], other[name]) for name in inner if name in SPLIT_NAMES and name in other}
        return splits or {"train": (images, masks)}
    pairs = {}
    for name, child in children.items():
        inner = _folders(child)
        images, masks = _first(inner, _IMAGES), _first(inner, _MASKS)
        if name in SPLIT_NAMES and images is not None and masks is not None:
            pairs[name] = (images, masks)
    return pairs


def read_pairs(pairs: dict[str, tuple[Path, Path]]) -> datasets.DatasetDict:
    """Read folders as columns "image" and "annotation".

    Raises:
        DataError: an image has no mask, or a mask no image.
    """
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    splits = {}
    for name, (images, masks) in pairs.items():
        of_images, of_masks = _by_stem(images), _by_stem(masks)
        for have, lack, kind in ((of_images, of_masks, "mask"), (of_masks, of_images, "image")):
            alone = sorted(have.keys() - lack.keys())
            if alone:
                where = masks if kind == "mask" else images
                raise DataError(f"{have[alone[0]]} has no {kind} of the same name in {where} ({len(alone)} in all).")
        stems = sorted(of_images)
        splits["validation" if name in ("val", "valid", "dev") else name] = datasets.Dataset.from_dict(
            {"image": [str(of_images[s]) for s in stems], "annotation": [str(of_masks[s]) for s in stems]},
            features=features,
        )
    # The usual names of training folders
    return datasets.DatasetDict({"train" if name == "training" else name: split for name, split in splits.items()})


def _folders(folder: Path) -> dict[str, Path]:
    return {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}


def _first(children: dict[str, Path], names: tuple[str, ...]) -> Path | None:
    return next((children[name] for name in names if name in children), None)


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        stem = str(path.relative_to(folder).with_suffix("")).lower()
        stem = next((stem.removesuffix(ending) for ending in _ENDINGS if stem.endswith(ending)), stem)
        if stem in found:
            raise DataError(f"{found[stem]} and {path} have the same name, so masks cannot be told apart.")
        found[stem] = path
    return found
