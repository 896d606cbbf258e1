"""Trials as a table."""

from __future__ import annotations

from collections.abc import Sequence

from ..reporting import SPLITS, Shown, markdown_table, shown
from ..tasks import Task
from .trials import Trial


def trials_table(trials: Sequence[Trial], results: Sequence[str], task: Task) -> str:
    """Return trials as a markdown table: settings, number of runs, mean and deviation of results, what failed.

    Args:
        trials (`Sequence[Trial]`): the rows, in this order.
        results (`Sequence[str]`): names of results; those that no trial has are left out.
        task (`Task`): says how its metrics are shown.
    """
    columns = {name: column for name in results if (column := _column(name, trials, task)) is not None}
    failed = any(trial.errors for trial in trials)
    rows = [
        {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in trial.settings.items()}
        | {"runs": str(len(trial.metrics))}
        | {column.title: _cell(trial, name, column) for name, column in columns.items()}
        | ({"failed": _reasons(trial)} if failed else {})
        for trial in trials
    ]
    return markdown_table(rows, left=[*trials[0].settings, "failed"])


def _column(name: str, trials: Sequence[Trial], task: Task) -> Shown | None:
    values = [metrics[name] for trial in trials for metrics in trial.metrics if name in metrics]
    split, _, short = name.partition("_")
    metric = next((metric for metric in task.metrics if metric.name == short), None)
    if not values or metric is None or split not in SPLITS:
        return shown(name, values) if values else None
    return Shown(f"{SPLITS[split]} {metric.label}", metric.scale, 2 if metric.percent else 3)


def _cell(trial: Trial, name: str, column: Shown) -> str:
    mean, deviation = trial.mean(name), trial.deviation(name)
    if mean is None:
        return "-"
    # Every seed trains the same parameters
    if deviation is None or name == "trainable_parameters":
        return column.text(mean)
    return f"{column.text(mean)} ± {column.text(deviation)}"


def _reasons(trial: Trial) -> str:
    # The first sentence; the whole text is in the results file
    return "; ".join(f"seed {seed}: {error.split('. ')[0]}" for seed, error in trial.errors.items())
