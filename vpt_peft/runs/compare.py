"""The comparisons and sweeps that flags ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.suites import SUITES, Suite, suite_folders
from ..training.arguments import with_task
from .comparison import Comparison
from .grid import Grid, Range, folder_name, safe_name
from .search import search_space


def comparison_of(grid: Grid, searched: bool) -> Comparison:
    """Return the comparison that flags with several values ask for.

    Args:
        grid (`Grid`): the flags. Several data sets, draws (`split_seed`) and seeds are always runs of the same row.
        searched (`bool`): the other flags with several values are searched, as in a sweep. Otherwise they make rows,
            each with a search of `num_trials` trials over its ranges, or over its method's own space.

    Raises:
        ValueError: the flags do not go together; nothing was run.
        DataError: the data sets of a suite are missing, or other ones.
    """
    own, axes = grid.own, dict(grid.axes)
    if own.get("suite") and own["suite"] not in SUITES:
        raise ValueError(f"suite={own['suite']!r} is unknown; choose one of {', '.join(SUITES)}.")
    suite = SUITES[own["suite"]] if own.get("suite") else None
    data = _suite_data(grid, suite) if suite is not None else _data(grid, axes)
    draws = _values(grid, axes, "split_seed", [0])
    ranges = {name: axis for name, axis in axes.items() if searched or isinstance(axis, Range)}
    rows = {
        _row_name(grid, settings): settings
        for settings in grid.combinations([name for name in axes if name not in ranges])
    }
    if searched and not ranges:
        raise ValueError("nothing varies; give a flag several values, as in --learning_rate 1e-3 5e-3.")
    num_trials = own.get("num_trials")
    if num_trials is not None and num_trials < 1:
        raise ValueError(f"num_trials={num_trials} must be at least 1.")
    spaces: dict[str, Mapping[str, list | Range]] = {}
    for row, settings in rows.items():
        fixed = {**grid.common, **settings}
        if ranges:
            spaces[row] = ranges
        elif num_trials is not None:
            space = search_space(fixed.get("method", "vpt"))
            spaces[row] = {name: axis for name, axis in space.items() if name not in fixed}
    # A comparison is of one task, and its first data set tells which
    flags = with_task({**grid.common, **next(iter(data.values()))}) if suite is None else dict(grid.common)
    common = {name: value for name, value in flags.items() if name not in ("dataset_name", "split_seed", "seed")}
    found = Comparison(
        common=common,
        rows=rows,
        data=data,
        spaces=spaces,
        output_dir=grid.output_dir,
        seeds=grid.seeds,
        draws=draws,
        sampler=own.get("sampler", "random"),
        num_trials=num_trials,
        with_default=not searched,
        storage=Path(own["storage"]) if own.get("storage") else None,
        suite=suite,
    )
    found.check()
    return found


def _data(grid: Grid, axes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = _values(grid, axes, "dataset_name", ["digits"])
    data = {_data_name(name): {"dataset_name": name} for name in names}
    if len(data) < len(names):
        raise ValueError(f"dataset_name: two of {', '.join(names)} have the same name; rename a folder.")
    return data


def _suite_data(grid: Grid, suite: Suite) -> dict[str, dict[str, Any]]:
    if "dataset_name" in grid.common or "dataset_name" in grid.axes:
        raise ValueError(f"suite={suite.name!r} names its data sets itself; drop dataset_name.")
    folder = grid.own.get("suite_dir")
    folders = suite_folders(suite, Path(folder).expanduser() if folder else None, grid.common.get("token"))
    protocol = {"augmentation": suite.augmentation} if "augmentation" not in grid.common else {}
    return {name: {"dataset_name": str(path), **protocol} for name, path in folders.items()}


def _values(grid: Grid, axes: dict[str, Any], name: str, default: list) -> list:
    """Take the values of a flag out of the axes, or those that are common."""
    values = axes.pop(name, None) or ([grid.common[name]] if name in grid.common else default)
    if isinstance(values, Range):
        raise ValueError(f"{name}={values} is a range; list the values.")
    return values


def _data_name(dataset_name: str) -> str:
    path = Path(dataset_name).expanduser()
    return safe_name(path.resolve().name if path.is_dir() else dataset_name)


def _row_name(grid: Grid, settings: Mapping[str, Any]) -> str:
    """The method's name alone where rows differ in nothing else."""
    method = str(settings.get("method", grid.common.get("method", "vpt")))
    more = {name: value for name, value in settings.items() if name != "method"}
    return safe_name(method + (f",{folder_name(more)}" if more else ""))
