"""Pictures of finished runs: learning curves, and accuracy against the number of trained values."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .grid import describe
from .output import RUN_RECORD


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Where and how a run was done, not what was tried
_NOT_SHOWN = ("seed", "run_name", "disable_tqdm", "report_to", "feature_cache_dir", "logging_dir")
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Run:
    """A finished run as its folder tells it: arguments, final metrics, and the Trainer's log."""

    folder: Path
    record: dict[str, Any]
    metrics: dict[str, float]
    history: list[dict[str, float]]

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.record.get("method", "vpt"))

    def curve(self, key: str) -> dict[float, float]:
        """Values of a log entry by epoch; the first counts, as the last evaluation is that of the best epoch."""
        values: dict[float, float] = {}
        for entry in self.history:
            if key in entry:
                values.setdefault(entry["epoch"], entry[key])
        return values


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The finished runs in output folders of `train`, and below those of `compare` and `sweep`.

    Raises:
        FileNotFoundError: a folder does not exist, or there is no finished run in any.
        ValueError: a result file cannot be read.
    """
    folders, runs = [Path(path) for path in paths], []
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{str(folder)!r} does not exist; give output folders of trainings.")
        for config in sorted(folder.rglob(RUN_RECORD)):
            names = (RUN_RECORD, "all_results.json", "trainer_state.json")
            if all((config.parent / name).is_file() for name in names):
                record, metrics, state = (_read(config.parent / name) for name in names)
                runs.append(Run(config.parent, record, metrics, state.get("log_history", [])))
    if not runs:
        raise FileNotFoundError(
            f"no finished run in {', '.join(map(str, folders))}; a folder of one holds {RUN_RECORD}, all_results.json "
            "and trainer_state.json."
        )
    return runs


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); repeat the run.") from error


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, under the method and the settings in which it was varied."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alike = [other.record for other in runs if other.method == run.method]
        names = sorted({name for record in alike for name in record} - {*_NOT_SHOWN, "method"})
        varied = [name for name in names if any(record.get(name) != alike[0].get(name) for record in alike)]
        settings = describe({name: run.record.get(name, "default") for name in varied}) if varied else ""
        groups.setdefault(f"{run.method} ({settings})" if settings else run.method, []).append(run)
    return groups


def draw_curves(groups: dict[str, list[Run]], axes: Sequence[Axes]) -> None:
    """Training loss and validation accuracy over epochs: mean of the seeds as a line, their range as a band."""
    for ax, key, title, scale in (
        (axes[0], "loss", "training loss", 1.0),
        (axes[1], "eval_accuracy", "validation accuracy (%)", 100.0),
    ):
        for (label, runs), marker in zip(groups.items(), cycle(_MARKERS), strict=False):
            points: dict[float, list[float]] = {}
            for run in runs:
                for epoch, value in run.curve(key).items():
                    points.setdefault(epoch, []).append(scale * value)
            epochs = sorted(points)
            means = [statistics.fmean(points[epoch]) for epoch in epochs]
            (line,) = ax.plot(epochs, means, marker=marker if len(epochs) < 30 else "", markersize=4, label=label)
            if len(runs) > 1:
                low, high = ([choose(points[epoch]) for epoch in epochs] for choose in (min, max))
                ax.fill_between(epochs, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
        ax.set_xlabel("epoch")
        ax.set_ylabel(title)
        ax.locator_params(axis="x", integer=True)


def draw_tradeoff(groups: dict[str, list[Run]], axes: Sequence[Axes]) -> None:
    """Accuracy against trained values, one point per setting, with the sample standard deviation over seeds."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    (ax,) = axes
    tested = all("test_accuracy" in run.metrics for runs in groups.values() for run in runs)
    name = "test_accuracy" if tested else "eval_accuracy"
    for (label, runs), marker in zip(groups.items(), cycle(_MARKERS), strict=False):
        accuracies = [100 * run.metrics[name] for run in runs]
        spread = statistics.stdev(accuracies) if len(runs) > 1 else None
        values, mean = runs[0].metrics["trainable_parameters"], statistics.fmean(accuracies)
        ax.errorbar([values], [mean], yerr=spread, marker=marker, capsize=3, ls="", label=label)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_formatter(_short)
    # Few powers of ten are in sight, or none
    ax.xaxis.set_minor_formatter(FuncFormatter(_short) if high < 20 * low else NullFormatter())
    ax.tick_params(axis="x", which="both", labelsize="small", rotation=30)
    ax.set_xlabel("trained values")
    ax.set_ylabel("test accuracy (%)" if tested else "validation accuracy (%)")


def _short(value: float, _: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


_KINDS: dict[str, tuple[int, Callable]] = {"curves": (2, draw_curves), "tradeoff": (1, draw_tradeoff)}
KINDS = tuple(_KINDS)


def plot(paths: Iterable[str | Path], output_file: str | Path, kind: str = "curves") -> Path:
    """Draw the runs found in `paths` to a picture and return its path; the ending (.png, .pdf, .svg) decides the form.

    Raises:
        FileNotFoundError: there is no finished run.
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: an unknown kind or ending.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    groups, output_file = group_runs(find_runs(paths)), Path(output_file)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'vpt_peft[plots]'.") from error
    panels, draw = _KINDS[kind]
    figure = Figure(figsize=(4.5 * panels + 0.5, 3.6 + 0.25 * math.ceil(len(groups) / 2)), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if output_file.suffix[1:].lower() not in known:
        raise ValueError(f"output_file={str(output_file)!r} must end in one of .{', .'.join(sorted(known))}.")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw(groups, axes)
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    output_file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_file, dpi=150)
    return output_file
