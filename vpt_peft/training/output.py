"""The output folder: refused unless it is ours, resumed where a run broke off, and never left half-written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from ..files import RUN_RECORD, write_json
from .arguments import VPTTrainingArguments
from .resume import checkpoints_of, damage, find_resume_point, last_checkpoint


_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Of safetensors, then of torch.save
_WRITE_SIGNS = (
    "Error while serializing",
    "PytorchStreamWriter",
    "file write failed",
    "unexpected pos",
    "iostream error",
)
# By name, as torch may be built without them
_PROCESS_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_LOCK = ".lock"
# As `files.write_whole` names them
_SCRATCH = re.compile(r"\..+\.\d+")
# Without one of these a folder of ours holds nothing that could be lost
_RESULTS = ("adapter_model.safetensors", "vpt_peft_baseline.json", "all_results.json")


def prepare_output_dir(training: VPTTrainingArguments, record: Mapping[str, Any]) -> Path | None:
    """Check the output folder before anything is computed; return the checkpoint to resume from, or None.

    Nothing is written or removed yet; `claim_output_dir` does that. `resume_from_checkpoint` may be a folder, "true" or
    "last" for the newest whole checkpoint in output_dir, or "auto" for the same or, without one, a start.

    Args:
        training: where the run writes, and what it resumes from.
        record: all arguments of the run.

    Raises:
        FileExistsError: output_dir holds files that are not ours, or results while neither resuming nor overwriting.
        FileNotFoundError: there is nothing to resume from.
        NotADirectoryError: output_dir is a file.
        ValueError: the checkpoint is damaged, or of a run with other arguments.
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
        checkpoint = find_resume_point(folder, training.resume_from_checkpoint, record, training)
        if checkpoint is not None:
            return checkpoint
    _refuse_results(training)
    return None


def _refuse_results(training: VPTTrainingArguments) -> None:
    folder = Path(training.output_dir or ".")
    taken = next((folder / name for name in _RESULTS if (folder / name).exists()), None) or last_checkpoint(folder)
    if taken is not None and not training.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds the results of an earlier run ({taken.name}); add "
            "--resume_from_checkpoint last to continue it, --overwrite_output_dir to replace it, or give another "
            "folder."
        )


@contextmanager
def claim_output_dir(
    training: VPTTrainingArguments, record: Mapping[str, Any], checkpoint: Path | None = None
) -> Iterator[Path]:
    """Make the output folder this run's: no other can write to it in the block, and `record` is in it.

    What runs that were killed left half-written goes. Unless the run resumes, checkpoints of an earlier run go too, as
    they would be taken for this run's.

    Args:
        training: where the run writes.
        record: all arguments of the run.
        checkpoint: what it resumes from.

    Raises:
        FileExistsError: another run is writing to the folder, or has finished there meanwhile.
        OSError: the folder cannot be written to.
    """
    folder = Path(training.output_dir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    # The system frees the lock of a process that is killed
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
        # Whoever held it before may have removed the file after it was opened here
        if not _is_at_its_place(lock):
            lock.release()
            raise Timeout(lock.lock_file)
    except Timeout:
        raise FileExistsError(
            f"output_dir={str(folder)!r}: another run is writing to it; wait for it, or give another folder."
        ) from None
    try:
        if checkpoint is None:
            _refuse_results(training)
        _remove_leftovers(folder)
        for path in checkpoints_of(folder):
            if checkpoint is None or damage(path) is not None:
                shutil.rmtree(path)
        # A resumed run goes on as it was begun
        if checkpoint is None or checkpoint.absolute().parent != folder.absolute():
            write_json(folder / RUN_RECORD, record)
        yield folder
    finally:
        # What could not be written has the word, not the lock that stays behind
        with suppress(OSError):
            (folder / _LOCK).unlink()
        lock.release()


def _is_at_its_place(lock: BaseFileLock) -> bool:
    try:
        held, there = os.fstat(lock._context.lock_file_fd or 0), os.stat(lock.lock_file)
    except OSError:
        return False
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


def _remove_leftovers(folder: Path) -> None:
    """Remove scratch folders and files of writes that broke off."""
    for path in folder.glob(".saving-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.*"):
        if _SCRATCH.fullmatch(path.name):
            path.unlink(missing_ok=True)


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
        raise OSError(f"{folder} cannot be written to ({error}). Make room there. {_onward(folder)}") from error


@contextmanager
def lost_process_explained(folder: str | Path) -> Iterator[None]:
    """Turn what torch raises when another process of the run has ended into one error that says how to go on.

    Raises:
        ConnectionError: another process has ended; complete checkpoints are whole.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ not in _PROCESS_ERRORS and "/gloo/" not in str(error):
            raise
        raise ConnectionError(
            f"another process of this run has ended, so this one ends too; see what that one said. {_onward(folder)}"
        ) from error


def _onward(folder: str | Path) -> str:
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        return f"{checkpoint} is complete: continue with --resume_from_checkpoint last."
    return "No checkpoint is complete; start again with --overwrite_output_dir."
