"""`vpt-peft cost [--model_name_or_path M] [--method vpt lora ...]`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..cost import CostEstimate

COLUMNS = ("method", "trained values", "% of all", "on disk", "GFLOP forward", "GFLOP step", "memory", "largest batch")


def run(argv: Sequence[str]) -> int:
    """Print what training would cost, one row per method; nothing is downloaded but the model's configuration."""
    from ..cost import OPTIMIZER_STATES, estimate_costs
    from ..methods import METHODS

    parser = ArgumentParser(
        prog="vpt-peft cost",
        description="What training would cost with each method: values, disk, FLOPs, memory, the largest batch.",
        allow_abbrev=False,
    )
    parser.add_argument("--model_name_or_path", default="embedded", help="Hub id or folder, or an embedded backbone")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")
    parser.add_argument("--num_virtual_tokens", type=int, default=10, help="prompts per prompted block")
    parser.add_argument("--num_labels", type=int, help="labels of the head; default: as the configuration says")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 over weights as they are (autocast)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="compute blocks again going back")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZER_STATES), default="adamw", help="whose moments count")
    parser.add_argument(
        "--memory_limit_gb", type=float, help="gigabytes (10^9) to stay in; default: what is available"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--lora_r", type=int, default=8, help="lora: rank")
    parser.add_argument("--partial_blocks", type=int, default=1, help="partial: last blocks that train")
    parser.add_argument("--mlp_layers", type=int, default=3, help="mlp: linear layers of the head")
    parser.add_argument("--adapter_reduction", type=int, default=8, help="adapter: hidden size over bottleneck width")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="what is printed")
    parser.add_argument("--output_file", help="also write the estimates to this .json file")
    own = vars(parser.parse_args(list(argv)))

    output_file, kind, limit = own.pop("output_file"), own.pop("format"), own.pop("memory_limit_gb")
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"--memory_limit_gb {limit:g} must be a positive number of gigabytes.")
    estimates = estimate_costs(
        own.pop("model_name_or_path"),
        own.pop("method"),
        autocast="bfloat16" if own.pop("bf16") else None,
        memory_limit=None if limit is None else int(limit * 1e9),
        **own,
    )
    rows = [{**asdict(estimate), "peak_bytes": estimate.peak_bytes} for estimate in estimates]
    if output_file is not None:
        Path(output_file).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if kind == "json" else as_table(estimates))
    return 0


def as_table(estimates: Sequence[CostEstimate]) -> str:
    """The estimates as aligned columns, which is a markdown table as well."""
    cells = [list(COLUMNS), *map(_row, estimates)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells.insert(1, rule)
    lines = [_line(row, widths) for row in cells]
    first = estimates[0]
    lines += [
        "",
        f"{first.dtype} weights, {first.batch_size} images a step; memory is weights, moments, images and the most a step "
        f"adds; the largest batch fits {_size(first.memory_limit)} with room for what an allocator holds in fragments.",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first column to the left, the numbers to the right."""
    padded = [cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]
    return f"| {' | '.join(padded)} |"


def _row(estimate: CostEstimate) -> list[str]:
    return [
        estimate.method,
        f"{estimate.trainable_values:,}",
        f"{100 * estimate.trainable_values / estimate.total_values:.2f}",
        _size(estimate.disk_bytes),
        f"{estimate.forward_flops / 1e9:,.1f}",
        f"{estimate.step_flops / 1e9:,.1f}",
        _size(estimate.peak_bytes),
        f"{estimate.largest_batch_size:,}",
    ]


def _size(count: int) -> str:
    """Bytes in the unit (powers of 1,000) that leaves one to three digits before the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
