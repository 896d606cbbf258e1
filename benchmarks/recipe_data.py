"""Data sets and backbones of the recipe search, made from those of `shared/`: small, unlike each other, offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification


SPLITS = ("train", "validation", "test")
# Most patches per class and split, so that no class is most of the images
_PER_CLASS = {"train": 60, "validation": 30, "test": 60}
# Classes of pictures by their number of nuclei: the most of each
_COUNTS = ((1, "0-1"), (3, "2-3"), (6, "4-6"), (10, "7-10"), (16, "11-16"), (10**6, "17+"))
# Fewest training patches of a class
_FEWEST = 20


def prepare(shared: Path, target: Path, size: int) -> tuple[dict[str, str], dict[str, str]]:
    """Make what is not there yet, and return {name: folder} of the data sets and of the backbones.

    Args:
        shared: holds `datasets/` and `models/`.
        target: where data and backbones go.
        size: image size of the ViT-Tiny.
    """
    data = {name: str(shared / "datasets" / name) for name in ("caltech101", "cifar100")}
    for name, patches in (("nuclei_counts", _counts), ("camvid_patches", _patches)):
        folder = target / "data" / name
        if not (folder / "data" / "test.parquet").is_file():
            source = datasets.load_dataset(str(shared / "datasets" / name.split("_")[0]))
            found = {split: _by_class(patches(source[split], shared)) for split in SPLITS}
            names = [name for name, images in sorted(found["train"].items()) if len(images) >= _FEWEST]
            for split in SPLITS:
                _write(found[split], names, folder / "data" / f"{split}.parquet", _PER_CLASS[split])
        data[name] = str(folder)
    data["digits"] = "digits"
    backbone = target / "models" / f"vit-tiny-{size}"
    if not (backbone / "preprocessor_config.json").is_file():
        resize_backbone(shared / "models" / "vit-tiny-patch16-224", backbone, size)
    return data, {"supervised": str(backbone), "mae": "embedded-mae"}


def _counts(split: datasets.Dataset, shared: Path) -> Iterator[tuple[Image.Image, str]]:
    """Squares of microscope pictures by how many nuclei have their centre in them."""
    for row in split:
        image, instances = row["image"].convert("RGB"), np.array(row["instances"])
        numbers = instances.ravel().astype(np.int64)
        pixels = np.bincount(numbers)
        places = [np.bincount(numbers, axis.ravel()) for axis in np.indices(instances.shape)]
        # 0 is the background
        centres = np.stack([place[1:][pixels[1:] > 0] / pixels[1:][pixels[1:] > 0] for place in places], axis=1)
        for top in range(0, instances.shape[0] - 127, 64):
            for left in range(0, instances.shape[1] - 127, 64):
                inside = (centres >= (top, left)).all(axis=1) & (centres < (top + 128, left + 128)).all(axis=1)
                name = next(name for most, name in _COUNTS if inside.sum() <= most)
                yield image.crop((left, top, left + 128, top + 128)), name


def _patches(split: datasets.Dataset, shared: Path) -> Iterator[tuple[Image.Image, str]]:
    """Squares of road scenes that one class fills by 60 % or more."""
    names = json.loads((shared / "datasets" / "camvid" / "id2label.json").read_text())
    for row in split:
        image, labels = row["image"].convert("RGB"), np.array(row["annotation"])
        for top in range(0, labels.shape[0] - 39, 20):
            for left in range(0, labels.shape[1] - 39, 20):
                values, counts = np.unique(labels[top : top + 40, left : left + 40], return_counts=True)
                best = int(values[counts.argmax()])
                if best != 255 and counts.max() >= 0.6 * 1600:
                    yield image.crop((left, top, left + 40, top + 40)), names[str(best)]


def _by_class(patches: Iterator[tuple[Image.Image, str]]) -> dict[str, list[Image.Image]]:
    found: dict[str, list[Image.Image]] = {}
    for image, name in patches:
        found.setdefault(name, []).append(image)
    return found


def _write(by_class: dict[str, list[Image.Image]], names: list[str], path: Path, per_class: int) -> None:
    draws = np.random.default_rng(0)
    rows: dict[str, list] = {"image": [], "label": []}
    for label, name in enumerate(names):
        images = by_class.get(name, [])
        kept = sorted(draws.permutation(len(images))[:per_class])
        rows["image"] += [images[index] for index in kept]
        rows["label"] += [label] * len(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def resize_backbone(source: Path, target: Path, size: int) -> None:
    """Write a ViT for another image size: position embeddings are resampled, bicubic, as ViTs are fine-tuned."""
    model = AutoModelForImageClassification.from_pretrained(source)
    embeddings = model.vit.embeddings
    old, new = model.config.image_size // model.config.patch_size, size // model.config.patch_size
    positions = embeddings.position_embeddings.data
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    embeddings.position_embeddings = torch.nn.Parameter(
        torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    )
    model.config.image_size = size
    model.save_pretrained(target)
    processor = AutoImageProcessor.from_pretrained(source)
    processor.size = {"height": size, "width": size}
    processor.save_pretrained(target)
