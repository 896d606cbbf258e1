"""`vpt-peft demo [--output_dir out/demo]`."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Train on the embedded backbones and digits, print the table and say where things are."""
    parser = argparse.ArgumentParser(
        prog="vpt-peft demo",
        description="Fine-tune the embedded backbones on handwritten digits, offline: prompts between a linear probe and "
        "full fine-tuning.",
    )
    parser.add_argument("--output_dir", default="out/demo", help="gets adapters, table and picture")
    parser.add_argument("--num_train_epochs", type=float, help="epochs of every row, instead of its own")
    parser.add_argument("--seed", type=int, default=0, help="of initial values and the order of images")
    options = parser.parse_args(list(argv))
    from transformers.utils import logging as transformers_logging

    from .demo_runs import SHOWN, as_markdown, run_demo, summary

    # Many runs: one line and one bar each, not what a single run tells
    logging.getLogger("vpt_peft").setLevel(logging.WARNING)
    logging.getLogger("vpt_peft.cli.demo_runs").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)

    start = time.perf_counter()
    epochs = options.num_train_epochs
    rows = run_demo(options.output_dir, options.seed, {} if epochs is None else {"num_train_epochs": epochs})
    folder = Path(options.output_dir)
    print(f"\n{as_markdown(rows)}\n{summary(rows)}")
    print(f"Took {time.perf_counter() - start:.0f} s. The picture is {folder / 'demo.png'}.")
    print(f"The VPT-deep adapter is in {folder / SHOWN.folder}; loaded again, it scored the same.")
    return 0
