"""`vpt-peft sweep --learning_rate 1e-3 5e-3 --weight_decay 0 1e-2 [training flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Print the settings, best first, and the best one's test results."""
    need_training()
    from accelerate import PartialState

    from ..training.grid import describe, make_parser, parse_grid
    from ..training.runs import as_table
    from ..training.sweep import SAMPLERS, sweep

    parser = make_parser(
        "vpt-peft sweep",
        "Search settings by the validation split; the test split is looked at once, with the best. Numbers may be "
        "ranges too (--learning_rate 1e-4:1e-1 --sampler tpe).",
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="grid",
        help="all settings, or Optuna's choice of them (default: %(default)s)",
    )
    parser.add_argument("--num_settings", type=int, help="most settings to try; default: all, or 20 when sampling")
    grid = parse_grid(parser, argv)
    rows, best = sweep(grid, grid.own["sampler"], grid.own["num_settings"])
    if PartialState().is_main_process:
        columns = {
            "eval_accuracy": "validation accuracy (%)",
            "eval_loss": "validation loss",
            "train_runtime": "seconds",
        }
        sys.stdout.write(as_table(rows, columns))
        if best is not None:
            test = as_table([best], {"test_accuracy": "test accuracy (%)", "test_macro_f1": "test macro-F1 (%)"})
            sys.stdout.write(f"\nBest: {describe(best.settings)}; saved in {', '.join(best.folders)}\n\n{test}")
    return 0 if best is not None else 2
