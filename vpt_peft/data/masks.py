"""Masks: images whose values are the classes of pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps

from .images import decode_image


# Label of a pixel that does not count, whatever it is in the files
IGNORED = 255
NUMBER_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")


@dataclass(kw_only=True)
class Mask(datasets.Image):
    """A column of masks, which decode to the class of each pixel `(height, width)`, int64; `IGNORED` where none counts.

    Args:
        names: the classes by number.
        ignore_index: value of pixels that do not count.
        reduce: 0 does not count either, and class 0 is written as 1.
        numbers: the number that each class is given in place of its own.
    """

    names: list[str] = field(default_factory=list)
    ignore_index: int = IGNORED
    reduce: bool = False
    numbers: list[int] | None = None

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> np.ndarray:
        return self.read(value)

    def read(self, mask: Any) -> np.ndarray:
        """Return the classes in an undecoded image.

        Raises:
            ValueError: it is not one number per pixel, or has a number that is no class.
        """
        opened: Image.Image = decode_image(mask)
        if opened.mode not in NUMBER_MODES:
            raise ValueError(
                f"it has mode {opened.mode}, colours in place of one number per pixel; convert each colour to the number "
                "of its class and save a grey or palette PNG"
            )
        values = np.asarray(ImageOps.exif_transpose(opened)).astype(np.int64)
        counts = values != self.ignore_index
        if self.reduce:
            counts &= values != 0
            values = values - 1
        wrong = counts & ((values < 0) | (values >= len(self.names)))
        if wrong.any():
            raise ValueError(
                f"it has the label {values[wrong][0] + self.reduce}, which is neither one of the {len(self.names)} "
                f"classes nor ignore_index={self.ignore_index}; correct it, or name all classes in an id2label.json"
            )
        if self.numbers is not None:
            values = np.asarray(self.numbers)[np.where(counts, values, 0)]
        return np.where(counts, values, IGNORED)
