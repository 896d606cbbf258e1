"""Windows of one size over images of any size: random ones to train on, and tiles that overlap to see a whole image.

Each pixel belongs to the tile in which it is farthest from a cut edge (overlap-tile strategy, Ronneberger et al., MICCAI
2015), so every pixel is measured once, with what is around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from .images import to_rgb
from .masks import IGNORED
from .transforms import AUGMENTATIONS, resampling


# Least share of a tile that the next one covers again
_OVERLAP = 0.25
_SCALES = (0.5, 2.0)
# Share of training windows that are drawn around a class of the image instead of anywhere
_BALANCED = 0.5


@dataclass(frozen=True)
class Tile:
    """A window at (top, left) of an image, and the part of the image that it decides: rows and columns from, to."""

    top: int
    left: int
    rows: tuple[int, int]
    columns: tuple[int, int]


def tiles(image: tuple[int, int], window: tuple[int, int]) -> list[Tile]:
    """Return the tiles that cover an image of (height, width), row by row; one where the image fits in a window."""
    down, across = (_along(length, size) for length, size in zip(image, window, strict=True))
    return [Tile(top, left, rows, columns) for top, rows in down for left, columns in across]


def _along(length: int, size: int) -> list[tuple[int, tuple[int, int]]]:
    """Return (start, (from, to)) of the windows along one axis."""
    count = 1 if length <= size else 1 + -(-(length - size) // max(1, round(size * (1 - _OVERLAP))))
    starts = [round(start) for start in np.linspace(0, max(0, length - size), count)]
    # Halfway through what two neighbours share
    cuts = [0, *((before + size + after) // 2 for before, after in zip(starts, starts[1:], strict=False)), length]
    return [(start, (cuts[i], cuts[i + 1])) for i, start in enumerate(starts)]


@dataclass(frozen=True)
class SegmentationTransform:
    """A transform of {"image", "annotation", "tile"} to {"pixel_values", "labels"}; only the image must be there.

    - "none": in training a random window of the image as it is, in evaluation the tile by its number.
    - "resize": the whole image, brought to the size of the window, whatever its aspect ratio.
    - "resize_crop_flip": in training the image is scaled by 0.5 to 2, half of the windows hold a pixel of a class that is
      drawn among those of the image, and half are mirrored; in evaluation as "none".

    Args:
        image_processor: rescales and normalises.
        size: (height, width) of the window.
        augmentation: one of the names above.
        train: draw windows at random.
        seed: gives another stream of draws for the same state of torch's generator.
    """

    image_processor: Any
    size: tuple[int, int]
    augmentation: str = "none"
    train: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"augmentation={self.augmentation!r} is unknown; choose one of {', '.join(AUGMENTATIONS)}."
            )

    @property
    def is_scaled(self) -> bool:
        """Whether an image is seen whole, scaled to the window."""
        return self.augmentation == "resize"

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        """Return normalised pixels `(3, height, width)` and, with annotations, labels `(height, width)` for each row."""
        images = [to_rgb(image) for image in batch["image"]]
        masks: Sequence[np.ndarray | None] = batch.get("annotation") or [None] * len(images)
        # One draw of torch's global generator seeds the batch: set_seed makes it reproducible, a resumed Trainer
        # restores it, and the DataLoader gives each worker and epoch a state of its own.
        draws = np.random.default_rng([self.seed, int(torch.randint(2**62, ()))]) if self.train else None
        pixels, labels = [], []
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            if self.is_scaled:
                seen, target = self._scaled(image, mask)
            elif draws is not None:
                seen, target = self._drawn(image, mask, draws)
            else:
                seen, target = self._tile(image, mask, batch["tile"][index] if "tile" in batch else 0)
            pixels.append(self.pixel_values(seen))
            labels.append(target)
        if "annotation" not in batch:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "labels": [torch.from_numpy(np.ascontiguousarray(t)) for t in labels]}

    def pixel_values(self, image: Image.Image) -> torch.Tensor:
        """Return an image of at most the window's size as normalised pixels `(3, height, width)`, filled up with 0."""
        options = {"do_resize": False, "do_pad": False}
        if hasattr(self.image_processor, "do_center_crop"):
            options["do_center_crop"] = False
        pixels = self.image_processor(images=[image], return_tensors="pt", **options)["pixel_values"][0]
        height, width = self.size
        return F.pad(pixels.to(torch.float32), (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))

    def _scaled(self, image: Image.Image, mask: Any) -> tuple[Image.Image, Any]:
        height, width = self.size
        seen = image.resize((width, height), resampling(self.image_processor))
        return seen, None if mask is None else _resized(mask, (height, width))

    def _tile(self, image: Image.Image, mask: Any, number: int) -> tuple[Image.Image, Any]:
        tile = tiles((image.height, image.width), self.size)[number]
        seen = self.window(image, tile.top, tile.left)
        if mask is None:
            return seen, None
        decided = np.full_like(mask, IGNORED)
        own = slice(*tile.rows), slice(*tile.columns)
        decided[own] = mask[own]
        return seen, self._cut(decided, tile.top, tile.left)

    def _drawn(self, image: Image.Image, mask: Any, draws: np.random.Generator) -> tuple[Image.Image, Any]:
        scaled = self.augmentation == "resize_crop_flip"
        if scaled:
            scale = float(np.exp(draws.uniform(*np.log(_SCALES))))
            shape = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
            image = image.resize(shape[::-1], resampling(self.image_processor))
            mask = None if mask is None else _resized(mask, shape)
        spare = [max(0, side - size) for side, size in zip((image.height, image.width), self.size, strict=True)]
        classes = np.unique(mask[mask != IGNORED]) if mask is not None and scaled else np.array([])
        if len(classes) and draws.random() < _BALANCED:
            rows, columns = np.nonzero(mask == draws.choice(classes))
            chosen = draws.integers(len(rows))
            corner = [
                int(np.clip(at - draws.integers(size), 0, room))
                for at, size, room in zip((rows[chosen], columns[chosen]), self.size, spare, strict=True)
            ]
        else:
            corner = [int(draws.integers(0, room + 1)) for room in spare]
        seen, target = self.window(image, *corner), None if mask is None else self._cut(mask, *corner)
        if scaled and draws.random() < 0.5:
            # What was filled up stays to the right of the image
            seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if target is not None:
                target[:, : seen.width] = target[:, : seen.width][:, ::-1].copy()
        return seen, target

    def window(self, image: Image.Image, top: int, left: int) -> Image.Image:
        """Return what an image shows in the window at (top, left)."""
        height, width = self.size
        return image.crop((left, top, min(left + width, image.width), min(top + height, image.height)))

    def _cut(self, mask: np.ndarray, top: int, left: int) -> np.ndarray:
        height, width = self.size
        part = mask[top : top + height, left : left + width]
        missing = ((0, height - part.shape[0]), (0, width - part.shape[1]))
        return np.pad(part, missing, constant_values=IGNORED)


class Tiled(Dataset):
    """Every tile of every image of a split, one after the other, as `SegmentationTransform` gives them.

    Args:
        split: of `read_segmentation`.
        transform: for evaluation.
    """

    def __init__(self, split: Any, transform: SegmentationTransform) -> None:
        self.split, self.transform = split, transform
        counts = [len(tiles(size, transform.size)) for size in zip(split["height"], split["width"], strict=True)]
        self._places = [(row, tile) for row, count in enumerate(counts) for tile in range(count)]
        self._decoded: tuple[int, dict[str, Any]] = (-1, {})

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, tile = self._places[index]
        # Tiles of one image follow each other
        if self._decoded[0] != row:
            example = self.split[row]
            self._decoded = row, {"image": [example["image"]], "annotation": [example["annotation"]]}
        batch = self.transform({**self._decoded[1], "tile": [tile]})
        return {name: values[0] for name, values in batch.items()}


def _resized(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return labels in `shape` (height, width) by the nearest pixel."""
    scaled = Image.fromarray(mask.astype(np.uint8)).resize(shape[::-1], Image.Resampling.NEAREST)
    return np.asarray(scaled).astype(np.int64)
