"""The results of a comparison, read from its output folder as a table of pandas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metrics import metric_names


if TYPE_CHECKING:
    import pandas

# The folder of results within that of a comparison
RESULTS = "results"


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds, or nothing where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_results(folder: str | Path) -> pandas.DataFrame:
    """Return all results of a comparison, one run a row.

    Columns are "row", "data", "stage", "settings", "seed", "draw", "error", "parameters", "head_parameters",
    "file_size", "seconds" (of training), "total_seconds", "memory" (of the accelerator; on a CPU what a step needs, as a process keeps what it freed), and every
    metric as "eval_..." or "test_...".

    Args:
        folder: the comparison's output folder, or its folder of results.

    Raises:
        FileNotFoundError: there are none.
    """
    import pandas

    folder = Path(folder)
    paths = sorted((folder / RESULTS if (folder / RESULTS).is_dir() else folder).rglob("*.json"))
    rows = [_flat(result) for path in paths if "run_info" in (result := read_json(path))]
    if not rows:
        raise FileNotFoundError(f"{str(folder)!r} holds no results; give the output_dir of a comparison or sweep.")
    return pandas.DataFrame(rows)


def _flat(result: Mapping[str, Any]) -> dict[str, Any]:
    run, trained = result["run_info"], result["train_info"]
    config, metrics = run["train_config"], trained["metrics"]
    shown = [f"{split}_{name}" for split in ("eval", "test") for name in ("loss", *metric_names(metrics, split))]
    return {
        **{name: run[name] for name in ("row", "data", "stage", "settings")},
        "seed": config.get("seed", 42),
        "draw": config.get("split_seed", 0),
        "error": run["error_msg"],
        "parameters": trained["num_trainable_params"],
        "head_parameters": trained["num_head_params"],
        "file_size": trained["file_size"],
        "seconds": trained["train_time"],
        "total_seconds": run["total_time"],
        "memory": trained["accelerator_memory_max"] or trained["expected_memory"],
        **{name: metrics[name] for name in shown if name in metrics},
    }
