"""The result of one run as JSON, in the shape of PEFT's method comparison."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..reporting.results import RESULTS, read_json
from .grid import folder_name


_PACKAGES = ("vpt_peft", "torch", "transformers", "peft", "accelerate", "datasets", "optuna")
_PROCESS_MEMORY = Path("/proc/self/status")
_RESET_MEMORY = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Place:
    """Where a run belongs in a comparison. Row and data can be names of folders.

    Args:
        row (`str`): the method and the flags that make a row of the table.
        data (`str`): short name of the data set.
        stage (`str`): "search", scored on validation, or "test".
        settings (`Mapping`): what the trial tries, or its draw and seed.
    """

    row: str
    data: str
    stage: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the experiment, which is a path as well."""
        return f"{self.row}/{self.data}/{self.stage}/{folder_name(self.settings)}"


class Memory:
    """The most memory in use since `measure_memory` was entered, in bytes; 0 where it cannot be told.

    `accelerator` is what PyTorch's allocator held, `process` the resident memory of the process, libraries and what
    earlier runs left included.
    """

    accelerator = 0
    process = 0


@contextmanager
def measure_memory() -> Iterator[Memory]:
    """Measure the most memory in use within the block."""
    memory = Memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # Linux: the peak of the resident memory starts anew
        _RESET_MEMORY.write_text("5", encoding="ascii")
        counts = True
    except OSError:
        counts = False
    try:
        yield memory
    finally:
        if torch.cuda.is_available():
            memory.accelerator = torch.cuda.max_memory_reserved()
        if counts:
            (line,) = (line for line in _PROCESS_MEMORY.read_text().splitlines() if line.startswith("VmHWM:"))
            memory.process = 1024 * int(line.split()[1])


def make_result(
    place: Place,
    record: Mapping[str, Any],
    metrics: Mapping[str, float],
    error: str | None,
    seconds: float,
    memory: Memory,
    folder: Path,
) -> dict[str, Any]:
    """Return one run as JSON.

    Args:
        place: where it belongs.
        record: its arguments.
        metrics: as `train` returns them; empty where it failed.
        error: why it failed for its settings.
        seconds: from reading the data to the last file.
        memory: the most in use.
        folder: of the run; its log and adapter configuration are taken over.
    """
    history = read_json(folder / "trainer_state.json").get("log_history", []) if error is None else []
    return {
        "run_info": {
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "total_time": seconds,
            "experiment_name": place.name,
            "row": place.row,
            "data": place.data,
            "stage": place.stage,
            "settings": dict(place.settings),
            "train_config": dict(record),
            "peft_config": read_json(folder / "adapter_config.json") or None,
            "error_msg": error or "",
        },
        "train_info": {
            "status": "success" if error is None else "failed",
            "train_time": metrics.get("train_runtime"),
            "accelerator_memory_max": memory.accelerator,
            "process_memory_max": memory.process,
            "expected_memory": metrics.get("expected_bytes"),
            "file_size": metrics.get("saved_bytes"),
            "num_trainable_params": metrics.get("trainable_parameters"),
            "num_head_params": metrics.get("head_parameters"),
            "num_total_params": metrics.get("total_parameters"),
            "history": history,
            "metrics": dict(metrics),
        },
        "meta_info": {
            "package_info": {f"{name}-version": _version(name) for name in _PACKAGES},
            "system_info": {
                **{name: getattr(platform, name)() for name in ("system", "release", "machine", "python_version")},
                "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
                "threads": torch.get_num_threads(),
            },
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def result_path(output_dir: Path, place: Place) -> Path:
    """Where the result of a run is kept."""
    return output_dir / RESULTS / f"{place.name}.json"


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a result, or None where the run has not ended."""
    return read_json(path) or None
