"""Tasks made of scikit-learn's handwritten digits that frozen features may not separate, tried for the demonstration.

    python scripts/demo_tasks.py --output_dir out/demo-tasks

Writes each task as a data set that `vpt-peft train --dataset_name` reads, fits a linear probe and trains all weights on
it, and prints the validation accuracy of both. Test images are made and never looked at here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas
from PIL import Image
from transformers import HfArgumentParser

from vpt_peft.data.digits import Digits, count, make_task
from vpt_peft.training.arguments import parse_args
from vpt_peft.training.train import train


FLAGS: dict[str, dict[str, float]] = {
    "linear": {},
    "full": {"num_train_epochs": 10, "learning_rate": 3e-4, "head_learning_rate": 1e-3},
}


@dataclass
class Arguments:
    """What is tried."""

    output_dir: str = field(default="out/demo-tasks", metadata={"help": "Gets data sets, runs and results."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Any of the tasks."})
    model_name_or_path: str = field(default="embedded", metadata={"help": "The backbone."})
    seed: int = field(default=0, metadata={"help": "Of initial values and the order of images."})


def turned(digits: Digits) -> tuple[Image.Image, str]:
    """How far a digit is turned, in eighths of a full turn; digits that look alike when turned are left out."""
    image, _ = digits.draw((2, 3, 4, 5, 7))
    eighths = int(digits.rng.integers(8))
    upright = digits.paste((image.resize((20, 20), Image.Resampling.BICUBIC), 6, 6))
    return upright.rotate(45 * eighths, Image.Resampling.BICUBIC), f"{45 * eighths:03} degrees"


def place(digits: Digits) -> tuple[Image.Image, str]:
    """In which of 16 cells a digit stands."""
    image, _ = digits.draw()
    row, column = (int(value) for value in digits.rng.integers(4, size=2))
    return digits.paste((image, 8 * column, 8 * row)), f"row {row + 1}, column {column + 1}"


def larger(digits: Digits) -> tuple[Image.Image, str]:
    """Which of two different digits has the larger value."""
    (left, first), (right, second) = digits.draw(), digits.draw()
    while first == second:
        right, second = digits.draw()
    pieces = [(image.resize((14, 14), Image.Resampling.BICUBIC), x, 9) for image, x in ((left, 1), (right, 17))]
    return digits.paste(*pieces), "left" if first > second else "right"


def apart(digits: Digits) -> tuple[Image.Image, str]:
    """How many rows and columns lie between two digits in all, in four ranges of about equal size."""
    first, second = (int(cell) for cell in digits.rng.choice(16, 2, replace=False))
    steps = abs(first % 4 - second % 4) + abs(first // 4 - second // 4)
    pieces = [(digits.draw()[0], 8 * (cell % 4), 8 * (cell // 4)) for cell in (first, second)]
    return digits.paste(*pieces), {1: "1", 2: "2", 3: "3"}.get(steps, "4 to 6")


TASKS: dict[str, Callable[[Digits], tuple[Image.Image, str]]] = {
    task.__name__: task for task in (turned, place, count, larger, apart)
}


def main() -> None:
    """Try every task and print the table."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.getLogger("vpt_peft").setLevel(logging.WARNING)
    folder = Path(arguments.output_dir)
    rows: list[dict] = []
    for name in arguments.tasks:
        data = folder / "data" / name
        if not data.is_dir():
            make_task(TASKS[name]).save_to_disk(data)
        row: dict = {"task": name} | {method: 100 * validate(arguments, data, method) for method in FLAGS}
        rows.append({**row, "full - linear": row["full"] - row["linear"]})
        (folder / "results.json").write_text(json.dumps(rows, indent=1))
        print(pandas.DataFrame(rows).to_markdown(index=False, floatfmt="g"), flush=True)


def validate(arguments: Arguments, data: Path, method: str) -> float:
    """Return the validation accuracy of the last epoch."""
    given = {
        "model_name_or_path": arguments.model_name_or_path,
        "dataset_name": str(data),
        "method": method,
        "seed": arguments.seed,
        **FLAGS[method],
        "output_dir": str(data.parents[1] / "runs" / f"{data.name}-{method}"),
        "overwrite_output_dir": True,
        "eval_strategy": "no",
        "logging_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
    }
    metrics = train(parse_args(given), with_test=False)
    return metrics["eval_accuracy"]


if __name__ == "__main__":
    main()
