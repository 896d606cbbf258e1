"""Many tasks on one frozen backbone: `python -m benchmarks.adapters --help`.

One process loads adapters with heads of their own from disk into a ViT with random weights, one after the other, and
measures loading, memory, switching, and one batch in which several adapters take part against the same batch with one.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model
from transformers import HfArgumentParser

from vpt_peft import VPTConfig
from vpt_peft.reporting import markdown_table

from .machine import describe_machine
from .measure import seconds
from .report import machine_line, summarize, to_json
from .subjects import MODELS, make_backbone


logger = logging.getLogger("benchmarks")
CPU = torch.device("cpu")


@dataclass
class AdaptersArguments:
    """What is measured, and how often."""

    model: str = field(default="vit_base", metadata={"help": f"Of {', '.join(MODELS)}."})
    adapters: int = field(default=1000, metadata={"help": "Adapters on the backbone in the end."})
    prompts: int = field(default=10, metadata={"help": "Prompts per block of each adapter."})
    tasks: int = field(default=8, metadata={"help": "Adapters that take part in one batch."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch of several adapters."})
    rounds: int = field(default=5, metadata={"help": "Times each batch is run."})
    output_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Folder for the results."}
    )

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model={self.model!r} must be one of {', '.join(MODELS)}.")
        for name in ("adapters", "prompts", "tasks", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.tasks <= min(self.adapters, self.batch_size):
            raise ValueError(
                f"tasks={self.tasks} must be at most adapters={self.adapters} and batch_size={self.batch_size}."
            )


def load_and_switch(model: Any, arguments: AdaptersArguments, folder: Path) -> dict[str, Any]:
    """Load adapters up to the number wanted, and switch between them.

    Args:
        model: A PEFT model with the adapter `task_0`.
        arguments: What is measured.
        folder: Where an adapter is saved for loading.
    """
    model.save_pretrained(folder)
    saved = folder / "task_0"
    own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    process = psutil.Process()
    loading, before = [], process.memory_info().rss
    for number in range(1, arguments.adapters):
        loading.append(seconds(lambda name=f"task_{number}": model.load_adapter(saved, name), CPU))  # type: ignore[misc]
        if number % 100 == 0:
            logger.info("%d of %d adapters", number, arguments.adapters)
    grown = process.memory_info().rss - before
    draw = random.Random(0)
    names = [f"task_{draw.randrange(arguments.adapters)}" for _ in range(100)]
    switching = [seconds(lambda name=name: model.set_adapter(name), CPU) for name in names]  # type: ignore[misc]
    return {
        "own_bytes": own,
        "resident_bytes_per_adapter": grown / len(loading) if loading else None,
        "loading_first": summarize(loading[:100]) if loading else None,
        "loading_last": summarize(loading[-100:]) if loading else None,
        "switching": summarize(switching),
    }


def against_one(model: Any, images: torch.Tensor, names: Sequence[str], one: str, rounds: int) -> dict[str, Any]:
    """One batch in which each image has its adapter, against the same batch with the adapter `one`, interleaved.

    Args:
        model: The PEFT model.
        images: `(batch, channels, height, width)`.
        names: The adapter of each image.
        one: The adapter to compare with.
        rounds: How often.
    """
    model.set_adapter(one)
    model.eval()

    @torch.inference_mode()
    def alone(**given: Any) -> None:
        model(pixel_values=images, **given)

    mixed = partial(alone, adapter_names=list(names))
    alone()
    mixed()
    ratios, taken = [], []
    for _ in range(rounds):
        before, now, after = (seconds(call, CPU) for call in (alone, mixed, alone))
        ratios.append(2 * now / (before + after))
        taken.append(now)
    lengths = {name: model.peft_config[name].num_virtual_tokens for name in (*names, one)}
    prompts = [lengths[name] for name in dict.fromkeys(names)]
    return {"prompts": prompts, "one": lengths[one], "seconds": summarize(taken), "ratio": summarize(ratios)}


def measure(arguments: AdaptersArguments) -> dict[str, Any]:
    """Everything, as `to_markdown` reads it."""
    machine = describe_machine(CPU)
    backbone, _ = make_backbone(arguments.model, torch.float32, CPU)
    size: Any = backbone.config.image_size
    images = torch.randn(arguments.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = get_peft_model(backbone, VPTConfig(num_virtual_tokens=arguments.prompts), adapter_name="task_0")
    with tempfile.TemporaryDirectory() as folder:
        found = load_and_switch(model, arguments, Path(folder))
    # From few prompts up to 100, or to ten times the number in the small models of tests
    longest = max(100, arguments.prompts) if size >= 224 else 10 * arguments.prompts
    lengths = [max(1, round(longest * (task + 1) / arguments.tasks)) for task in range(arguments.tasks)]
    for task, length in enumerate(lengths):
        model.add_adapter(f"length_{task}", VPTConfig(num_virtual_tokens=length))
    batches = []
    for prefix in ("task", "length"):
        names = [f"{prefix}_{image % arguments.tasks}" for image in range(arguments.batch_size)]
        batches.append(against_one(model, images, names, f"{prefix}_{arguments.tasks - 1}", arguments.rounds))
    names = ("model", "adapters", "prompts", "tasks", "batch_size", "rounds")
    settings = {name: getattr(arguments, name) for name in names}
    return {"settings": settings, "machine": machine, **found, "batches": batches}


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    settings = results["settings"]

    def milliseconds(ratio: Any) -> str:
        return "" if ratio is None else f"{1e3 * ratio.median:.1f} ({1e3 * ratio.low:.1f} to {1e3 * ratio.high:.1f})"

    grown = results["resident_bytes_per_adapter"]
    figures = {
        "bytes of one adapter's parameters": f"{results['own_bytes']:,}",
        "growth of resident memory per adapter, bytes": "" if grown is None else f"{grown:,.0f}",
        "loading one, the first hundred": milliseconds(results["loading_first"]),
        "loading one, the last hundred": milliseconds(results["loading_last"]),
        "switching, all adapters loaded": milliseconds(results["switching"]),
    }
    batches = [
        {
            "prompts of the adapters": ", ".join(map(str, batch["prompts"])),
            "prompts of the one": str(batch["one"]),
            "milliseconds": milliseconds(batch["seconds"]),
            "ratio": str(batch["ratio"]),
        }
        for batch in results["batches"]
    ]
    lines = [
        f"# {settings['adapters']:,} adapters on one {settings['model']}",
        "",
        machine_line(results["machine"]),
        "",
        f"VPT-deep with {settings['prompts']} prompts in every block and a head of its own each, float32; loaded by "
        "`load_adapter` from a file that the system has in its cache. Medians with quartiles, milliseconds.",
        "",
        markdown_table([{"": name, "measured": value} for name, value in figures.items()], left=[""]).rstrip(),
        "",
        f"One batch of {settings['batch_size']} images, inference, each image with its own adapter (and head), against "
        f"the same batch with one adapter; medians of {settings['rounds']} interleaved rounds:",
        "",
        markdown_table(batches, left=["prompts of the adapters"]),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the flags say, write JSON and a markdown page, and print it."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    (arguments,) = HfArgumentParser(AdaptersArguments).parse_args_into_dataclasses(args=argv)  # type: ignore[arg-type]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(arguments)
    stem = f"cpu_{arguments.model}_adapters{arguments.adapters}"
    (folder / f"{stem}.json").write_text(to_json(results), encoding="utf-8")
    page = to_markdown(results)
    (folder / f"{stem}.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
