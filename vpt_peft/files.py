"""Write files whole or not at all, so that a full disk or a crash leaves what was there before."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


# The arguments of a run, in its output folder
RUN_RECORD = "training_config.json"
# Files that promise others beside them, such as weights that fit
_LAST = (".json", ".onnx")


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
