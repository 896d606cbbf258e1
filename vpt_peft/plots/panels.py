"""Panels with a legend that fits below them, and axes that span powers of ten."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .figures import COLORS, new_figure, save_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"
_PANEL_WIDTH = 4.5
# Of the legend's text, in inches
_CHARACTER, _LINE = 0.07, 0.2
_LONGEST = 60


def new_panels(panels: int, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels beside each other, and room for a legend of the labels below.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    lines = math.ceil(sum(math.ceil(len(label) / _LONGEST) for label in labels) / _columns(panels, labels))
    figure = new_figure(_PANEL_WIDTH * panels + 0.5, 3.6 + _LINE * lines)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        # One colour less than there are markers, so that a pair of both comes back late
        ax.set_prop_cycle(color=COLORS[:-1])
    return figure, axes


def _columns(panels: int, labels: Sequence[str]) -> int:
    widest = min(max(map(len, labels), default=1), _LONGEST) * _CHARACTER + 0.6
    return max(1, min(len(labels), int(_PANEL_WIDTH * panels / widest)))


def save_panels(figure: Figure, axes: Sequence[Axes], output_file: str | Path) -> Path:
    """Add grid and legend, and write the file.

    Raises:
        ValueError: the ending of the file is unknown.
    """
    for ax in axes:
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        ["\n".join(textwrap.wrap(label, _LONGEST)) for label in labels],
        loc="outside lower center",
        ncols=_columns(len(axes), labels),
        frameon=False,
        fontsize="small",
    )
    return save_figure(figure, output_file)


def logarithmic(ax: Axes) -> None:
    """Make the x axis logarithmic, with numbers such as 20k; it may span less than a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_formatter(FuncFormatter(_short))
    few = high < 20 * low
    ax.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0) if few else "auto"))
    ax.xaxis.set_minor_formatter(FuncFormatter(_short) if few else NullFormatter())
    ax.tick_params(axis="x", which="both", labelsize="small", rotation=30)


def _short(value: float, _: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
