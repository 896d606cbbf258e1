"""`vpt-peft compare --method vpt linear --dataset_name a b --seed 0 1 2 --num_trials 8 [training flags]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .options import hide_data_bars, need_training
from .train_help import HELP, short_help


VARIED = "Takes all flags of `vpt-peft train`; those with several values are varied."


def run(argv: Sequence[str]) -> int:
    """Search, train and test every row on every data set, and print tables of the results."""
    return run_comparison(
        argv,
        "compare",
        "Compare methods on the same data with the same seeds. With --num_trials each method's settings are searched "
        "on the validation split, with as many trials for all; what is chosen is trained on training and validation "
        "images and tested once per draw (--split_seed) and seed.",
    )


def run_comparison(argv: Sequence[str], command: str, description: str) -> int:
    """Run a comparison or a sweep, and print and draw its results; 2 where no run ended well."""
    prog = f"vpt-peft {command}"
    if HELP & set(argv):
        own = argparse.ArgumentParser(prog=prog, description=f"{description} {VARIED}", add_help=False)
        add_options(own, "grid" if command == "sweep" else "random")
        print(short_help(prog, argv, own), end="")
        return 0
    need_training()
    from accelerate import PartialState

    from ..runs.compare import comparison_of
    from ..runs.grid import make_parser, parse_grid
    from ..runs.report import report

    parser = make_parser(prog, f"{description} {VARIED}")
    add_options(parser, "grid" if command == "sweep" else "random")
    if "--help-all" in argv:
        parser.print_help()
        return 0
    grid = parse_grid(parser, argv)
    comparison = comparison_of(grid, searched=command == "sweep")
    hide_data_bars(*(flags["dataset_name"] for flags in comparison.data.values()))
    comparison.search()
    comparison.test()
    if not PartialState().is_main_process:
        return 0
    text, ended_well = report(comparison, searched=command == "sweep")
    sys.stdout.write(text)
    return 0 if ended_well else 2


def add_options(parser: argparse.ArgumentParser, sampler: str) -> None:
    """Add what a comparison takes beside the flags of its runs."""
    parser.add_argument(
        "--sampler",
        choices=("grid", "random", "tpe"),
        default=sampler,
        help="how settings are searched: all (grid), a quasi-random spread, or TPE of Optuna (default: %(default)s)",
    )
    parser.add_argument(
        "--num_trials", "--num_settings", type=int, help="trials of each search; default: the whole grid, or 20"
    )
    parser.add_argument(
        "--storage",
        help="Optuna journal that several processes share, each started with the same command; default: a file in "
        "output_dir, which they share too",
    )
    parser.add_argument(
        "--suite",
        help="all data sets of a benchmark (vtab-1k, fgvc), by its own protocol, in place of dataset_name",
    )
    parser.add_argument(
        "--suite_dir", help="its folder, with one folder per data set; default: downloaded, if possible"
    )
