"""`vpt-peft demo [--output_dir out/demo]`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Train on the embedded backbones and digits, print the table and say where things are."""
    parser = argparse.ArgumentParser(
        prog="vpt-peft demo",
        description="Fine-tune the embedded backbones on handwritten digits, offline: a linear probe against prompts.",
    )
    parser.add_argument("--output_dir", default="out/demo", help="gets adapters, table and picture")
    parser.add_argument("--num_train_epochs", type=float, default=None, help="epochs per row (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=42, help="of initial values and the order of images")
    own = parser.parse_args(list(argv))
    from ..training.demo import as_markdown, run_demo

    start = time.perf_counter()
    rows = run_demo(own.output_dir, own.num_train_epochs, own.seed)
    folder = Path(own.output_dir)
    print(f"\n{as_markdown(rows)}")
    print(f"Took {time.perf_counter() - start:.0f} s. The picture is {folder / 'demo.png'}.")
    print(f"The VPT-deep adapter is in {folder / 'embedded-vpt'}; loaded again, it gave the same accuracy.")
    return 0
