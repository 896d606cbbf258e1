"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(values, indent=2) + "\n")


@contextmanager
def written_beside(folder: str | Path, last: str = "*.json") -> Iterator[Path]:
    """Yield a scratch folder whose files move into `folder` when the block ends well, and vanish otherwise.

    A full disk or a crash while saving so leaves the files that were there untouched.

    Args:
        folder: made if need be, and removed again if nothing comes of it.
        last: pattern of the files that move last: a config in place promises weights that fit it.
    """
    folder = Path(folder)
    made = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield scratch
        for path in sorted(scratch.iterdir(), key=lambda path: (path.match(last), path.name)):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        # Only empty folders go: there is nothing in them, and nobody else has used them
        with suppress(OSError):
            for each in made:
                each.rmdir()
