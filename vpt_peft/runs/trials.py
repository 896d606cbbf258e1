"""One training run of a comparison: done once, resumed where it was interrupted, and kept as JSON."""

from __future__ import annotations

import gc
import io
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data.images import DataError
from ..files import RUN_RECORD
from ..training.arguments import Arguments
from ..training.resume import last_checkpoint
from ..training.train import train
from ..training.trainer import TrainingDiverged
from .results import Memory, Place, make_result, measure_memory, read_result, result_path, write_result


def run_once(arguments: Arguments, place: Place, results_dir: Path, with_test: bool) -> dict[str, Any]:
    """Train into the arguments' folder unless that was done, and return the result; see `make_result`.

    A failure is kept as a result where the settings are to blame: a loss that is not finite, a value that does not fit
    the model, too little memory. What would stop any run (data, files, network) is raised.

    Args:
        arguments: of the run.
        place: where it belongs.
        results_dir: where results are kept.
        with_test: evaluate on the test split; without, weights and checkpoints are removed when the score is known.

    Raises:
        FileExistsError: the folder holds a run with other arguments.
        OSError, DataError: as of `train`.
    """
    folder, path = Path(arguments.training.output_dir or "."), result_path(results_dir, place)
    record = json.loads(json.dumps(arguments.record()))
    state = PartialState()
    kept = read_result(path)
    checkpoint = last_checkpoint(folder)
    state.wait_for_everyone()
    if kept is not None:
        _check_same(path, kept["run_info"]["train_config"], record)
        return kept
    if checkpoint is None:
        arguments.training.overwrite_output_dir = True
    else:
        _check_same(folder, json.loads((folder / RUN_RECORD).read_text(encoding="utf-8")), record)
        arguments.training.resume_from_checkpoint = "last"
    metrics: dict[str, float] = {}
    failure, started, memory = None, time.monotonic(), Memory()
    try:
        # The Trainer prints its log, which the result holds
        with measure_memory() as memory, redirect_stdout(io.StringIO()), _only_warnings():
            metrics = train(arguments, with_test)
    except DataError:
        raise
    except (TrainingDiverged, ValueError, torch.OutOfMemoryError) as error:
        failure = " ".join(str(error).split())
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    result = make_result(place, record, metrics, failure, time.monotonic() - started, memory, folder)
    if state.is_main_process:
        write_result(path, result)
        if not with_test:
            _remove_weights(folder)
    state.wait_for_everyone()
    return result


@contextmanager
def _only_warnings() -> Iterator[None]:
    """Leave out what a run tells of itself, as it would be much the same in every run."""
    logger = logging.getLogger(__package__.partition(".")[0])
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _remove_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def _check_same(where: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(kept.keys() | wanted.keys()):
        if kept.get(name) != wanted.get(name):
            raise FileExistsError(
                f"{where} holds a run with {name}={kept.get(name)!r}, not {wanted.get(name)!r}; give another "
                "output_dir, or delete that file or folder to repeat the run."
            )
