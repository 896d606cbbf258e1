"""The output folder: refused unless it is ours, resumed where a run broke off, and never left half-written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..files import RUN_RECORD, write_json
from .arguments import VPTTrainingArguments


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Of safetensors, then of torch.save
_WRITE_SIGNS = ("Error while serializing", "PytorchStreamWriter", "file write failed", "unexpected pos")
_LOCK = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Without one of these a folder of ours holds nothing that could be lost
_RESULTS = ("adapter_model.safetensors", "vpt_peft_baseline.json", "all_results.json")


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run.

    transformers' `get_last_checkpoint` would return one whose writing broke off; that one lacks a readable
    trainer_state.json, which is written last.
    """
    complete = []
    for path in Path(folder).glob("checkpoint-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if match:
            complete.append((int(match.group(1)), path))
    return max(complete)[1] if complete else None


def prepare_output_dir(training: VPTTrainingArguments) -> Path | None:
    """Check the output folder before anything is computed; return the checkpoint to resume from, or None.

    Nothing is written or removed yet; `claim_output_dir` does that. `resume_from_checkpoint` may be a folder, or
    "true" / "last" for the newest complete checkpoint in output_dir.

    Raises:
        FileExistsError: output_dir holds files that are not ours, or results while neither resuming nor overwriting.
        FileNotFoundError: there is nothing to resume from.
        NotADirectoryError: output_dir is a file.
    """
    folder = Path(training.output_dir or ".")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir={str(folder)!r} is a file; give a folder.")
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if entries and not (folder / RUN_RECORD).is_file():
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds files that no run of vpt-peft wrote; give an empty or another folder."
        )
    if training.resume_from_checkpoint is not None:
        return _resume_point(folder, training.resume_from_checkpoint)
    taken = last_checkpoint(folder) or next((folder / name for name in _RESULTS if (folder / name).exists()), None)
    if taken is not None and not training.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds the results of an earlier run ({taken.name}); add "
            "--resume_from_checkpoint last to continue it, --overwrite_output_dir to replace it, or give another "
            "folder."
        )
    return None


@contextmanager
def claim_output_dir(training: VPTTrainingArguments, record: Mapping[str, Any]) -> Iterator[Path]:
    """Make the output folder this run's: no other can write to it in the block, and `record` is in it.

    Unless the run resumes, checkpoints of an earlier run go, as they would be taken for this run's.

    Raises:
        FileExistsError: another run is writing to the folder.
        OSError: the folder cannot be written to.
    """
    folder = Path(training.output_dir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    # The system frees the lock of a process that is killed
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"output_dir={str(folder)!r}: another run is writing to it; wait for it, or give another folder."
        ) from None
    try:
        if training.resume_from_checkpoint is None:
            for path in folder.glob("checkpoint-*"):
                if _CHECKPOINT.fullmatch(path.name):
                    shutil.rmtree(path)
        write_json(folder / RUN_RECORD, record)
        yield folder
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


def _resume_point(folder: Path, wanted: str) -> Path:
    if wanted.lower() in ("true", "last", "auto"):
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise FileNotFoundError(
                f"output_dir={str(folder)!r} holds no complete checkpoint; leave out resume_from_checkpoint to start."
            )
        return checkpoint
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise FileNotFoundError(
            f"resume_from_checkpoint={wanted!r} is not a complete checkpoint (no trainer_state.json); give a "
            "checkpoint-* folder, or 'last' for the newest one in output_dir."
        )
    return Path(wanted)


@contextmanager
def full_disk_explained(folder: str | Path) -> Iterator[None]:
    """Turn what the libraries raise when they cannot write into one error that says how to go on.

    Raises:
        OSError: something could not be written; complete checkpoints and earlier results are whole.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        is_file_error = isinstance(error, OSError) and error.errno in _CANNOT_WRITE
        if not is_file_error and not any(sign in str(error) for sign in _WRITE_SIGNS):
            raise
        checkpoint = last_checkpoint(folder)
        onward = (
            f"{checkpoint} is complete: continue with --resume_from_checkpoint last."
            if checkpoint
            else "No checkpoint is complete; start again with --overwrite_output_dir."
        )
        raise OSError(f"{folder} cannot be written to ({error}). Make room there. {onward}") from error
