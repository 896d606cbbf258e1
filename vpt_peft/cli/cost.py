"""`vpt-peft cost [--model_name_or_path M] [--method vpt lora ...]`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..methods.registry import METHODS


if TYPE_CHECKING:
    from ..cost import CostEstimate


def run(argv: Sequence[str]) -> int:
    """Print what training costs, one row per method; only the configuration of the model is downloaded."""
    parser = ArgumentParser(
        prog="vpt-peft cost",
        description="Estimate what training costs with each method: parameters, disk, FLOPs, memory, the largest batch.",
        allow_abbrev=False,
    )
    parser.add_argument("--model_name_or_path", default="embedded", help="Hub id or folder, or an embedded backbone")
    parser.add_argument("--task", default="image-classification", help="what the head does; others load the weights")
    parser.add_argument("--decoder", help="semantic-segmentation: head of an encoder, as for vpt-peft train")
    parser.add_argument("--method", nargs="+", choices=METHODS, help="default: all that fit the task")
    parser.add_argument(
        "--num_virtual_tokens",
        type=int,
        nargs="+",
        default=[10],
        help="prompts per prompted block; several: one for each",
    )
    parser.add_argument("--prompt_rank", type=int, help="prompts are a product of two matrices of this rank")
    parser.add_argument("--bias", nargs="+", help="biases that train: all, or some of value, output, mlp, norm")
    parser.add_argument("--num_labels", type=int, help="labels of the head; default: as the configuration says")
    parser.add_argument("--batch_size", type=int, default=8, help="images per step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16 (autocast); the weights keep their dtype"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--optimizer", default="adamw", help="whose state counts: adamw, sgd or none")
    parser.add_argument(
        "--memory_limit_gb", type=float, help="gigabytes (10^9) that training may use; default: what is available"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    parser.add_argument("--lora_r", type=int, default=8, help="lora: rank")
    parser.add_argument("--partial_blocks", type=int, default=1, help="partial: last blocks that train")
    parser.add_argument("--mlp_layers", type=int, default=3, help="mlp: linear layers of the head")
    parser.add_argument("--adapter_reduction", type=int, default=8, help="adapter: hidden size over bottleneck width")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="output format")
    parser.add_argument("--output_file", help="also write the estimates to this .json file")
    own = vars(parser.parse_args(list(argv)))
    from ..cost import estimate_costs
    from ..methods.options import out_of_list

    own["num_virtual_tokens"] = out_of_list(own["num_virtual_tokens"])
    rank, bias = own.pop("prompt_rank"), out_of_list(own.pop("bias"))
    own |= {name: value for name, value in (("prompt_rank", rank), ("bias", bias)) if value is not None}
    output_file, kind, limit = own.pop("output_file"), own.pop("format"), own.pop("memory_limit_gb")
    if limit is not None and not 0 < limit < float("inf"):
        raise ValueError(f"--memory_limit_gb {limit:g} must be a positive number of gigabytes.")
    model, methods = _find_model(own.pop("model_name_or_path"), own.pop("task"), own.pop("decoder"), own)
    estimates = estimate_costs(
        model,
        own.pop("method") or methods,
        autocast="bfloat16" if own.pop("bf16") else None,
        memory_limit=None if limit is None else int(limit * 1e9),
        **own,
    )
    rows = [{**asdict(estimate), "peak_bytes": estimate.peak_bytes} for estimate in estimates]
    if output_file is not None:
        Path(output_file).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if kind == "json" else as_table(estimates))
    return 0


def _find_model(name: str, task_name: str, decoder: str | None, given: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return what a task costs by: a classifier's name, or else the model with its head; and the methods that fit."""
    from ..tasks.base import DEFAULT_TASK

    if task_name == DEFAULT_TASK and decoder is None:
        return name, list(METHODS)
    from ..data.arguments import DataArguments
    from ..tasks import get_task
    from ..training.arguments import ModelArguments
    from ..training.model import load_backbone, load_image_processor

    task, source = get_task(task_name), ModelArguments(name, task=task_name, decoder=decoder)
    labels = {number: str(number) for number in range(given.pop("num_labels", None) or 2)}
    processor = task.prepare_processor(load_image_processor(source), DataArguments("none"))
    return load_backbone(source, labels, processor), [each for each in METHODS if each not in task.refused_methods]


def as_table(estimates: Sequence[CostEstimate]) -> str:
    """Return the estimates as a markdown table, and what the columns mean."""
    from psutil import Process

    from ..reporting import markdown_table

    rows = [
        {
            "method": estimate.method,
            "trainable parameters": f"{estimate.trainable_values:,}",
            "% of all": f"{100 * estimate.trainable_values / estimate.total_values:.2f}",
            "on disk": _size(estimate.disk_bytes),
            "GFLOP forward": f"{estimate.forward_flops / 1e9:,.1f}",
            "GFLOP step": f"{estimate.step_flops / 1e9:,.1f}",
            "memory": _size(estimate.peak_bytes),
            "largest batch": f"{estimate.largest_batch_size:,}",
        }
        for estimate in estimates
    ]
    first = estimates[0]
    return (
        f"{markdown_table(rows, left=['method'])}\n{first.dtype} weights, {first.batch_size} images a step; memory is "
        "what PyTorch's allocator holds: weights, optimizer state, images and the most a step adds. The process takes "
        f"more, as Python and its libraries do ({_size(Process().memory_info().rss)} here) and on a GPU the CUDA "
        f"context. The largest batch fits {_size(first.memory_limit)} with room for what an allocator holds in "
        "fragments.\n"
    )


def _size(count: int) -> str:
    """Bytes in the unit (powers of 1,000) that leaves one to three digits before the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
