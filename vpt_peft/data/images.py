"""Images as files hold them, made upright 8-bit RGB, with errors that name the file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


class DataError(ValueError):
    """The data cannot be used as it is; the message says what to change."""


class DataNotFoundError(DataError, FileNotFoundError):
    """There is no such folder, or no such data set on the Hub or in its cache."""


class ImageError(DataError):
    """An image is missing, truncated or not an image."""


class CheckedImage(datasets.Image):
    """`datasets.Image` whose decoding errors name the file; data sets stay exchangeable with plain `Image` ones."""

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> Image.Image:
        try:
            return super().decode_example(value, token_per_repo_id=token_per_repo_id)
        except Exception as error:
            raise _image_error(value, error) from error


def _image_error(value: Any, error: Exception) -> ImageError:
    path = value.get("path") if isinstance(value, dict) else value
    name = repr(str(path)) if isinstance(path, str | Path) else getattr(value, "filename", None) or "without a path"
    return ImageError(
        f"image {name} cannot be read ({type(error).__name__}: {error}). Replace or remove it; "
        "vpt_peft.data.images.find_corrupt_images(split) lists the rows of all such images."
    )


def to_rgb(image: Any) -> Image.Image:
    """An upright 8-bit RGB image from whatever Pillow can open.

    Transparent pixels become white; the EXIF orientation is applied; CMYK, palette, grey and bilevel images are
    converted by Pillow. Images of more than 8 bits (modes I;16, I, F) are scaled by the smallest of the ranges
    [0, 1] (F only), [0, 255], [0, 4095] and [0, 65535] that holds their values, and by their own minimum and maximum
    if none does, so that 12-bit pictures in 16-bit files do not come out black.

    Args:
        image: a PIL image, a path, the bytes of a file, or the `{"bytes", "path"}` of an undecoded `datasets.Image`.

    Raises:
        ImageError: if it is missing, truncated or not an image.
    """
    try:
        picture = ImageOps.exif_transpose(_open(image))
        if picture.mode in _WIDE_MODES:
            picture = _to_eight_bits(picture)
        elif picture.mode in _ALPHA_MODES or "transparency" in picture.info:
            # Pillow converts the premultiplied grey mode only by way of the plain one
            picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception as error:
        # Pillow's decoders raise many types on broken files (OSError, SyntaxError, ValueError, struct.error, ...)
        raise _image_error(image, error) from error


def _open(image: Any) -> Image.Image:
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes | bytearray):
        image = io.BytesIO(image)
    if not isinstance(image, Image.Image):
        if image is None:
            raise ValueError("neither bytes nor a path")
        with Image.open(image) as opened:
            opened.load()
            return opened
    return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = float(values.min()), float(values.max())
    ranges = (1.0, 255.0, 4095.0, 65535.0) if image.mode == "F" else (255.0, 4095.0, 65535.0)
    if low >= 0 and high <= ranges[-1]:
        low, high = 0.0, next(top for top in ranges if high <= top)
    return Image.fromarray(np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8))


def find_corrupt_images(split: datasets.Dataset) -> list[tuple[int, str]]:
    """(row, message) of each image in the column "image" that cannot be read; decodes all of them once."""
    raw = split.with_format(None).select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    corrupt = []
    for row, example in enumerate(raw):
        try:
            to_rgb(example["image"])
        except ImageError as error:
            corrupt.append((row, str(error)))
    return corrupt


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among `paths` and, sorted, in all folders below them.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{str(path)!r} does not exist; give image files or folders.")
    if not found:
        raise FileNotFoundError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {', '.join(map(str, paths))}.")
    return found


def read_bytes(image: dict[str, Any]) -> bytes:
    """The file behind the `{"bytes", "path"}` of an undecoded `datasets.Image`.

    Raises:
        ImageError: if there are neither bytes nor a readable file.
    """
    if image is not None and image.get("bytes") is not None:
        return image["bytes"]
    try:
        return Path(os.fspath(image["path"])).read_bytes()
    except (OSError, TypeError) as error:
        raise _image_error(image, error) from error
