"""Finished runs, read from their output folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import RUN_RECORD
from ..reporting import describe, metric_names
from ..reporting.results import RESULTS


# Where and how a run was done, not what was tried
_DATA = "dataset_name"
_NOT_SHOWN = ("seed", "run_name", "disable_tqdm", "report_to", "feature_cache_dir", "logging_dir")


@dataclass(frozen=True)
class Run:
    """A finished run as its folder tells it.

    Args:
        folder (`Path`): its output folder.
        record (`dict[str, Any]`): its arguments.
        metrics (`dict[str, float]`): the final results.
        history (`list[dict[str, float]]`): the Trainer's log.
        label (`tuple[str, str]`, *optional*): row and data set of a comparison.
    """

    folder: Path
    record: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, float]]
    label: tuple[str, str] | None = None

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.record.get("method", "vpt"))

    @property
    def metric(self) -> str:
        """The metric by which the run chose its best weights; where that is the loss, the first that was measured.

        Raises:
            ValueError: the run measured nothing but its loss.
        """
        names = metric_names(self.metrics, "eval")
        if not names:
            raise ValueError(f"{self.folder / 'all_results.json'} holds no validation metric; repeat the run.")
        chosen = str(self.record.get("metric_for_best_model")).removeprefix("eval_")
        return chosen if chosen in names else names[0]

    def curve(self, key: str) -> dict[float, float]:
        """Return the values of a log entry by epoch; the first counts, as the last evaluation is of the best epoch."""
        values: dict[float, float] = {}
        for entry in self.history:
            if key in entry:
                values.setdefault(entry["epoch"], entry[key])
        return values


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Return the finished runs in output folders of `train`, and the tested ones below those of `compare` and `sweep`.

    Raises:
        FileNotFoundError: a folder does not exist, or none holds a finished run.
        ValueError: a result file cannot be read.
    """
    folders, runs = [Path(path) for path in paths], []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{str(folder)!r} does not exist; give output folders of training runs.")
        for config in sorted(folder.rglob(RUN_RECORD)):
            names = (RUN_RECORD, "all_results.json", "trainer_state.json")
            label = _label(config.parent)
            if all((config.parent / name).is_file() for name in names) and (label is None or label[2] == "test"):
                record, metrics, state = (_read(config.parent / name) for name in names)
                runs.append(Run(config.parent, record, metrics, state.get("log_history", []), label and label[:2]))
    if not runs:
        raise FileNotFoundError(
            f"no finished run in {', '.join(map(str, folders))}; its folder would hold {RUN_RECORD}, all_results.json "
            "and trainer_state.json."
        )
    return runs


def _label(folder: Path) -> tuple[str, str, str] | None:
    """Row, data set and stage of a run of a comparison, whose results lie beside its runs."""
    above = folder.absolute().parents
    if len(above) < 4 or not (above[3].parent / RESULTS).is_dir():
        return None
    return above[2].name, above[1].name, above[0].name


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repeat the run.") from error


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return runs that differ in nothing but the seed, by their method and the settings that vary.

    Runs of a comparison are grouped by its rows and data sets, as their settings were chosen for each.
    """
    groups: dict[str, list[Run]] = {}
    several = len({run.label[1] for run in runs if run.label is not None}) > 1
    for run in runs:
        if run.label is not None:
            groups.setdefault(" on ".join(run.label) if several else run.label[0], []).append(run)
            continue
        alike = [other.record for other in runs if other.method == run.method]
        names = sorted({name for record in alike for name in record} - {*_NOT_SHOWN, "method"})
        varied = [name for name in names if any(record.get(name) != alike[0].get(name) for record in alike)]
        values = {name: run.record.get(name, "default") for name in varied}
        title = f"{run.method} on {values.pop(_DATA)}" if _DATA in values else run.method
        groups.setdefault(f"{title} ({describe(values)})" if values else title, []).append(run)
    return groups
