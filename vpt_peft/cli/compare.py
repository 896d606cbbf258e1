"""`vpt-peft compare --method vpt linear --seed 0 1 2 [training flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .options import need_training


COLUMNS = {
    "eval_accuracy": "validation accuracy (%)",
    "test_accuracy": "test accuracy (%)",
    "test_macro_f1": "test macro-F1 (%)",
    "trainable_parameters": "trained values",
    "train_runtime": "seconds",
}


def run(argv: Sequence[str]) -> int:
    """Print the table of all settings, mean and sample standard deviation over the seeds."""
    need_training()
    from accelerate import PartialState

    from ..training.compare import compare
    from ..training.grid import make_parser, parse_grid
    from ..training.runs import as_table

    parser = make_parser("vpt-peft compare", "Train methods or settings on the same data with the same seeds.")
    rows = compare(parse_grid(parser, argv))
    if PartialState().is_main_process:
        sys.stdout.write(as_table(rows, COLUMNS))
    return 0 if any(row.metrics for row in rows) else 2
