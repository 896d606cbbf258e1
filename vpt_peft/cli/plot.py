"""`vpt-peft plot FOLDER ... [--kind curves]`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from .options import need_training


def run(argv: Sequence[str]) -> int:
    """Draw runs to a picture and print its path."""
    need_training()
    parser = ArgumentParser(
        prog="vpt-peft plot",
        description="Draw the finished runs in output folders of train, compare or sweep; seeds are averaged.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", help="output folders")
    parser.add_argument(
        "--kind",
        choices=("curves", "tradeoff"),
        default="curves",
        help="loss and metric over epochs, or the metric against trainable parameters",
    )
    parser.add_argument("--output_file", help="picture to write, .png, .pdf or .svg; default: <kind>.png")
    own = parser.parse_args(list(argv))

    from ..plots import plot

    print(plot(own.folders, own.output_file or f"{own.kind}.png", own.kind))
    return 0
