"""Several trainings below one folder: each is kept when it ends, gone on with where it broke off, and told in a table."""

from __future__ import annotations

import gc
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data.images import DataError
from ..files import write_json
from .arguments import Arguments, parse_args
from .grid import Grid, describe, folder_name
from .output import last_checkpoint
from .train import train
from .trainer import TrainingDiverged


logger = logging.getLogger(__name__)

# The outcome of one run, in its folder; written when all else is there
RUN_RESULT = "run_result.json"


@dataclass
class Setting:
    """One row of the table: settings and what every seed gave.

    Args:
        settings (`dict[str, Any]`): values of the varied flags.
        folders (`list[str]`): of the runs that ended well, one per seed.
        metrics (`list[dict]`): of the same runs.
        errors (`dict[str, str]`): why the other seeds' runs ended, by seed.
    """

    settings: dict[str, Any]
    folders: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """Mean over seeds of a metric, or None where no run has it."""
        values = self._values(name)
        return statistics.fmean(values) if values else None

    def deviation(self, name: str) -> float | None:
        """Sample standard deviation over seeds, or None for fewer than two runs."""
        values = self._values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.metrics if name in metrics]

    def row(self) -> dict[str, Any]:
        """The setting as JSON, with mean and deviation of every metric."""
        names = sorted({name for metrics in self.metrics for name in metrics})
        means = {name: {"mean": self.mean(name), "std": self.deviation(name)} for name in names}
        return {**asdict(self), "summary": means}


def parse_cell(grid: Grid, settings: Mapping[str, Any], seed: int) -> Arguments:
    """Arguments of one run in its own folder below the common output_dir.

    Raises:
        ValueError: the values do not go together.
    """
    name = folder_name({**settings, "seed": seed} if len(grid.seeds) > 1 or not settings else settings)
    output_dir = str(grid.output_dir / name)
    return parse_args({**grid.common, **settings, "seed": seed, "output_dir": output_dir})


def run_setting(grid: Grid, settings: Mapping[str, Any], with_test: bool) -> Setting:
    """Run one setting with every seed."""
    outcome = Setting(dict(settings))
    for seed in grid.seeds:
        logger.info("Run: %s, seed=%d.", describe(settings), seed)
        arguments = parse_cell(grid, settings, seed)
        try:
            result = run_once(arguments, with_test)
        except KeyboardInterrupt:
            logger.warning("What has ended is kept in %s; the same command goes on.", grid.output_dir)
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

    A loss that is not finite, settings that do not fit the model and too little memory are told in "error"; what
    stands in the way of any run (data, files, network) is raised.

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
        _check_same(folder, json.loads((folder / "training_config.json").read_text(encoding="utf-8")), record)
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
    """What `run_once` wrote, or None where the run has not ended."""
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
    """Make sure that the common output_dir is empty or one of the same command's, and return its results file.

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


def write_results(path: Path, rows: Sequence[Setting], **more: Any) -> None:
    """Write the rows so far, whole or not at all; a NaN would not be JSON, and does not occur."""
    if PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**more, "rows": [row.row() for row in rows]})


def as_table(rows: Sequence[Setting], columns: Mapping[str, str]) -> str:
    """Rows as a markdown table: the settings, number of runs, mean and deviation of each metric, what failed.

    Args:
        rows: to be shown, in this order.
        columns: titles by the names of metrics; those with "accuracy" or "f1" in them are shown in percent.
    """
    shown = {name: title for name, title in columns.items() if any(row.mean(name) is not None for row in rows)}
    axes = list(rows[0].settings)
    failed = any(row.errors for row in rows)
    header = [*axes, "runs", *shown.values(), *(["failed"] if failed else [])]
    cells = [
        [
            *(_value(row.settings[name]) for name in axes),
            str(len(row.metrics)),
            *(_cell(row, name) for name in shown),
            *([_reasons(row)] if failed else []),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *cells)
    ]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"


def _reasons(row: Setting) -> str:
    # The first sentence; the whole text is in the results file
    return "; ".join(f"seed {seed}: {error.split('. ')[0]}" for seed, error in row.errors.items())


def _cell(row: Setting, name: str) -> str:
    mean, deviation = row.mean(name), row.deviation(name)
    if mean is None or not math.isfinite(mean):
        return "-"
    if name == "trainable_parameters":
        return f"{mean:,.0f}"
    scale, digits = (100, 2) if "accuracy" in name or "f1" in name else (1, 3 if "loss" in name else 1)
    text = f"{scale * mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {scale * deviation:.{digits}f}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
