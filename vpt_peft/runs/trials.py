"""Trials and their training runs below one folder: each run is kept when it ends, and resumed where it was interrupted."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data.images import DataError
from ..files import RUN_RECORD, write_json
from ..reporting import describe
from ..training.arguments import Arguments, parse_args
from ..training.output import last_checkpoint
from ..training.train import train
from ..training.trainer import TrainingDiverged
from .grid import Grid, folder_name


logger = logging.getLogger(__name__)

# The outcome of one run, in its folder; written when all else is there
RUN_RESULT = "run_result.json"


@dataclass
class Trial:
    """Settings, and what the run of every seed gave.

    Args:
        settings (`dict[str, Any]`): values of the varied flags.
        folders (`list[str]`): of the runs that ended well, one per seed.
        metrics (`list[dict[str, float]]`): of the same runs.
        errors (`dict[str, str]`): why the other runs failed, by seed.
    """

    settings: dict[str, Any]
    folders: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric over seeds, or None where no run has it."""
        return self.summary().get(name, {}).get("mean")

    def deviation(self, name: str) -> float | None:
        """Return the sample standard deviation of a metric over seeds, or None for fewer than two runs."""
        return self.summary().get(name, {}).get("std")

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Return mean and sample standard deviation of every metric, by its name."""
        import pandas

        found = pandas.DataFrame(self.metrics).agg(["mean", "std"]).to_dict() if self.metrics else {}
        return {
            name: {kind: None if pandas.isna(value) else value for kind, value in both.items()}
            for name, both in sorted(found.items())
        }

    def row(self) -> dict[str, Any]:
        """Return the trial as JSON, with the summary of its metrics."""
        return {**asdict(self), "summary": self.summary()}


def parse_run(grid: Grid, settings: Mapping[str, Any], seed: int) -> Arguments:
    """Return the arguments of one run, which has its own folder below the common output_dir.

    Raises:
        ValueError: the values do not go together.
    """
    name = folder_name({**settings, "seed": seed} if len(grid.seeds) > 1 or not settings else settings)
    output_dir = str(grid.output_dir / name)
    return parse_args({**grid.common, **settings, "seed": seed, "output_dir": output_dir})


def run_trial(grid: Grid, settings: Mapping[str, Any], with_test: bool) -> Trial:
    """Run one trial with every seed."""
    outcome = Trial(dict(settings))
    for seed in grid.seeds:
        logger.info("Run: %s, seed=%d.", describe(settings), seed)
        arguments = parse_run(grid, settings, seed)
        try:
            result = run_once(arguments, with_test)
        except KeyboardInterrupt:
            logger.warning("Finished runs are kept in %s; the same command continues.", grid.output_dir)
            raise
        if result["error"] is None:
            outcome.folders.append(str(arguments.training.output_dir))
            outcome.metrics.append(result["metrics"])
        else:
            outcome.errors[str(seed)] = result["error"]
            logger.warning("%s, seed=%d failed: %s", describe(settings), seed, result["error"])
    return outcome


def run_once(arguments: Arguments, with_test: bool = True) -> dict[str, Any]:
    """Train into the arguments' folder unless that was done, and return {"record", "metrics", "error"}.

    "error" holds why a run failed for its settings: a loss that is not finite, a value that does not fit the model,
    too little memory. What would stop any run (data, files, network) is raised.

    Raises:
        FileExistsError: the folder holds a run with other arguments.
        OSError, DataError: as of `train`.
    """
    folder = Path(arguments.training.output_dir or ".")
    record = json.loads(json.dumps(arguments.record()))
    state = PartialState()
    kept = read_result(folder)
    checkpoint = last_checkpoint(folder)
    state.wait_for_everyone()
    if kept is not None:
        _check_same(folder, kept["record"], record)
        return kept
    if checkpoint is None:
        arguments.training.overwrite_output_dir = True
    else:
        _check_same(folder, json.loads((folder / RUN_RECORD).read_text(encoding="utf-8")), record)
        arguments.training.resume_from_checkpoint = "last"
    metrics, failure = {}, None
    try:
        metrics = train(arguments, with_test)
    except DataError:
        raise
    except (TrainingDiverged, ValueError, torch.OutOfMemoryError) as error:
        failure = " ".join(str(error).split())
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    result = {"record": record, "metrics": metrics, "error": failure}
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_RESULT, result)
    state.wait_for_everyone()
    return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what `run_once` wrote, or None where the run has not ended."""
    try:
        return json.loads((folder / RUN_RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _check_same(folder: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(kept.keys() | wanted.keys()):
        if kept.get(name) != wanted.get(name):
            raise FileExistsError(
                f"{folder} holds a run with {name}={kept.get(name)!r}, not {wanted.get(name)!r}; give another "
                "output_dir, or delete that folder to repeat the run."
            )


def claim_folder(grid: Grid, results_name: str) -> Path:
    """Check that the common output_dir is empty or belongs to the same command, and return its results file.

    Raises:
        FileExistsError: it holds other files.
        NotADirectoryError: it is a file.
    """
    folder = grid.output_dir
    path = folder / results_name
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir={str(folder)!r} is a file; give a folder.")
    if folder.is_dir() and not path.is_file() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds files but no {results_name}; give an empty or another folder."
        )
    return path


def write_results(path: Path, rows: Sequence[Trial], **more: Any) -> None:
    """Write the trials that have ended, whole or not at all."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**more, "rows": [row.row() for row in rows]})
