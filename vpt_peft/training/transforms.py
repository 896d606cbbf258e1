"""From images to model input: RGB, resizing, cropping and the checkpoint's normalisation.

The geometry is done with Pillow, so torchvision is not needed; rescaling and normalising are left to the checkpoint's
own image processor. (The papers' code normalises every backbone's input with ImageNet mean and standard deviation;
here the checkpoint decides, as its weights were trained with those values.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .images import ImageError, find_corrupt_images, to_rgb


__all__ = ["ImageError", "ImageTransform", "build_transform", "collate_fn", "find_corrupt_images", "to_rgb"]

AUGMENTATIONS = ("none", "resize", "resize_crop_flip")
# FGVC protocol of the VPT paper: shorter side to 256, crop 224; kept as a ratio for other input sizes
_RESIZE_RATIO = 256 / 224


@dataclass(frozen=True)
class ImageTransform:
    """What `build_transform` returns; picklable, and without state of its own besides the settings."""

    image_processor: Any
    size: tuple[int, int]
    augmentation: str
    train: bool
    seed: int
    as_shipped: bool

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        """Turn a batch {"image", "label"} into {"pixel_values": (batch, 3, height, width) float32, "labels"}.

        "label" may be absent. Raises `ImageError` if an image cannot be read.
        """
        images = [to_rgb(image) for image in batch["image"]]
        if self.as_shipped:
            pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        else:
            resample = _resampling(self.image_processor)
            if self.augmentation == "resize_crop_flip":
                images = self._crop(images, resample)
            else:
                images = [image.resize(self.size[::-1], resample) for image in images]
            options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
            pixels = self.image_processor(images=images, **options)["pixel_values"]
        output: dict[str, Any] = {"pixel_values": pixels.to(torch.float32)}
        if "label" in batch:
            output["labels"] = list(batch["label"])
        return output

    def _crop(self, images: list[Image.Image], resample: Image.Resampling) -> list[Image.Image]:
        height, width = self.size
        # One draw of torch's global generator seeds the batch: set_seed makes it reproducible, a resumed Trainer
        # restores it, and the DataLoader gives each worker and epoch a state of its own.
        draws = np.random.default_rng([self.seed, int(torch.randint(2**62, ()))]) if self.train else None
        cropped = []
        for image in images:
            scale = _RESIZE_RATIO * max(height / image.height, width / image.width)
            resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
            image = image.resize(resized, resample)
            spare = (image.width - width, image.height - height)
            if draws is None:
                left, top = spare[0] // 2, spare[1] // 2
            else:
                left, top = (int(draws.integers(0, room + 1)) for room in spare)
            image = image.crop((left, top, left + width, top + height))
            if draws is not None and draws.random() < 0.5:
                image = ImageOps.mirror(image)
            cropped.append(image)
        return cropped


def build_transform(
    image_processor: Any, augmentation: str = "none", train: bool = False, seed: int = 0
) -> Callable[[dict[str, list]], dict[str, Any]]:
    """A batch transform for `Dataset.with_transform`: images to normalised pixels, "label" to "labels".

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


def _resampling(image_processor: Any) -> Image.Resampling:
    resample = getattr(image_processor, "resample", None)
    if resample is None:
        return Image.Resampling.BILINEAR
    # torchvision-backed processors may hold torchvision's enum, whose members have Pillow's names
    return Image.Resampling[resample.name] if hasattr(resample, "name") else Image.Resampling(resample)


def collate_fn(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack transformed examples: "pixel_values" (batch, 3, height, width) and, if given, "labels" (batch,) int64."""
    batch = {"pixel_values": torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([int(example["labels"]) for example in examples], dtype=torch.int64)
    return batch
