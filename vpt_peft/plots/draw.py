"""Learning curves, and a metric against trainable parameters and seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from ..reporting import Shown, shown
from .panels import MARKERS, logarithmic, new_panels, save_panels
from .runs import Run, find_runs, group_runs


if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COSTS = {"trainable_parameters": "trainable parameters", "train_runtime": "seconds of training"}


def _common_metric(groups: dict[str, list[Run]]) -> str:
    """The metric of all runs.

    Raises:
        ValueError: they have different ones.
    """
    names = sorted({run.metric for runs in groups.values() for run in runs})
    if len(names) > 1:
        raise ValueError(f"the runs have different metrics ({', '.join(names)}); plot those of one metric at a time.")
    return names[0]


def draw_curves(groups: dict[str, list[Run]], axes: Sequence[Axes]) -> None:
    """Draw training loss and validation metric over epochs: mean of the seeds as a line, their range as a band.

    Raises:
        ValueError: the runs have different metrics.
    """
    key = f"eval_{_common_metric(groups)}"
    values = [value for runs in groups.values() for run in runs for value in run.curve(key).values()]
    for ax, name, panel in ((axes[0], "loss", Shown("training loss")), (axes[1], key, shown(key, values))):
        for (label, runs), marker in zip(groups.items(), cycle(MARKERS), strict=False):
            points: dict[float, list[float]] = {}
            for run in runs:
                for epoch, value in run.curve(name).items():
                    points.setdefault(epoch, []).append(panel.scale * value)
            epochs = sorted(points)
            means = [statistics.fmean(points[epoch]) for epoch in epochs]
            (line,) = ax.plot(epochs, means, marker=marker if len(epochs) < 30 else "", markersize=4, label=label)
            if len(runs) > 1:
                low, high = ([choose(points[epoch]) for epoch in epochs] for choose in (min, max))
                ax.fill_between(epochs, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
        ax.set_xlabel("epoch")
        ax.set_ylabel(panel.title)
        ax.locator_params(axis="x", integer=True)


def draw_tradeoff(groups: dict[str, list[Run]], axes: Sequence[Axes]) -> None:
    """Draw the metric against trainable parameters and, on a second axis, against seconds of training.

    One point per group, with the sample deviation over seeds. Where a group has no seconds, it is left out there.

    Raises:
        ValueError: the runs have different metrics.
    """
    everything = [run.metrics for runs in groups.values() for run in runs]
    metric = _common_metric(groups)
    name = f"test_{metric}" if all(f"test_{metric}" in metrics for metrics in everything) else f"eval_{metric}"
    panel = shown(name, [metrics[name] for metrics in everything])
    for ax, (cost, title) in zip(axes, _COSTS.items(), strict=False):
        for (label, runs), marker in zip(groups.items(), cycle(MARKERS), strict=False):
            if not all(cost in run.metrics for run in runs):
                continue
            values = [panel.scale * run.metrics[name] for run in runs]
            spread = statistics.stdev(values) if len(runs) > 1 else None
            place, mean = statistics.fmean(run.metrics[cost] for run in runs), statistics.fmean(values)
            ax.errorbar([place], [mean], yerr=spread, marker=marker, capsize=3, ls="", label=label)
        logarithmic(ax)
        ax.set_xlabel(title)
    axes[0].set_ylabel(panel.title)


_KINDS: dict[str, tuple[int, Callable]] = {"curves": (2, draw_curves), "tradeoff": (2, draw_tradeoff)}
KINDS = tuple(_KINDS)


def plot(paths: Iterable[str | Path], output_file: str | Path, kind: str = "curves") -> Path:
    """Draw the runs found in `paths` and return the path of the picture.

    Args:
        paths (`Iterable[str | Path]`): output folders.
        output_file (`str | Path`): its ending (.png, .pdf, .svg) decides the format.
        kind (`str`): "curves" or "tradeoff".

    Raises:
        FileNotFoundError: there is no finished run.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: an unknown kind or ending, or runs with different metrics.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    groups = group_runs(find_runs(paths))
    panels, draw = _KINDS[kind]
    figure, axes = new_panels(panels, list(groups))
    draw(groups, axes)
    return save_panels(figure, axes, output_file)
