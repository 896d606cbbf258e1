"""Cost against the number of prompts, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import Row
from .subjects import FLOOR, METHODS


COLOURS = {
    "deep_kv": "#0b5fa5", "deep_merged": "#5aa9e6", "deep_token": "#c2410c",
    "shallow": "#6b7280", "gated": "#15803d", "gated_loop": "#a3b18a",
}  # fmt: skip
LEVELS: dict[str, dict[str, Any]] = {
    "lora": {"color": "#7c3aed", "linestyle": "--"}, "bias": {"color": "#b45309", "linestyle": ":"},
    "linear": {"color": "#6b7280", "linestyle": "-."}, "full": {"color": "#111827", "linestyle": "--"},
}  # fmt: skip
PANELS: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
    ("training step / floor", lambda row: row.step.median if row.step else None),
    ("inference / plain", lambda row: row.inference.median if row.inference else None),
    ("memory of a step / floor", lambda row: row.memory),
)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write a picture with a panel each for training, inference and memory; methods without prompts are level lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings, rows = results["settings"], results["rows"]
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(14, 4.8), layout="constrained")
    for axis, (title, read) in zip(axes, PANELS, strict=True):
        _prompted(axis, rows, read)
        _level(axis, rows, read)
        axis.set(title=title, xlabel="prompts per block")
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted({row.prompts for row in rows if row.prompts is not None}))
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    how = "compiled" if settings["compiled"] else "eager"
    figure.suptitle(
        f"{settings['model']}, {settings['dtype']}, {how}, batch {settings['batch_size']}, "
        f"{results['machine']['device']}, {results['machine']['threads']} threads"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _prompted(axis: Any, rows: Sequence[Row], read: Callable[[Row], float | None]) -> None:
    for method, colour in COLOURS.items():
        points = [(row.prompts, read(row)) for row in rows if row.method == method and read(row) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=METHODS[method].title)


def _level(axis: Any, rows: Sequence[Row], read: Callable[[Row], float | None]) -> None:
    axis.axhline(1.0, color="black", linewidth=1, label=METHODS[FLOOR].title)
    for row in rows:
        value = read(row)
        if row.prompts is None and row.method != FLOOR and value is not None:
            axis.axhline(value, **LEVELS[row.method], label=METHODS[row.method].title)
