"""Going on from a checkpoint: which ones are whole, and whether the run is the one that they are of."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..files import RUN_RECORD
from .arguments import VPTTrainingArguments
from .checkpoints import BASELINE_WEIGHTS


logger = logging.getLogger(__name__)

AUTO = "auto"
_NEWEST = ("true", "last", AUTO)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", BASELINE_WEIGHTS)
# Where and how a run is shown, stored and fed, not what it computes
_MAY_DIFFER = {
    "cache_dir",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "feature_cache_dir",
    "feature_cache_limit_gb",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "log_level",
    "log_level_replica",
    "logging_dir",
    "per_device_eval_batch_size",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
    "save_total_limit",
    "torch_empty_cache_steps",
    "trackio_space_id",
}
# Together with the number of processes these give the images of a step
_PER_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


def checkpoints_of(folder: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, the newest first."""
    found = [(int(match.group(1)), path) for path in Path(folder).glob("checkpoint-*")
             if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()]  # fmt: skip
    return [path for _, path in sorted(found, reverse=True)]


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    return next((path for path in checkpoints_of(folder) if damage(path) is None), None)


def damage(checkpoint: Path) -> str | None:
    """Return what a checkpoint lacks to continue its run as if nothing had happened, or None where it is whole.

    transformers itself would go on without a file that is missing, with other weights in the end.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if not isinstance(state["global_step"], int):
            return "trainer_state.json has no step"
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is missing or damaged"
    parts = [
        [checkpoint / "scheduler.pt"],
        _random_states(checkpoint),
    ]
    # Sharded weights and optimizer states have folders of their own
    if not any(checkpoint.glob("*_0/")):
        weights = [checkpoint / name for name in _WEIGHTS if (checkpoint / name).exists()]
        parts += [weights or [checkpoint / _WEIGHTS[0]], [_optimizer(checkpoint)]]
    for path in (path for group in parts for path in group):
        if path.suffix == ".safetensors":
            is_whole = _is_whole_safetensors(path)
        else:
            is_whole = path.is_file() and zipfile.is_zipfile(path)
        if not is_whole:
            return f"{path.name} is {'damaged' if path.exists() else 'missing'}"
    return None


def _random_states(checkpoint: Path) -> list[Path]:
    """The files of all processes that wrote a checkpoint; one that is missing among them is named too."""
    numbers = [int(path.stem.rpartition("_")[2]) for path in checkpoint.glob("rng_state_*.pth")]
    if not numbers:
        return [checkpoint / "rng_state.pth"]
    # A process alone would have written one without a number
    return [checkpoint / f"rng_state_{number}.pth" for number in range(max(2, max(numbers) + 1))]


def _optimizer(checkpoint: Path) -> Path:
    other = checkpoint / "optimizer.bin"
    return other if other.exists() else checkpoint / "optimizer.pt"


def _is_whole_safetensors(path: Path) -> bool:
    try:
        # The size of the file is compared with what its header promises
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def find_resume_point(
    folder: Path, wanted: str, record: Mapping[str, Any], training: VPTTrainingArguments
) -> Path | None:
    """Return the checkpoint to resume from; None for "auto" where a run has not come to one.

    Args:
        folder: the output folder.
        wanted: a checkpoint folder; "true" or "last" for the newest whole one; "auto" likewise, or start.
        record: the arguments of this run.
        training: among them, how many images a step has.

    Raises:
        FileNotFoundError: there is no such checkpoint, or none that is whole.
        ValueError: the checkpoint is damaged, or of a run with other arguments.
    """
    if wanted.lower() not in _NEWEST:
        checkpoint = Path(wanted)
        if not (checkpoint / "trainer_state.json").is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint={wanted!r} is not a complete checkpoint (no trainer_state.json); give a "
                "checkpoint-* folder, or 'last' for the newest one in output_dir."
            )
        found = damage(checkpoint)
        if found:
            raise ValueError(f"resume_from_checkpoint={wanted!r} is damaged: {found}. Give an earlier one, or 'last'.")
        _check_same_run(checkpoint, record, training)
        return checkpoint
    for checkpoint in checkpoints_of(folder):
        found = damage(checkpoint)
        if found is None:
            _check_same_run(checkpoint, record, training)
            return checkpoint
        logger.warning("%s cannot be resumed from (%s); the one before is used.", checkpoint, found)
    if wanted.lower() == AUTO:
        return None
    raise FileNotFoundError(
        f"output_dir={str(folder)!r} holds no complete checkpoint; leave out resume_from_checkpoint to start, or give "
        "'auto', which does so by itself."
    )


def _check_same_run(checkpoint: Path, record: Mapping[str, Any], training: VPTTrainingArguments) -> None:
    """Check that a checkpoint is of a run with the same arguments.

    Raises:
        ValueError: it is not, or nobody knows; the message says what differs.
    """
    path = checkpoint.absolute().parent / RUN_RECORD
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} cannot be resumed: {path} is missing or damaged, so it is not known what run it is of."
        ) from error
    differing = {
        name for name in {*before, *record} - _MAY_DIFFER if _plain(before.get(name)) != _plain(record.get(name))
    }
    processes, images = len(_random_states(checkpoint)), _images_per_step(before, checkpoint)
    if images == training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size:
        # The same run on another number of processes
        differing -= set(_PER_STEP)
        if processes != training.world_size and not differing:
            logger.warning(
                "%s is of a run on %d processes; on %d, dropout draws other numbers.",
                checkpoint,
                processes,
                training.world_size,
            )
    elif processes != training.world_size and not differing:
        raise ValueError(
            f"{checkpoint} is of a run on {processes} processes with {images} images per step, and this one has "
            f"{training.world_size}; give per_device_train_batch_size and gradient_accumulation_steps so that their "
            f"product is {images / training.world_size:g}, or start as many processes as before."
        )
    if differing:
        shown = "; ".join(f"{n} was {before.get(n)!r} and is {record.get(n)!r}" for n in sorted(differing))
        raise ValueError(
            f"{checkpoint} is of a run with other arguments ({shown}). Resume with those of {path}, or start a new run "
            "in another output_dir."
        )


def _plain(value: Any) -> Any:
    """A value as JSON gives it back, with paths as they are written and numbers as numbers."""
    return json.loads(json.dumps(value, default=str))


def _images_per_step(before: Mapping[str, Any], checkpoint: Path) -> int:
    batch, accumulated = (int(before.get(name) or default) for name, default in zip(_PER_STEP, (8, 1), strict=True))
    return batch * accumulated * len(_random_states(checkpoint))
