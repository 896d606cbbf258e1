"""Zip files of images from a browser, unpacked into a private folder."""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

from ..data.images import IMAGE_SUFFIXES, DataError


MAX_FILES, MAX_BYTES = 20_000, 2_000_000_000


def unpack_images(archive: str | Path, folder: Path) -> int:
    """Unpack the images of a zip file and return their number; nothing else in it is written.

    Args:
        archive: the zip file, with one folder per class, inside of "train" and "test" or not.
        folder: where the images go, at the same places.

    Raises:
        DataError: it is no zip file, holds no images in folders, or unpacks to more than is reasonable.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = [
                entry
                for entry in opened.infolist()
                if not entry.is_dir()
                and PurePosixPath(entry.filename).suffix.lower() in IMAGE_SUFFIXES
                and not any(part.startswith((".", "__")) for part in PurePosixPath(entry.filename).parts)
            ]
            if not any("/" in entry.filename for entry in wanted):
                raise DataError("the zip file has no images in folders; make one folder for each class.")
            size = sum(entry.file_size for entry in wanted)
            if len(wanted) > MAX_FILES or size > MAX_BYTES:
                raise DataError(
                    f"the zip file holds {len(wanted)} images of {size} bytes; at most {MAX_FILES} of {MAX_BYTES}."
                )
            for entry in wanted:
                # Takes absolute paths and ".." out of names
                opened.extract(entry, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"the zip file cannot be read ({error}); make it anew.") from error
    return len(wanted)


def root_of(folder: Path) -> Path:
    """Return the folder that holds the classes or splits, where a zip file has one folder around all."""
    inside = [path for path in folder.iterdir() if path.is_dir()]
    while len(inside) == 1 and not any(path.is_file() for path in inside[0].iterdir()):
        folder = inside[0]
        inside = [path for path in folder.iterdir() if path.is_dir()]
    return folder
