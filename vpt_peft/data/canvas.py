"""Images on a canvas of one size, with boxes and masks that follow, and joint random augmentation by Kornia.

An image keeps its aspect ratio: it is scaled until it fits and lies in the upper left corner. What was found on the
canvas is found in the image by one factor, whatever sizes the images of a batch have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .images import DataError
from .transforms import resampling


# Of an object that the crop cuts: the share that must stay for it to stay an object
_VISIBLE = 0.3
_SMALLEST = 2.0


def canvas_size(image_processor: Any) -> tuple[int, int]:
    """Return (height, width) of the canvas: the size of the image processor; a shortest edge gives a square of it.

    Raises:
        DataError: the processor has no size.
    """
    size = getattr(image_processor, "size", None) or {}
    if "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    edge = size["shortest_edge"] if "shortest_edge" in size else None
    if not edge:
        raise DataError(
            f"the image processor {type(image_processor).__name__} has size={size!r}; give it a height and a width."
        )
    return int(edge), int(edge)


@dataclass(frozen=True)
class Canvas:
    """Places images on a canvas.

    Args:
        image_processor: of transformers; it rescales and normalises.
        height: of the canvas in pixels.
        width: of the canvas in pixels.
    """

    image_processor: Any
    height: int
    width: int

    def extent(self, image: Image.Image) -> tuple[float, float]:
        """Return (height, width) of the whole canvas, measured in pixels of the original image."""
        scale = self._scale(image)
        return self.height / scale, self.width / scale

    def covered(self, image: Image.Image) -> tuple[int, int]:
        """Return (height, width) of the part of the canvas that the image covers, in whole pixels of the canvas."""
        scale = self._scale(image)
        return max(1, round(image.height * scale)), max(1, round(image.width * scale))

    def masks(self, image: Image.Image, masks: np.ndarray) -> torch.Tensor:
        """Place masks `(n, height, width)` of an image on the canvas `(n, canvas height, canvas width)`, float32."""
        if not len(masks):
            return torch.zeros(0, self.height, self.width)
        height, width = self.covered(image)
        resized = F.interpolate(torch.from_numpy(masks).float()[None], size=(height, width), mode="nearest-exact")[0]
        return F.pad(resized, (0, self.width - width, 0, self.height - height))

    def pixel_values(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return RGB images as normalised pixels `(batch, 3, height, width)`; what no image covers is 0."""
        sheets = []
        for image in images:
            height, width = self.covered(image)
            resized = image.resize((width, height), resampling(self.image_processor))
            pixels = self.image_processor(
                images=[resized], return_tensors="pt", do_resize=False, do_pad=False, **self._no_crop()
            )["pixel_values"][0]
            missing = (0, self.width - pixels.shape[-1], 0, self.height - pixels.shape[-2])
            sheets.append(F.pad(pixels.to(torch.float32), missing))
        return torch.stack(sheets)

    def _scale(self, image: Image.Image) -> float:
        return min(self.height / image.height, self.width / image.width)

    def _no_crop(self) -> dict[str, bool]:
        return {"do_center_crop": False} if hasattr(self.image_processor, "do_center_crop") else {}


class JointAugmentation:
    """Random flip, shift and scale of an image together with the boxes or masks in it.

    Draws follow torch's global generator.

    Args:
        seed: gives another stream of draws for the same state of the generator.
    """

    def __init__(self, seed: int = 0) -> None:
        from kornia.augmentation import AugmentationSequential, RandomAffine, RandomHorizontalFlip

        self.seed = seed
        self._augment = AugmentationSequential(
            RandomHorizontalFlip(p=0.5),
            RandomAffine(degrees=0.0, translate=(0.1, 0.1), scale=(0.7, 1.6), p=0.9),
            data_keys=["input"],
        )

    def __call__(self, pixels: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Augment one image with boxes.

        Args:
            pixels: `(3, height, width)`, normalised.
            boxes: `(objects, 4)`, corners in pixels.

        Returns:
            The pixels, the boxes cut to the canvas, and which of them stay `(objects,)`: those of which enough is seen.
        """
        # Kornia counts from the middle of the first pixel, boxes from its edge
        image, moved = self._run(pixels, boxes - 0.5, "bbox_xyxy")
        moved = moved + 0.5
        height, width = pixels.shape[-2:]
        cut = moved.clone()
        cut[:, 0::2], cut[:, 1::2] = moved[:, 0::2].clamp(0, width), moved[:, 1::2].clamp(0, height)
        sides, whole = cut[:, 2:] - cut[:, :2], (moved[:, 2:] - moved[:, :2]).prod(-1)
        stays = (sides >= _SMALLEST).all(-1) & (sides.prod(-1) >= _VISIBLE * whole)
        return image, cut, stays

    def with_masks(self, pixels: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Augment one image with masks.

        Args:
            pixels: `(3, height, width)`, normalised.
            masks: `(objects, height, width)`, 0 or 1.

        Returns:
            The pixels, the masks, and which of them stay `(objects,)`: those with a few pixels left.
        """
        image, moved = self._run(pixels, masks, "mask")
        moved = (moved > 0.5).to(masks.dtype)
        return image, moved, moved.sum((-2, -1)) >= _SMALLEST**2

    def _run(self, pixels: torch.Tensor, targets: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        draw = int(torch.randint(2**62, ()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((draw + self.seed) % 2**63)
            if not len(targets):
                return self._augment(pixels[None], data_keys=["input"])[0], targets
            image, moved = self._augment(pixels[None], targets[None], data_keys=["input", kind])
        return image[0], moved[0]
