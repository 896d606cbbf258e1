"""Trials as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..reporting import Shown, markdown_table, metric_names, shown
from .trials import Trial


def trials_table(trials: Sequence[Trial], results: Sequence[str]) -> str:
    """Return trials as a markdown table: settings, number of runs, mean and deviation of results, what failed.

    Args:
        trials (`Sequence[Trial]`): the rows, in this order.
        results (`Sequence[str]`): names of results; those that no trial has are left out.
    """
    columns = {}
    for name in results:
        values = [metrics[name] for trial in trials for metrics in trial.metrics if name in metrics]
        if values:
            columns[name] = shown(name, values)
    failed = any(trial.errors for trial in trials)
    rows = [
        {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in trial.settings.items()}
        | {"runs": str(len(trial.metrics))}
        | {column.title: _cell(trial, name, column) for name, column in columns.items()}
        | ({"failed": _reasons(trial)} if failed else {})
        for trial in trials
    ]
    return markdown_table(rows, left=[*trials[0].settings, "failed"])


def tested_metrics(trials: Sequence[Trial]) -> list[str]:
    """Return the names of the test metrics that the trials have."""
    everything: dict[str, Any] = {
        name: value for trial in trials for run in trial.metrics for name, value in run.items()
    }
    return [f"test_{name}" for name in metric_names(everything, "test")]


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
