"""The classes of pixels drawn over an image, with their names on their largest parts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .overlay import class_colour, ink


_SMALLEST_SIDE = 480
_OPACITY = 0.55
# Of the picture: parts below this share of it get no name
_NAMED = 0.002


def draw_classes(image: Image.Image, classes: np.ndarray, names: Mapping[int, str]) -> Image.Image:
    """Return an image with its classes in colours, lines between them, and a name on the largest part of each.

    A small image is enlarged, so that names cover less of it.

    Args:
        image: RGB.
        classes: `(height, width)`, integers; pixels of negative ones stay as they are.
        names: the classes by number.
    """
    factor = max(1.0, _SMALLEST_SIDE / min(image.size))
    scene = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    numbers = np.asarray(Image.fromarray(classes.astype(np.int32)).resize(scene.size, Image.Resampling.NEAREST))
    pixels = np.asarray(scene).astype(np.float32)
    for number in np.unique(numbers[numbers >= 0]).tolist():
        inside = numbers == number
        pixels[inside] += _OPACITY * (np.array(class_colour(number)) - pixels[inside])
    pixels[_borders(numbers)] = 255
    scene = Image.fromarray(pixels.round().astype(np.uint8))
    _write_names(scene, numbers, names)
    return scene


def _borders(numbers: np.ndarray) -> np.ndarray:
    """Return the pixels whose right or lower neighbour is of another class."""
    border = np.zeros(numbers.shape, dtype=bool)
    border[:, :-1] |= numbers[:, :-1] != numbers[:, 1:]
    border[:-1] |= numbers[:-1] != numbers[1:]
    return border


def _write_names(scene: Image.Image, numbers: np.ndarray, names: Mapping[int, str]) -> None:
    """Write each name where its class is widest, the largest classes first; a name moves down past one that is there."""
    from scipy import ndimage

    draw = ImageDraw.Draw(scene)
    font = ImageFont.load_default(size=max(13, round(min(scene.size) / 32)))
    present, counts = np.unique(numbers[numbers >= 0], return_counts=True)
    taken: list[tuple[float, float, float, float]] = []
    for number in present[np.argsort(-counts)].tolist():
        # A rim, so that the edge of the image counts as an edge of the class
        depth = ndimage.distance_transform_edt(np.pad(numbers == number, 1))[1:-1, 1:-1]
        if (numbers == number).mean() < _NAMED:
            continue
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        left, top, right, bottom = draw.textbbox((0, 0), names[number], font=font)
        width, height = right - left + 8, bottom - top + 6
        x = min(max(0.0, column - width / 2), scene.width - width)
        y = min(max(0.0, row - height / 2), scene.height - height)
        while any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in taken):
            y += height / 2
        if y + height > scene.height:
            continue
        taken.append((x, y, x + width, y + height))
        colour = class_colour(number)
        draw.rectangle((x, y, x + width, y + height), fill=colour, outline=(255, 255, 255))
        draw.text((x + 4 - left, y + 3 - top), names[number], fill=ink(colour), font=font)
