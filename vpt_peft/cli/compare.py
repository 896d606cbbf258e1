"""`vpt-peft compare --method vpt linear --seed 0 1 2 [training flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Print the table of all trials, mean and sample standard deviation over the seeds."""
    need_training()
    from accelerate import PartialState

    from ..runs.compare import compare
    from ..runs.grid import make_parser, parse_grid
    from ..runs.table import trials_table

    parser = make_parser("vpt-peft compare", "Train methods or settings on the same data with the same seeds.")
    grid = parse_grid(parser, argv)
    trials, metric = compare(grid)
    if PartialState().is_main_process:
        tested = [f"test_{each.name}" for each in grid.task.metrics]
        results = [metric, *tested, "trainable_parameters", "train_runtime"]
        sys.stdout.write(trials_table(trials, results, grid.task))
    return 0 if any(trial.metrics for trial in trials) else 2
