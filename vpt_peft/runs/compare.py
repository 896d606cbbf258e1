"""Train several methods (or settings) on the same data with the same seeds, and test them all."""

from __future__ import annotations

from typing import Any

from .grid import Grid
from .study import import_optuna, run_study
from .trials import Trial, claim_folder, parse_run, run_trial, write_results


COMPARE_RESULTS = "compare_results.json"


def compare(grid: Grid) -> tuple[list[Trial], str]:
    """Run every trial of the grid with every seed.

    Finished runs are kept in their folders, so the same call continues a comparison that was interrupted.
    `compare_results.json` is written after each trial.

    Returns:
        The trials in the order of the grid, and the validation metric by which runs keep their best weights.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
        ValueError: a trial is wrong in itself; nothing was run.
    """
    import_optuna()
    order = grid.trials()
    training, *_ = [parse_run(grid, settings, grid.seeds[0]).training for settings in order]
    metric = f"eval_{str(training.metric_for_best_model).removeprefix('eval_')}"
    path = claim_folder(grid, COMPARE_RESULTS)
    done: dict[int, Trial] = {}

    def in_order() -> list[Trial]:
        return [done[number] for number in sorted(done)]

    def run(settings: dict[str, Any]) -> Trial:
        trial = done[order.index(settings)] = run_trial(grid, settings, with_test=True)
        write_results(path, in_order())
        return trial

    write_results(path, [])
    run_study(grid, run, metric, bool(training.greater_is_better))
    return in_order(), metric
