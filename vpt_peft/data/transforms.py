"""From images to model input: RGB, resizing, cropping and the checkpoint's normalisation.

The geometry is done with Pillow, so torchvision is not needed; rescaling and normalising are left to the checkpoint's
own image processor. (The papers' code normalises every backbone's input with ImageNet mean and standard deviation;
here the checkpoint decides, as its weights were trained with those values.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import to_rgb


AUGMENTATIONS = ("none", "resize", "resize_crop_flip")
# FGVC protocol of the VPT paper: shorter side to 256, crop 224; kept as a ratio for other input sizes
_RESIZE_RATIO = 256 / 224


@dataclass(frozen=True)
class Geometry:
    """How one image is resized, cropped and mirrored, so that a mask can follow it.

    Args:
        size: (width, height) after resizing.
        box: (left, top, right, bottom) of the crop.
        mirrored: flipped left to right after cropping.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    mirrored: bool = False

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Return the image resized, cropped and mirrored."""
        image = image.resize(self.size, resample).crop(self.box)
        return ImageOps.mirror(image) if self.mirrored else image


@dataclass(frozen=True)
class ImageTransform:
    """What `build_transform` returns: picklable, and its settings are all the state it has."""

    image_processor: Any
    size: tuple[int, int]
    augmentation: str
    train: bool
    seed: int
    as_shipped: bool

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        """Turn a batch {"image"} into {"pixel_values": (batch, 3, height, width) float32}.

        Raises:
            ImageError: an image cannot be read.
        """
        images = [to_rgb(image) for image in batch["image"]]
        return {"pixel_values": self.pixel_values(images, self.geometries(images))}

    def geometries(self, images: Sequence[Image.Image]) -> list[Geometry]:
        """Draw how each image is resized, cropped and mirrored; all alike where nothing is random."""
        height, width = self.size
        if self.augmentation != "resize_crop_flip":
            return [Geometry((width, height), (0, 0, width, height))] * len(images)
        # One draw of torch's global generator seeds the batch: set_seed makes it reproducible, a resumed Trainer
        # restores it, and the DataLoader gives each worker and epoch a state of its own.
        draws = np.random.default_rng([self.seed, int(torch.randint(2**62, ()))]) if self.train else None
        drawn = []
        for image in images:
            scale = _RESIZE_RATIO * max(height / image.height, width / image.width)
            size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
            spare = (size[0] - width, size[1] - height)
            if draws is None:
                left, top = spare[0] // 2, spare[1] // 2
            else:
                left, top = (int(draws.integers(0, room + 1)) for room in spare)
            mirrored = draws is not None and draws.random() < 0.5
            drawn.append(Geometry(size, (left, top, left + width, top + height), mirrored))
        return drawn

    def pixel_values(self, images: Sequence[Image.Image], geometries: Sequence[Geometry]) -> torch.Tensor:
        """Return RGB images as normalised pixels `(batch, 3, height, width)`, float32."""
        options: dict[str, Any] = {}
        if not self.as_shipped:
            resample = resampling(self.image_processor)
            images = [g.apply(image, resample) for image, g in zip(images, geometries, strict=True)]
            options = {"do_resize": False, "do_center_crop": False}
        pixels = self.image_processor(images=list(images), return_tensors="pt", **options)["pixel_values"]
        return pixels.to(torch.float32)


def build_transform(
    image_processor: Any, augmentation: str = "none", train: bool = False, seed: int = 0
) -> ImageTransform:
    """Return a batch transform for `Dataset.with_transform`: images to normalised pixels.

    - "none": the checkpoint's image processor as it ships (for ViT: resized straight to its size).
    - "resize": resized straight to the model's input size, whatever the aspect ratio (VTAB protocol); differs from
      "none" only for processors that crop.
    - "resize_crop_flip": FGVC protocol. Shorter side to 256/224 of the input size, then in training a random crop and
      a horizontal flip with probability 1/2, in evaluation the centre crop.

    Random draws follow torch's global generator (`transformers.set_seed`) and differ between epochs and workers.

    Args:
        image_processor: a transformers image processor.
        augmentation: one of the names above.
        train: draw crops and flips; if False the transform is deterministic.
        seed: gives another stream of draws for the same state of torch's generator; not negative.

    Raises:
        ValueError: if `augmentation` is unknown, `seed` is negative, or the processor does not give one image of
            shape (3, height, width) per picture.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation={augmentation!r} is unknown; choose one of {', '.join(AUGMENTATIONS)}.")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; give 0 or more.")
    size, fixed = _input_size(image_processor)
    as_shipped = augmentation == "none" and fixed
    return ImageTransform(image_processor, size, augmentation, train, seed, as_shipped)


def check_processor(image_processor: Any) -> None:
    """Check the numbers that an image processor normalises with.

    Raises:
        ValueError: a mean, deviation or factor is no finite number, or a deviation is 0.
    """
    for name in ("image_mean", "image_std", "rescale_factor"):
        value = getattr(image_processor, name, None)
        value = list(value) if isinstance(value, tuple) else value
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"preprocessor_config.json: {name}={value!r} must hold finite numbers.")
            if number == 0 and name != "image_mean":
                raise ValueError(f"preprocessor_config.json: {name}={value!r} must not hold 0.")


def _input_size(image_processor: Any) -> tuple[tuple[int, int], bool]:
    """(height, width) of the processor's output, and whether it is the same for pictures of any shape."""
    kind = type(image_processor).__name__
    shapes = set()
    for probe in (Image.new("RGB", (96, 48)), Image.new("RGB", (48, 96))):
        shape = tuple(image_processor(images=[probe], return_tensors="pt")["pixel_values"].shape)
        if len(shape) != 4 or shape[:2] != (1, 3):
            raise ValueError(
                f"image_processor {kind} gives pixel_values of shape {shape} for one picture, not (1, 3, height, "
                "width); use the image processor of an image classification checkpoint."
            )
        shapes.add(shape[2:])
    if len(shapes) == 1:
        return shapes.pop(), True
    size = getattr(image_processor, "size", None) or {}
    edge = size["shortest_edge"] if "shortest_edge" in size else None
    height, width = (size["height"], size["width"]) if "height" in size and "width" in size else (edge, edge)
    if not height or not width:
        raise ValueError(
            f"image_processor {kind} has size={size!r}, from which no input size follows; set size={{'height': ..., "
            "'width': ...}} to the model's image size."
        )
    return (int(height), int(width)), False


def resampling(image_processor: Any) -> Image.Resampling:
    """Return the filter an image processor resizes with."""
    resample = getattr(image_processor, "resample", None)
    if resample is None:
        return Image.Resampling.BILINEAR
    # torchvision-backed processors may hold torchvision's enum, whose members have Pillow's names
    return Image.Resampling[resample.name] if hasattr(resample, "name") else Image.Resampling(resample)
