"""`vpt-peft train [file.json | file.yaml] [flags]`."""

from __future__ import annotations

import logging
import sys
import textwrap
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import hide_data_bars, need_training
from .train_help import HELP, short_help


if TYPE_CHECKING:
    from ..training.arguments import Arguments

logger = logging.getLogger(__name__)
PROG = "vpt-peft train"


def run(argv: Sequence[str]) -> int:
    """Train, print the results, and push the folder if that was asked for."""
    if HELP & set(argv):
        print(short_help(PROG, argv), end="")
        return 0
    need_training()
    from ..tasks import get_task
    from ..training.arguments import parse_args, train_parser, write_arguments
    from ..training.output import lost_process_explained
    from ..training.train import train

    if "--help-all" in argv:
        train_parser(PROG).print_help()
        return 0
    parser = ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--write_config")
    own, rest = parser.parse_known_args(list(argv))
    arguments = parse_args(rest, find_task=True)
    training = arguments.training
    if own.write_config is not None:
        print(write_arguments(arguments, Path(own.write_config)))
        return 0
    if training.process_index == 0:
        logger.info(describe(arguments))
    hide_data_bars(arguments.data.dataset_name)
    if "disable_tqdm" not in arguments.given:
        training.disable_tqdm = not sys.stderr.isatty()
    with lost_process_explained(training.output_dir or "."):
        metrics = train(arguments)
    if training.process_index != 0:
        return 0
    task = get_task(arguments.model.task)
    best = next(metric for metric in task.metrics if metric.name == task.best_metric)
    results = [
        f"{title} {best.title.lower()} {metrics[name]:.4f}"
        for title, name in (("validation", f"eval_{best.name}"), ("test", f"test_{best.name}"))
        if name in metrics
    ]
    print(f"{', '.join(results)}; trained in {metrics['train_runtime']:.1f} s; saved in {training.output_dir}")
    if training.push_to_hub:
        from ..hub import push_adapter

        folder = Path(training.output_dir or ".")
        private, token = bool(training.hub_private_repo), training.hub_token
        print(
            push_adapter(folder, training.hub_model_id or folder.resolve().name, token, private, training.hub_revision)
        )
    return 0


def describe(arguments: Arguments) -> str:
    """Return what a run is made of, given and filled in by the recipe, as one block."""
    values = arguments.resolved()
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    return textwrap.fill(f"Settings: {text}.", 110, subsequent_indent="  ", break_on_hyphens=False)
