"""scikit-learn's 1,797 handwritten digits, and tasks made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
from PIL import Image


_SPLIT_SEED = 0
_SIZES = {"train": 400, "validation": 300, "test": 300}
_EDGE, _CELL = 32, 8


def read_digits() -> datasets.DatasetDict:
    """The digits, 8x8 grey, 0..16 brought to 0..255, by value; 60/20/20 by label, always alike."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    everything = np.arange(len(labels))
    train, rest = train_test_split(everything, test_size=0.4, stratify=labels, random_state=_SPLIT_SEED)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=_SPLIT_SEED)
    return _as_splits(
        {
            name: ([Image.fromarray(pixels[i]) for i in rows], labels[rows].tolist())
            for name, rows in (("train", train), ("validation", validation), ("test", test))
        },
        list("0123456789"),
    )


@dataclass
class Digits:
    """The digits of one split, to draw pictures from."""

    images: list[Image.Image]
    labels: np.ndarray
    rng: np.random.Generator

    def draw(self, values: tuple[int, ...] = tuple(range(10))) -> tuple[Image.Image, int]:
        """Return a digit of one of the values, and its value."""
        index = int(self.rng.choice(np.flatnonzero(np.isin(self.labels, values))))
        return self.images[index], int(self.labels[index])

    def paste(self, *pieces: tuple[Image.Image, int, int]) -> Image.Image:
        """Return a black picture of 32x32 pixels with images at (left, top)."""
        canvas = Image.new("L", (_EDGE, _EDGE))
        for image, left, top in pieces:
            canvas.paste(image, (left, top))
        return canvas


def count(digits: Digits) -> tuple[Image.Image, str]:
    """Draw one to six digits in the 16 cells of a picture; the class is their number."""
    number = int(digits.rng.integers(1, 7))
    cells = digits.rng.choice(16, number, replace=False)
    return digits.paste(*((digits.draw()[0], _CELL * int(c % 4), _CELL * int(c // 4)) for c in cells)), str(number)


@functools.cache
def make_task(draw: Callable[[Digits], tuple[Image.Image, str]]) -> datasets.DatasetDict:
    """Return pictures that `draw` makes, 400 to train and 300 each to validate and to test, always alike.

    Each split is made of the digits of that split alone.

    Args:
        draw: makes a picture and the name of its class.
    """
    source = read_digits()
    drawn = {}
    for number, (name, size) in enumerate(_SIZES.items()):
        digits = Digits(source[name]["image"][:], np.array(source[name]["label"]), np.random.default_rng([0, number]))
        drawn[name] = [draw(digits) for _ in range(size)]
    names = sorted({label for pairs in drawn.values() for _, label in pairs})
    return _as_splits(
        {
            name: ([image for image, _ in pairs], [names.index(label) for _, label in pairs])
            for name, pairs in drawn.items()
        },
        names,
    )


def _as_splits(splits: dict[str, tuple[list[Image.Image], list[int]]], names: list[str]) -> datasets.DatasetDict:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
            for name, (images, labels) in splits.items()
        }
    )


# What `dataset_name` calls them
DIGITS: dict[str, Callable[[], datasets.DatasetDict]] = {
    "digits": read_digits,
    "digits-count": lambda: make_task(count),
}
