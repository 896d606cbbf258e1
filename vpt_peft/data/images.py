"""Images as files hold them, made upright 8-bit RGB, with errors that name the file."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..files import open_regular
from .errors import DataError


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# What Pillow decodes by itself: others are run through programs (Ghostscript) or are containers of anything
FORMATS = ("BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Above what Pillow's largest number of pixels takes without compression
MAX_IMAGE_BYTES = 2**30
_STRIP_PIXELS = 2**22
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


class DataNotFoundError(DataError, FileNotFoundError):
    """There is no such folder, or no such data set on the Hub or in its cache."""


class ImageError(DataError):
    """An image is missing, truncated or not an image."""


class CheckedImage(datasets.Image):
    """`datasets.Image` that opens what [`to_rgb`] opens; data sets stay exchangeable with plain `Image` ones."""

    def decode_example(self, value: Any, token_per_repo_id: dict | None = None) -> Image.Image:
        try:
            if not isinstance(value, dict) or not _is_here(value):
                return super().decode_example(value, token_per_repo_id=token_per_repo_id)
            image = _upright(decode_image(value))
            return image if self.mode in (None, image.mode) else image.convert(self.mode)
        except Exception as error:
            raise _image_error(value, error) from error


def _is_here(value: dict[str, Any]) -> bool:
    """Whether an image is in memory or in a local file; `datasets` fetches the others."""
    return value.get("bytes") is not None or (value.get("path") is not None and os.path.exists(value["path"]))


def _image_error(value: Any, error: Exception) -> ImageError:
    path = value.get("path") if isinstance(value, dict) else value
    name = repr(str(path)) if isinstance(path, str | Path) else getattr(value, "filename", None) or "without a path"
    return ImageError(
        f"image {name} cannot be read ({type(error).__name__}: {error}). Replace or remove it; "
        "vpt_peft.data.images.find_corrupt_images(split) lists the rows of all such images."
    )


def to_rgb(image: Any) -> Image.Image:
    """An upright 8-bit RGB image from whatever Pillow decodes by itself; see `FORMATS`.

    Of an animation the first frame is taken. Transparent pixels become white; the EXIF orientation is applied; CMYK,
    palette, grey and bilevel images are converted by Pillow. Images of more than 8 bits (modes I;16, I, F) are scaled by the smallest of the ranges
    [0, 1] (F only), [0, 255], [0, 4095] and [0, 65535] that holds their values, and by their own minimum and maximum
    if none does, so that 12-bit pictures in 16-bit files do not come out black.

    Args:
        image: a PIL image, a path, the bytes of a file, or the `{"bytes", "path"}` of an undecoded `datasets.Image`.

    Raises:
        ImageError: if it is missing, truncated, not an image, no regular file, or has more pixels than Pillow's
            `Image.MAX_IMAGE_PIXELS`, which its header tells before anything is decoded.
    """
    try:
        picture = _upright(decode_image(image))
        if picture.mode in _WIDE_MODES:
            picture = _to_eight_bits(picture)
        elif picture.mode in _ALPHA_MODES or "transparency" in picture.info:
            picture = _on_white(picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except Exception as error:
        # Pillow's decoders raise many types on broken files (OSError, SyntaxError, ValueError, struct.error, ...)
        raise _image_error(image, error) from error


def decode_image(image: Any) -> Image.Image:
    """Return what Pillow decodes, as it is; see `to_rgb` for what it takes."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, Image.Image):
        image.load()
        return image
    if image is None:
        raise ValueError("neither bytes nor a path")
    with io.BytesIO(image) if isinstance(image, bytes | bytearray) else open_regular(image, MAX_IMAGE_BYTES) as file:
        with open_image(file) as opened:
            opened.load()
            return opened


def open_image(file: Any) -> Image.Image:
    """Open an image of one of `FORMATS` without decoding it.

    Args:
        file: its bytes, as a file.

    Raises:
        OSError: it is of another format, or not an image.
        ValueError: it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    Image.init()
    with warnings.catch_warnings():
        # What Pillow warns of is refused here
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and opened.width * opened.height > most:
        raise ValueError(
            f"{opened.width}x{opened.height} pixels are more than the {most:,} of PIL.Image.MAX_IMAGE_PIXELS; shrink it"
        )
    return opened


def _upright(image: Image.Image) -> Image.Image:
    # Without an orientation Pillow would copy the image
    return image if image.getexif().get(ExifTags.Base.Orientation) is None else ImageOps.exif_transpose(image)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Strips of an image from top to bottom, with their tops: what is worked out of them takes little memory."""
    rows = max(1, _STRIP_PIXELS // max(image.width, 1))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        # Pillow converts the premultiplied grey mode only by way of the plain one
        strip = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        result.paste(strip.convert("RGB"), (0, top))
    return result


def _finite(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.float64)
    return np.where(np.isfinite(values), values, 0.0)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    bounds = [(values.min(), values.max()) for values in (_finite(strip) for _, strip in _strips(image))]
    low, high = float(min(least for least, _ in bounds)), float(max(most for _, most in bounds))
    ranges = (1.0, 255.0, 4095.0, 65535.0) if image.mode == "F" else (255.0, 4095.0, 65535.0)
    if low >= 0 and high <= ranges[-1]:
        low, high = 0.0, next(top for top in ranges if high <= top)
    result = Image.new("L", image.size)
    for top, strip in _strips(image):
        values = np.rint((_finite(strip) - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8)
        result.paste(Image.fromarray(values), (0, top))
    return result


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
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{str(path)!r} does not exist; give image files or folders.")
    if not found:
        raise FileNotFoundError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {', '.join(map(str, paths))}.")
    return found


def read_bytes(image: dict[str, Any]) -> bytes:
    """The file behind the `{"bytes", "path"}` of an undecoded `datasets.Image`.

    Raises:
        ImageError: if there are neither bytes nor a readable regular file.
    """
    if image is not None and image.get("bytes") is not None:
        return image["bytes"]
    try:
        with open_regular(image["path"], MAX_IMAGE_BYTES) as file:
            return file.read()
    except (OSError, TypeError) as error:
        raise _image_error(image, error) from error
