"""The Python cost of a forward pass: `python -m benchmarks.overhead --help`.

Twelve blocks so narrow that their arithmetic hardly counts, one image, one thread, no gradient: what a method adds then is
the cost of its Python code. Each method is timed between two timings of the plain model, in one process.
"""

from __future__ import annotations

import copy
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, ViTConfig, ViTModel

from vpt_peft import GatedVPTConfig, VPTConfig
from vpt_peft.reporting import markdown_table

from .machine import describe_machine
from .measure import seconds
from .report import Ratio, machine_line, summarize


CPU = torch.device("cpu")
PROMPTS = 10


@dataclass
class OverheadArguments:
    """How often is measured."""

    pairs: int = field(default=60, metadata={"help": "Timings of each method, every one beside the plain model."})
    passes: int = field(default=20, metadata={"help": "Forward passes per timing."})

    def __post_init__(self) -> None:
        for name in ("pairs", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")


def make_model() -> ViTModel:
    """A ViT of 12 blocks of width 48 with 3 heads that sees 17 tokens, with random weights from a fixed seed."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=12, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def _merged(model: ViTModel) -> nn.Module:
    prompted: Any = get_peft_model(model, VPTConfig(num_virtual_tokens=PROMPTS))
    prompted.merge_adapter()
    return prompted


METHODS: dict[str, Callable[[ViTModel], nn.Module]] = {
    "LoRA r=8": lambda model: get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])),
    "VPT-deep": lambda model: get_peft_model(model, VPTConfig(num_virtual_tokens=PROMPTS)),
    "VPT-deep, merged": _merged,
    "gated prompts": lambda model: get_peft_model(model, GatedVPTConfig(num_virtual_tokens=PROMPTS)),
}


def measure(arguments: OverheadArguments) -> dict[str, tuple[Ratio, Ratio]]:
    """Time all methods, interleaved.

    Returns:
        By method the milliseconds of a forward pass, and the time relative to the plain model beside it.
    """
    plain = make_model()
    images = torch.randn(1, 3, 32, 32)

    def timed(model: nn.Module) -> float:
        def run() -> None:
            for _ in range(arguments.passes):
                model(pixel_values=images)

        return 1e3 * seconds(run, CPU) / arguments.passes

    models = {name: build(copy.deepcopy(plain)).eval() for name, build in METHODS.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    ratios: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for model in (plain, *models.values()):
            timed(model)
        gc.collect()
        gc.disable()
        try:
            for number in range(arguments.pairs):
                before = timed(plain)
                # Every method comes first as often as any other
                names = list(models)
                shift = number % len(names)
                for name in (*names[shift:], *names[:shift]):
                    now, after = timed(models[name]), timed(plain)
                    taken[name].append(now)
                    ratios[name].append(2 * now / (before + after))
                    before = after
        finally:
            gc.enable()
    return {name: (summarize(taken[name]), summarize(ratios[name])) for name in models}


def to_markdown(results: dict[str, tuple[Ratio, Ratio]], arguments: OverheadArguments) -> str:
    """The results as a page."""
    rows = [
        {
            "method": name,
            "ms": f"{taken.median:.2f}",
            "relative to plain": f"{ratio.median:.3f}",
            "quartiles": f"{ratio.low:.3f} to {ratio.high:.3f}",
        }
        for name, (taken, ratio) in results.items()
    ]
    return (
        f"# Python cost of a forward pass\n\n{machine_line(describe_machine(CPU))}\n\n"
        f"ViT of 12 blocks of width 48, 3 heads, 17 tokens, {PROMPTS} prompts; one image, one thread, no gradient. Medians "
        f"of {arguments.pairs} pairs of {arguments.passes} passes each.\n\n{markdown_table(rows, left=['method'])}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the flags say and print the table."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    (arguments,) = HfArgumentParser(OverheadArguments).parse_args_into_dataclasses(args=argv)  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sys.stdout.write(to_markdown(measure(arguments), arguments))
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
