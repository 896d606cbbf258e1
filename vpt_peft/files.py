"""Read regular files only; write files whole or not at all, so that a full disk leaves what was there before."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


# The arguments of a run, in its output folder
RUN_RECORD = "training_config.json"
# Files that promise others beside them, such as weights that fit
_LAST = (".json", ".onnx")
# Far above what configurations with tens of thousands of labels take
MAX_JSON_BYTES = 64 * 2**20


def open_regular(path: str | Path, most: int | None = None) -> IO[bytes]:
    """Open a regular file, or a link to one, to read bytes; pipes and devices may never end.

    Args:
        path: The file.
        most: Largest size in bytes.

    Raises:
        OSError: It cannot be opened, is no regular file, or is larger.
    """
    # Without O_NONBLOCK opening a pipe waits for its other end
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{str(path)!r} is not a regular file, but a folder, pipe, socket or device")
        if most is not None and status.st_size > most:
            raise OSError(f"{str(path)!r} has {status.st_size:,} bytes, more than the {most:,} that are read")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: The file cannot be opened, is no regular file, or is larger than 64 MiB.
        ValueError: It is not JSON, or no JSON object.
    """
    with open_regular(path, MAX_JSON_BYTES) as file:
        content = file.read()
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again, or repeat the training.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object; download it again.")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """Yield a scratch folder whose files move to `folder` when the block ends well, and vanish otherwise.

    Weights move first and the files that describe them last. Folders that were made for nothing are removed.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        for path in sorted(scratch.iterdir(), key=lambda path: (path.suffix in _LAST, path.name)):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        # Fails for a folder that holds files
        with suppress(OSError):
            for each in made:
                each.rmdir()
