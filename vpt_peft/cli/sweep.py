"""`vpt-peft sweep --learning_rate 1e-3 5e-3 --weight_decay 0 1e-2 [training flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Print the trials, best first, and the test results of the best."""
    need_training()
    from accelerate import PartialState

    from ..reporting import describe
    from ..runs.grid import make_parser, parse_grid
    from ..runs.study import SAMPLERS
    from ..runs.sweep import sweep
    from ..runs.table import trials_table

    parser = make_parser(
        "vpt-peft sweep",
        "Search settings on the validation split and test the best of them once. Numbers may be ranges too "
        "(--learning_rate 1e-4:1e-1 --sampler tpe).",
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="grid",
        help="all settings, or a random or TPE search by Optuna (default: %(default)s)",
    )
    parser.add_argument("--num_settings", type=int, help="most settings to try; default: all, or 20 when searching")
    grid = parse_grid(parser, argv)
    trials, best, score = sweep(grid, grid.own["sampler"], grid.own["num_settings"])
    if PartialState().is_main_process:
        sys.stdout.write(trials_table(trials, [score, "eval_loss", "train_runtime"], grid.task))
        if best is not None:
            test = trials_table([best], [f"test_{each.name}" for each in grid.task.metrics], grid.task)
            sys.stdout.write(f"\nBest: {describe(best.settings)}; saved in {', '.join(best.folders)}\n\n{test}")
    return 0 if best is not None else 2
