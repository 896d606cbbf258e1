"""What prompts cost in time and memory, beside other methods: `python -m benchmarks.cost --help`.

One process measures every method on one frozen ViT with random weights, interleaved, and writes JSON, a markdown table
and a picture for each combination of model and dtype.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from .machine import describe_machine
from .measure import Runner, interleave, warm_up
from .picture import draw
from .report import compare, make_row, to_json, to_markdown
from .subjects import FLOOR, METHODS, MODELS, make_backbone, make_subjects


logger = logging.getLogger("benchmarks")


@dataclass
class CostArguments:
    """What is measured, and how often."""

    model: list[str] = field(default_factory=lambda: ["vit_base"], metadata={"help": f"Of {', '.join(MODELS)}."})
    dtype: list[str] = field(
        default_factory=lambda: ["float32"], metadata={"help": "Of the weights: float32, bfloat16."}
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}."})
    prompts: list[int] = field(default_factory=lambda: [10, 100, 200], metadata={"help": "Numbers of prompts."})
    batch_size: int = field(default=8, metadata={"help": "Images per step."})
    rounds: int = field(default=5, metadata={"help": "Times everything is measured."})
    compile: bool = field(default=False, metadata={"help": "Run all models through torch.compile."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads; not given: torch's choice."})
    output_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Folder for the results."}
    )

    def __post_init__(self) -> None:
        for name, known in (("model", MODELS), ("methods", METHODS), ("dtype", ("float32", "bfloat16"))):
            chosen = getattr(self, name)
            unknown = sorted(set(chosen) - set(known))
            if unknown or not chosen:
                raise ValueError(f"{name}={chosen} must name one or more of {', '.join(known)}.")
        for name in ("batch_size", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not self.prompts or min(self.prompts) < 1:
            raise ValueError(f"prompts={self.prompts} must be numbers of at least 1.")
        self.prompts = sorted(set(self.prompts))
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}: torch finds no GPU; use --device cpu.")


def measure(arguments: CostArguments, model: str, dtype: str) -> dict[str, Any]:
    """Measure one model in one dtype; the results as `report` writes them."""
    device = torch.device(arguments.device)
    machine = describe_machine(device)
    backbone, spec = make_backbone(model, getattr(torch, dtype), device)
    size: Any = backbone.config.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, size, size, generator=generator).to(device, getattr(torch, dtype))
    subjects = make_subjects(backbone, spec, arguments.methods, arguments.prompts)
    runners, memory, left_out = warm_up([Runner(subject, images, arguments.compile) for subject in subjects])
    if not runners or runners[0].subject.method != FLOOR:
        raise RuntimeError(f"the floor itself does not run: {left_out[FLOOR]}")
    training = interleave(runners, arguments.rounds, training=True)
    inference = interleave(runners, arguments.rounds, training=False)
    rows = [
        make_row(
            runner.subject.key, runner.subject.method, runner.subject.prompts,
            sum(p.numel() for p in runner.subject.trainable()), training, inference, memory,
        )
        for runner in runners
    ]  # fmt: skip
    settings = {
        "model": model, "dtype": dtype, "compiled": arguments.compile, "batch_size": arguments.batch_size,
        "rounds": arguments.rounds, "image_size": size,
    }  # fmt: skip
    return {
        "settings": settings,
        "machine": machine,
        "rows": rows,
        "comparisons": compare(training, arguments.prompts),
        "left_out": left_out,
    }


def run(arguments: CostArguments) -> list[Path]:
    """Measure all combinations and write their files; the paths of the markdown pages."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.compile:
        # Every subject compiles the same functions anew
        torch._dynamo.config.recompile_limit = 1024
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pages = []
    for model in arguments.model:
        for dtype in arguments.dtype:
            results = measure(arguments, model, dtype)
            how = "compiled" if arguments.compile else "eager"
            stem = f"{torch.device(arguments.device).type}_{model}_{dtype}_{how}_batch{arguments.batch_size}"
            (folder / f"{stem}.json").write_text(to_json(results), encoding="utf-8")
            (folder / f"{stem}.md").write_text(to_markdown(results), encoding="utf-8")
            draw(results, folder / f"{stem}.png")
            pages.append(folder / f"{stem}.md")
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the flags say and print the tables."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    (arguments,) = HfArgumentParser(CostArguments).parse_args_into_dataclasses(args=argv)  # type: ignore[arg-type]
    for page in run(arguments):
        sys.stdout.write(page.read_text(encoding="utf-8") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
