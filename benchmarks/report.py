"""What was measured, as JSON, as a markdown table and as a picture of cost against the number of prompts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vpt_peft.reporting import markdown_table

from .measure import Samples
from .subjects import FLOOR, METHODS


# What an implementation gains over the other way to compute the same thing
AGAINST = (("deep_token", "deep_kv"), ("gated", "gated_loop"))


@dataclass(frozen=True)
class Ratio:
    """A median over rounds with its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Row:
    """The results of one subject; `None` where it was not measured.

    Args:
        method: Key of `METHODS`.
        prompts: Prompts per prompted block.
        trainable_parameters: Head included.
        step_seconds, inference_seconds: Medians.
        step, inference: Against the floor in the same round.
        added_bytes: Memory a training step adds.
        memory: Against the floor.
    """

    method: str
    prompts: int | None
    trainable_parameters: int
    step_seconds: float | None
    step: Ratio | None
    inference_seconds: float | None
    inference: Ratio | None
    added_bytes: int | None
    memory: float | None


def summarize(values: Sequence[float]) -> Ratio:
    """Median and quartiles."""
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


def _time(samples: Mapping[str, Samples], key: str) -> tuple[float | None, Ratio | None]:
    if key not in samples or not samples[key].seconds:
        return None, None
    one = samples[key]
    ratios = [taken / floor for taken, floor in zip(one.seconds, one.floor, strict=True)]
    return statistics.median(one.seconds), summarize(ratios)


def make_row(
    key: str, method: str, prompts: int | None, trainable_parameters: int,
    training: Mapping[str, Samples], inference: Mapping[str, Samples], memory: Mapping[str, int],
) -> Row:  # fmt: skip
    """Put together what was measured of the subject `key`."""
    added = memory.get(key)
    against = added / memory[FLOOR] if added is not None and FLOOR in memory else None
    return Row(method, prompts, trainable_parameters, *_time(training, key), *_time(inference, key), added, against)


def compare(samples: Mapping[str, Samples], prompts: Sequence[int]) -> list[dict[str, Any]]:
    """Ratios of two methods in the same rounds, for every number of prompts both ran with."""
    found = []
    for above, below in AGAINST:
        for count in prompts:
            first, second = samples.get(f"{above}_{count}"), samples.get(f"{below}_{count}")
            if first is not None and second is not None and first.seconds and second.seconds:
                ratios = [a / b for a, b in zip(first.seconds, second.seconds, strict=True)]
                found.append({"method": above, "against": below, "prompts": count, "step": summarize(ratios)})
    return found


def to_json(results: Mapping[str, Any]) -> str:
    """The results as text; dataclasses become objects."""
    return json.dumps(results, indent=2, default=lambda value: asdict(value), allow_nan=False) + "\n"


def machine_line(machine: Mapping[str, Any]) -> str:
    """What a measurement ran on, as a sentence."""
    return (
        f"{machine['device']}; {machine['processor']}; {machine['cores']} cores, {machine['threads']} threads, load "
        f"{machine['load_before']} before the run; torch {machine['torch']}, transformers {machine['transformers']}, "
        f"peft {machine['peft']}, Python {machine['python']}, {machine['system']}."
    )


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page: what ran where, one row per subject, comparisons, what was left out."""
    settings, machine = results["settings"], results["machine"]
    how = "compiled" if settings["compiled"] else "eager"
    lines = [
        f"# Cost of {settings['model']}, {settings['dtype']}, {how}, batch {settings['batch_size']}",
        "",
        machine_line(machine),
        "",
        f"Medians of {settings['rounds']} interleaved rounds; ratios are to the floor in the same round (median, "
        "quartiles). A training step is forward pass, backward pass and AdamW's update. Memory is the most that a "
        "training step has in use beyond weights and images, by torch's allocator. The floor is the same frozen "
        "backbone without prompts, the gradient taken to its first block; its own ratio compares two runs of it and shows "
        "how steady the machine was.",
        "",
        markdown_table([_table_row(row) for row in results["rows"]], left=["method"]).rstrip(),
    ]
    if results["comparisons"]:
        rows = [
            {
                "training step of": METHODS[c["method"]].title,
                "against": METHODS[c["against"]].title,
                "p": str(c["prompts"]),
                "ratio": str(c["step"]),
            }
            for c in results["comparisons"]
        ]
        lines += ["", markdown_table(rows, left=["training step of", "against"]).rstrip()]
    if results["left_out"]:
        lines += ["", "Left out:", ""] + [f"- {key}: {reason}" for key, reason in results["left_out"].items()]
    return "\n".join(lines) + "\n"


def _table_row(row: Row) -> dict[str, str]:
    return {
        "method": METHODS[row.method].title,
        "p": "" if row.prompts is None else str(row.prompts),
        "trainable parameters": f"{row.trainable_parameters:,}",
        "step, ms": "" if row.step_seconds is None else f"{1e3 * row.step_seconds:,.1f}",
        "step / floor": "" if row.step is None else str(row.step),
        "inference, ms": "" if row.inference_seconds is None else f"{1e3 * row.inference_seconds:,.1f}",
        "inference / plain": "" if row.inference is None else str(row.inference),
        "memory, MB": "" if row.added_bytes is None else f"{row.added_bytes / 1e6:,.1f}",
        "memory / floor": "" if row.memory is None else f"{row.memory:.3f}",
    }
