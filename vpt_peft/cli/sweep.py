"""`vpt-peft sweep --learning_rate 1e-3 5e-3 --weight_decay 0 1e-2 [training flags]`."""

from __future__ import annotations

from collections.abc import Sequence

from .compare import run_comparison


def run(argv: Sequence[str]) -> int:
    """Search flags with several values, and print the trials, best first, and the test of the best."""
    return run_comparison(
        argv,
        "sweep",
        "Search settings on the validation split, train the best on training and validation images, and test it once. "
        "Numbers may be ranges too (--learning_rate 1e-4:1e-1 --sampler tpe).",
    )
